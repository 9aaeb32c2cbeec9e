"""Where documents come from, and what a wrong source says."""

import bz2
import gzip
import json
import lzma
import os
import shutil
import sys
import sysconfig
from pathlib import Path
from random import Random

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from llada_lightning.data import corpora, text_files
from llada_lightning.data.corpora import documents, open_corpus
from llada_lightning.support.errors import UserError

COMPRESS = {
    "": bytes,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".bz2": bz2.compress,
    ".zst": lambda raw: zstandard.compress(raw[:7]) + zstandard.compress(raw[7:]),  # two frames, as pzstd writes
}


def write_jsonl(path: Path, texts: list[str], field: str = "text", suffix: str = "") -> Path:
    raw = "".join(json.dumps({"id": n, field: text}) + "\n" for n, text in enumerate(texts)).encode()
    path.write_bytes(COMPRESS[suffix](raw))
    return path


def test_the_interpreters_library_is_a_corpus() -> None:
    corpus = open_corpus("python-stdlib")
    stream = corpus.documents()
    first = next(stream)
    root = Path(sysconfig.get_paths()["stdlib"])
    assert first == (root / "__future__.py").read_text()
    assert corpus.identity["python"].endswith(".".join(map(str, sys.version_info[:3])))
    names = [name for name, _ in corpus._list_files()]
    assert names == sorted(names)
    assert len(names) > 500
    assert not any("site-packages" in name or not name.endswith(".py") for name in names)


@pytest.mark.parametrize("suffix", COMPRESS)
def test_jsonl_plain_and_compressed(tmp_path: Path, suffix: str) -> None:
    texts = ["one", "zwei\nlines", "三 [MASK]"]
    path = write_jsonl(tmp_path / f"a.jsonl{suffix}", texts, field="body", suffix=suffix)
    corpus = open_corpus(str(path), text_field="body")
    assert list(corpus.documents()) == texts
    assert corpus.position == corpus.total_bytes == path.stat().st_size


@pytest.mark.parametrize("suffix", COMPRESS)
def test_text_plain_and_compressed(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(COMPRESS[suffix]("first\r\nline\n\n\n\nsécond".encode()))
    assert list(documents(str(path))) == ["first\nline\n\n\n\nsécond"]
    assert list(documents(str(path), document_separator="\n\n")) == ["first\nline", "sécond"]


@given(
    text=st.text(st.sampled_from("ab|-\n"), max_size=60),
    separator=st.sampled_from(["|", "||", "|-|", "ab"]),
    block=st.integers(1, 5),
)
def test_splitting_in_blocks_equals_splitting_at_once(
    text: str, separator: str, block: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "split.txt"
    path.write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_files, "_READ_CHARS", block)
        found = list(documents(str(path), document_separator=separator))
    assert found == [part for part in text.split(separator) if part.strip()]


def test_lines_of_json_split_by_a_separator(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "books.jsonl", ["one\n\ntwo\n\n\n\nthree", "four"])
    found = list(documents(f"{tmp_path}/books.jsonl", document_separator="\n\n"))
    assert found == ["one", "two", "three", "four"]


def test_a_text_without_its_separator_and_a_line_that_is_too_long_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_files, "MAX_TEXT_DOCUMENT", 100)
    monkeypatch.setattr(text_files, "MAX_JSON_LINE", 100)
    (tmp_path / "long.txt").write_text("x" * 101)
    with pytest.raises(UserError, match="more than 100 characters without the separator '---'"):
        list(documents(f"{tmp_path}/long.txt", document_separator="---"))
    write_jsonl(tmp_path / "long.jsonl", ["short", "x" * 100])
    with pytest.raises(UserError, match=r"long\.jsonl:2: has more than 100 bytes"):
        list(documents(f"{tmp_path}/long.jsonl"))


def test_a_folder_is_read_in_sorted_order_without_what_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "x.txt").write_text("hidden")
    (tmp_path / "b" / "z.txt").write_text("in b")
    (tmp_path / "b.txt").write_text("b")
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\r\n\0\0")
    write_jsonl(tmp_path / "a.jsonl", ["a0", "a1"])
    corpus = open_corpus(str(tmp_path))
    assert list(corpus.documents()) == ["a0", "a1", "b", "in b"]
    assert corpus.skipped == 1
    assert list(corpus.documents()) == ["a0", "a1", "b", "in b"]
    assert list(documents(f"{tmp_path}/*.txt")) == ["b"]
    assert list(documents(f"{tmp_path}/**/*.txt")) == ["b", "in b"]


def test_a_copy_elsewhere_is_the_same_corpus_and_a_change_is_not(tmp_path: Path) -> None:
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text("some text")
    os.utime(tmp_path / "there" / "a.txt", (1, 1))
    here, there = (open_corpus(str(tmp_path / name)).identity for name in ("here", "there"))
    assert here == there
    (tmp_path / "there" / "a.txt").write_text("same size")
    assert open_corpus(str(tmp_path / "there")).identity["digest"] != here["digest"]


def test_lone_surrogates_of_json_become_replacement_characters(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a\\ud800b \\ud83d\\ude00"}\n\n')
    assert list(documents(str(path))) == ["a\ufffdb \U0001f600"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"body": "x", "n": 1}', "no field 'text'; the line has: body, n"),
        ('{"text": 3}', "holds int"),
        ('{"text": null}', "holds NoneType"),
        ('["x"]', "not a JSON object"),
        ('{"text": "x"', "is not JSON"),
        ('{"text": "\udcff"}', "is not JSON"),
        ('{"text": "x", "text": "y"}', "the key 'text' is given twice in line 2"),
        ("[" * 100_000 + "]" * 100_000, "is nested too deeply"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: str, said: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "good"}\n' + line.encode("utf-8", "surrogateescape") + b"\n")
    with pytest.raises(UserError, match=r"a\.jsonl:2(: | is )") as caught:
        list(documents(str(path)))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".bz2", ".zst"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "not compressed"])
@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_a_damaged_file_is_named(tmp_path: Path, suffix: str, damage: str, kind: str) -> None:
    random = Random(0)
    lines = "".join(json.dumps({"text": random.randbytes(20).hex()}) + "\n" for _ in range(4000))
    compress = {**COMPRESS, ".zst": zstandard.ZstdCompressor(write_checksum=True).compress}[suffix]
    raw = bytearray(compress(lines.encode()))
    if damage == "cut":
        del raw[len(raw) * 2 // 3 :]
    elif damage == "flipped":
        raw[len(raw) * 2 // 3] ^= 16
    else:
        raw = bytearray(b"plain text, no archive at all")
    path = tmp_path / f"a.{kind}{suffix}"
    path.write_bytes(raw)
    with pytest.raises(UserError, match=r"a\.\w+\.\w+(: cannot be read \(.*; |:\d+ is not JSON: )") as caught:
        list(documents(str(path)))
    assert "\n" not in str(caught.value)


def test_a_text_that_is_not_utf8_or_too_long_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"caf\xe9 \n")
    with pytest.raises(UserError, match="is not UTF-8 text"):
        list(documents(str(path)))
    path.write_text("long text")
    monkeypatch.setattr(text_files, "MAX_TEXT_DOCUMENT", 5)
    with pytest.raises(UserError, match="--document-separator"):
        list(documents(str(path)))


@pytest.mark.parametrize("source", ["nowhere.txt", "no/such/*.txt", "python-stdlibs"])
def test_an_unknown_source(source: str) -> None:
    with pytest.raises(UserError, match="is not known"):
        documents(source)


def test_a_table_and_an_empty_separator(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"hf:x\.parquet"):
        documents("x.parquet")
    with pytest.raises(UserError, match="separator '' is empty"):
        documents("python-stdlib", document_separator="")


def test_a_dataset_on_this_machine_is_streamed(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    write_jsonl(tmp_path / "train.jsonl", ["a", " ", "b"])
    write_jsonl(tmp_path / "test.jsonl", ["c"])
    assert list(documents(f"hf:{tmp_path}")) == ["a", "b"]
    assert list(documents(f"hf:{tmp_path}@test")) == ["c"]
    assert list(documents(f"hf:{tmp_path}", document_separator="a")) == ["b"]
    assert list(documents(f"hf:{tmp_path}/test.jsonl")) == ["c"]
    assert open_corpus(f"hf:{tmp_path}").identity["files"] == 2
    with pytest.raises(UserError, match=r"no column 'body'; it has: id, text"):
        list(documents(f"hf:{tmp_path}", text_field="body"))
    with pytest.raises(UserError, match="holds int"):
        list(documents(f"hf:{tmp_path}", text_field="id"))
    with pytest.raises(UserError, match=r"cannot be read .*other"):
        list(documents(f"hf:{tmp_path}@other"))


def test_a_dataset_of_the_hub_is_asked_for_by_name_configuration_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(**arguments: object) -> list[dict[str, str]]:
        asked.append(arguments)
        return [{"text": "x"}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert list(documents("hf:owner/name:en@validation")) == ["x"]
    assert list(documents("hf:name")) == ["x"]
    assert asked == [
        {"path": "owner/name", "name": "en", "split": "validation", "streaming": True},
        {"path": "name", "name": None, "split": "train", "streaming": True},
    ]


def test_code_in_a_dataset_is_never_run(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    folder = tmp_path / "hostile"
    folder.mkdir()
    (folder / "hostile.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    with pytest.raises(UserError, match="cannot be read"):
        list(documents(f"hf:{folder}"))
    write_jsonl(folder / "train.jsonl", ["a"])
    with pytest.raises(UserError, match="cannot be read"):
        list(documents(f"hf:{folder}"))
    assert not (tmp_path / "ran").exists()


def test_a_folder_that_goes_away_is_named(tmp_path: Path) -> None:
    (tmp_path / "text" / "b").mkdir(parents=True)
    (tmp_path / "text" / "a.txt").write_text("a")
    (tmp_path / "text" / "b" / "b.txt").write_text("b")
    stream = documents(str(tmp_path / "text"))
    assert next(stream) == "a"
    shutil.rmtree(tmp_path / "text" / "b")
    with pytest.raises(UserError, match=r"text/b: cannot be read \(No such file or directory\); repair or remove"):
        next(stream)


def test_a_hub_out_of_reach_and_a_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def load_dataset(**_: object) -> None:
        raise ConnectionError("no\nroute")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError, match="ConnectionError: no route"):
        list(documents("hf:name"))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'llada-lightning\[hf\]'"):
        list(documents("hf:name"))


def test_a_forbidden_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    path.write_text("text")
    corpus = open_corpus(str(path))
    path.unlink()
    monkeypatch.setattr(corpora, "is_text", lambda _: True)
    with pytest.raises(UserError, match=r"a\.txt: cannot be read"):
        list(corpus.documents())
