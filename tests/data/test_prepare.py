"""From a corpus to a prepared folder: the stream, the split, what a second run does, and every mistake."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from litdata import StreamingDataset
from litdata.streaming.item_loader import TokensLoader
from rich.console import Console

from helpers.small_corpora import forgetful_tokenizer
from llada_lightning.commands import prepare as prepare_command
from llada_lightning.commands.main import main
from llada_lightning.data import prepare as prepare_module
from llada_lightning.data.display import PrepareProgress
from llada_lightning.data.manifest import Manifest, Split, read_manifest
from llada_lightning.data.prepare import in_validation, prepare
from llada_lightning.data.tokenizers import TokenizerFiles, train_tokenizer
from llada_lightning.support.errors import UserError
from llada_lightning.support.files import building

# litdata maps shards read-only and clones what it reads; torch warns all the same.
pytestmark = pytest.mark.filterwarnings("ignore:The given buffer is not writable")

TEXTS = [f"document {n}: " + "the cat sat on the mat. " * (n % 7) + "[MASK] and [EOS] are words" for n in range(60)]


@pytest.fixture(autouse=True)
def _private_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATA_OPTIMIZER_CACHE_FOLDER", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer(TEXTS, 300).save(str(path))
    return str(path)


def write_corpus(path: Path, texts: list[str] = TEXTS) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def run(source: str, out: Path, **options: Any) -> Manifest:
    return prepare(source, out, **{"vocab_size": 300, "val_fraction": 0.3, "progress": False, **options})


def read_stream(out: Path, split: str, manifest: Manifest) -> np.ndarray:
    """All tokens of a split, straight from the shards' bytes."""
    dtype = np.dtype(manifest.dtype)
    parts = [np.frombuffer((out / shard.file).read_bytes()[12:], dtype) for shard in manifest.splits[split].shards]
    return np.concatenate(parts)


def decoded(out: Path, split: str, manifest: Manifest) -> list[str]:
    """The documents of a split as the tokens tell them."""
    tokens = read_stream(out, split, manifest)
    tokenizer = TokenizerFiles.of_path(out / "tokenizer.json").tokenizer
    ends = np.flatnonzero(tokens == manifest.tokenizer.eos_id)
    starts = [0, *(ends + 1)[:-1]]
    return [
        tokenizer.decode(tokens[start:end].tolist(), skip_special_tokens=False)
        for start, end in zip(starts, ends, strict=True)
    ]


def test_the_folder_holds_the_documents_and_the_manifest_counts_them(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    manifest = run(write_corpus(tmp_path / "a.jsonl"), out, shard_tokens=100)
    assert read_manifest(out) == manifest
    expected = {
        name: [text for text in TEXTS if in_validation(text.encode(), 0.3) == (name == "val")]
        for name in ("train", "val")
    }
    for name, split in manifest.splits.items():
        tokens = read_stream(out, name, manifest)
        assert decoded(out, name, manifest) == expected[name]
        assert split.documents == len(expected[name])
        assert split.bytes == sum(len(text.encode()) for text in expected[name])
        assert split.tokens == len(tokens) == sum(shard.tokens for shard in split.shards)
        assert not (tokens == manifest.tokenizer.mask_id).any()
        assert {shard.tokens for shard in split.shards[:-1]} == {100}
        assert 0 < split.shards[-1].tokens <= 100
        assert [os.path.getsize(out / shard.file) for shard in split.shards] == [shard.size for shard in split.shards]
    assert sorted(path.name for path in out.iterdir()) == ["manifest.json", "tokenizer.json", "train", "val"]
    assert sorted(path.name for path in out.parent.iterdir()) == ["out"]


@pytest.mark.parametrize("length", [1, 7, 50, 100])
def test_litdata_reads_the_blocks_of_the_stream(tmp_path: Path, tokenizer_path: str, length: int) -> None:
    out = tmp_path / "out"
    manifest = run(write_corpus(tmp_path / "a.jsonl"), out, shard_tokens=100, tokenizer=tokenizer_path)
    tokens = read_stream(out, "train", manifest)
    dataset = StreamingDataset(str(out / "train"), item_loader=TokensLoader(block_size=length), shuffle=False)
    per_shard = 100 // length
    assert len(dataset) == manifest.splits["train"].items(length)
    assert len(manifest.splits["train"].shards) > 3
    for index in range(0, len(dataset), max(1, len(dataset) // 40)):
        begin = index // per_shard * 100 + index % per_shard * length
        np.testing.assert_array_equal(dataset[index].numpy(), tokens[begin : begin + length])


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    texts=st.lists(st.text(min_size=1) | st.just("a [MASK] b [EOS]"), min_size=1, max_size=8),
    shard_tokens=st.integers(1, 60),
    batch=st.integers(1, 40),
)
def test_any_text_comes_back_from_any_shards_and_batches(
    texts: list[str], shard_tokens: int, batch: int, tokenizer_path: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("any")
    texts = [*texts, *TEXTS[:4]]  # which has documents for both splits
    source = write_corpus(folder / "a.jsonl", texts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llada_lightning.data.encoding.BATCH_CHARS", batch)
        manifest = run(source, folder / "out", shard_tokens=shard_tokens, tokenizer=tokenizer_path)
    kept = [text for text in texts if text.strip()]
    found = decoded(folder / "out", "train", manifest) + decoded(folder / "out", "val", manifest)
    assert sorted(found) == sorted(kept)


def test_the_result_depends_on_text_and_settings_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)  # `llada evaluate` in this process sets it
    source = write_corpus(tmp_path / "a.jsonl")
    first = run(source, tmp_path / "one", shard_tokens=200)
    code = (
        "import sys; from llada_lightning.data.prepare import prepare\n"
        "m = prepare(sys.argv[1], sys.argv[2], vocab_size=300, val_fraction=0.3, shard_tokens=200, progress=False)\n"
        "print(m.fingerprint)"
    )
    environment = {**os.environ, "RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    moved = write_corpus(tmp_path / "b.jsonl")
    answer = subprocess.run(
        [sys.executable, "-c", code, moved, str(tmp_path / "two")], env=environment, text=True, capture_output=True
    )
    assert answer.stdout.strip() == first.fingerprint, answer.stderr
    for name in ("train/index.json", "val/index.json", "train/chunk-0-0.bin", "tokenizer.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert run(source, tmp_path / "three", shard_tokens=199).fingerprint != first.fingerprint
    assert "TOKENIZERS_PARALLELISM" not in os.environ


def test_copies_of_a_document_share_a_split_and_the_share_is_right() -> None:
    texts = [f"text {n}".encode() for n in range(4000)]
    chosen = {text for text in texts if in_validation(text, 0.1)}
    assert abs(len(chosen) / len(texts) - 0.1) < 4 * (0.1 * 0.9 / len(texts)) ** 0.5
    assert chosen == {text for text in texts if in_validation(text, 0.1)}
    assert chosen < {text for text in texts if in_validation(text, 0.2)}


def test_few_validation_documents_are_told_with_the_ways_to_more(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Long documents are split by a separator, of a line of JSONL as of a text file."""
    few = write_corpus(tmp_path / "few.jsonl", ["\n\n".join(TEXTS[n::3]) for n in range(3)])
    words = ["--vocab-size=300", "--val-fraction=0.5", "--quiet"]
    assert prepare_command.main([f"--source={few}", f"--out={tmp_path / 'few'}", *words]) == 0
    told = capsys.readouterr().err
    assert told.startswith("note: ") and " only, and below 20 the standard error of a loss means little; raise" in told
    assert told.endswith("or split long texts with --document-separator\n")
    enough = write_corpus(tmp_path / "enough.jsonl", ["\n\n".join(f"text {n}" for n in range(100))] * 2)
    separated = ["--document-separator=\\n\\n", *words]
    assert prepare_command.main([f"--source={enough}", f"--out={tmp_path / 'enough'}", *separated]) == 0
    assert capsys.readouterr().err == ""


def test_a_second_run_does_nothing_and_other_settings_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = write_corpus(tmp_path / "a.jsonl"), tmp_path / "out"
    first = run(source, out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert run(source, out, progress=True) == first
    assert "is already prepared with these settings; nothing to do" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"other settings \(val_fraction 0\.3, now 0\.4\)"):
        run(source, out, val_fraction=0.4)
    write_corpus(tmp_path / "a.jsonl", TEXTS[:-1])
    with pytest.raises(UserError, match="prepared from another"):
        run(source, out)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    write_corpus(tmp_path / "a.jsonl")
    (out / first.splits["val"].shards[0].file).write_bytes(b"short")
    with pytest.raises(UserError, match="has 5 bytes"):
        run(source, out)


def test_a_prepared_folder_lends_its_tokenizer(tmp_path: Path) -> None:
    source = write_corpus(tmp_path / "a.jsonl")
    first = run(source, tmp_path / "one")
    second = run(source, tmp_path / "two", tokenizer=str(tmp_path / "one"), val_fraction=0.5)
    assert second.tokenizer == first.tokenizer
    assert second.settings["tokenizer"] == first.tokenizer.fingerprint
    assert run(source, tmp_path / "two", tokenizer=str(tmp_path / "one"), val_fraction=0.5) == second


def test_wide_vocabularies_are_stored_in_32_bits(tmp_path: Path, tokenizer_path: str) -> None:
    record = json.loads(Path(tokenizer_path).read_text())
    far = {"id": 70_000, "content": "[FAR]", "special": True}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    record["model"]["vocab"]["[FAR]"] = 70_000
    record["added_tokens"].append({**far, **flags})
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(record))
    out = tmp_path / "out"
    manifest = run(write_corpus(tmp_path / "a.jsonl"), out, tokenizer=str(path), eos_token="[FAR]", shard_tokens=64)
    assert (manifest.dtype, manifest.tokenizer.vocab_size) == ("int32", 70_001)
    dataset = StreamingDataset(str(out / "train"), item_loader=TokensLoader(block_size=64), shuffle=False)
    blocks = np.concatenate([dataset[index].numpy() for index in range(len(dataset))])
    assert (blocks == 70_000).sum() > 0
    np.testing.assert_array_equal(blocks, read_stream(out, "train", manifest)[: len(blocks)])


def test_limits(tmp_path: Path) -> None:
    source = write_corpus(tmp_path / "a.jsonl")

    def documents(**limits: int) -> int:
        manifest = run(source, tmp_path / repr(limits), **limits)
        return sum(split.documents for split in manifest.splits.values())

    sizes = np.cumsum([len(text.encode()) for text in TEXTS])
    assert documents(max_documents=20) == 20
    assert documents(max_bytes=int(sizes[19])) == 20
    assert documents(max_bytes=int(sizes[19]) - 1) == 19


def test_text_files_split_by_a_separator(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("\n\n".join(TEXTS))
    manifest = run(str(tmp_path / "book.txt"), tmp_path / "out", document_separator="\n\n")
    assert sum(split.documents for split in manifest.splits.values()) == len(TEXTS)


class StopHereError(Exception):
    """Stands for whatever ends a run in its middle."""


def test_an_interrupted_run_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = write_corpus(tmp_path / "a.jsonl"), tmp_path / "sub" / "out"
    (tmp_path / "sub").mkdir()

    def stop(*_: object, **__: object) -> None:
        assert any(path.name.startswith(".out.partial-") for path in out.parent.iterdir())
        raise StopHereError

    for name in ("train_tokenizer", "data_fingerprint"):  # at the beginning, and when all shards are written
        with monkeypatch.context() as patch:
            patch.setattr(prepare_module, name, stop)
            with pytest.raises(StopHereError):
                run(source, out, shard_tokens=50)
        assert list(out.parent.iterdir()) == []


def test_what_a_killed_run_left_is_removed_and_what_a_live_one_writes_is_not(tmp_path: Path) -> None:
    source, out = write_corpus(tmp_path / "a.jsonl"), tmp_path / "out"
    leftover = tmp_path / ".out.partial-killed"
    (leftover / "train").mkdir(parents=True)
    neighbour = tmp_path / ".out2.partial-other"
    neighbour.mkdir()
    with building(out) as partial:
        assert not leftover.exists()
        with pytest.raises(UserError, match="being prepared by another process"):
            run(source, out)
        assert partial.exists()
    assert out.exists()
    assert neighbour.exists()
    run(source, out)  # an empty folder in its place is no obstacle


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    manifest = run(write_corpus(tmp_path / "a.jsonl"), tmp_path / "out")
    assert (tmp_path / "out").is_symlink()
    assert read_manifest(tmp_path / "disk") == manifest


def test_a_foreign_folder_or_file_is_never_touched(tmp_path: Path) -> None:
    source, out = write_corpus(tmp_path / "a.jsonl"), tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="is not a prepared data folder"):
        run(source, out)
    assert (out / "thesis.txt").read_text() == "years of work"
    with pytest.raises(UserError, match="is not a prepared data folder"):
        run(source, out / "thesis.txt")
    with pytest.raises(UserError, match="cannot be written"):
        run(source, out / "thesis.txt" / "below")


@pytest.mark.parametrize(
    ("texts", "options", "said"),
    [
        ([], {}, "is empty"),
        ([" ", "\n"], {}, "is empty"),
        (TEXTS, {"max_bytes": 3}, "is empty.*raise --max-bytes"),
        (
            TEXTS[:1],
            {"val_fraction": 1e-9},
            r"1 document, which is not in 'val'.*need one; divide the text by --document-",
        ),
        (
            TEXTS[:1],
            {"val_fraction": 1 - 1e-9},
            "1 document, which is not in 'train'.*; divide the text by --document-",
        ),
        (
            TEXTS[:2],
            {"val_fraction": 1e-9},
            r"2 documents, none of them in 'val'.*1e-09; raise --val-fraction, or divide",
        ),
        (TEXTS[:2], {"val_fraction": 1 - 1e-9}, "none of them in 'train'.*; lower --val-fraction, or divide"),
        (TEXTS, {"val_fraction": 0.0}, "--val-fraction"),
        (TEXTS, {"val_fraction": 1.0}, "--val-fraction"),
        (TEXTS, {"shard_tokens": 0}, "--shard-tokens"),
        (TEXTS, {"shard_tokens": 1 << 32}, "--shard-tokens"),
        (TEXTS, {"max_documents": 0}, "--max-documents 0"),
        (TEXTS, {"vocab_size": 100}, "--vocab-size"),
        (TEXTS, {"mask_token": "x"}, "add --tokenizer"),
        (TEXTS, {"tokenizer": "missing.json"}, "no such file"),
        (TEXTS, {"text_field": "body"}, "no field 'body'"),
    ],
)
@pytest.mark.parametrize("given_tokenizer", [False, True])
def test_mistakes_leave_nothing(
    tmp_path: Path, tokenizer_path: str, texts: list[str], options: dict[str, Any], said: str, given_tokenizer: bool
) -> None:
    if given_tokenizer and "add --tokenizer" not in said and "vocab_size" not in options:
        options = {"tokenizer": tokenizer_path, **options}
    source = write_corpus(tmp_path / "a.jsonl", texts)
    with pytest.raises(UserError, match=said) as caught:
        run(source, tmp_path / "out", **options)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_an_output_inside_its_source(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(UserError, match="lies in the source"):
        run(str(tmp_path), tmp_path / "out")


def test_a_tokenizer_that_writes_its_mask_token_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llada_lightning.data.tokenizers._check_apart", lambda *_: None)
    path = tmp_path / "tokenizer.json"
    train_tokenizer(TEXTS, 258).save(str(path))  # bytes only: no merge hides the letter
    with pytest.raises(UserError, match="encodes some text to its special token 't'"):
        run(write_corpus(tmp_path / "a.jsonl"), tmp_path / "out", tokenizer=str(path), mask_token="t")
    assert not (tmp_path / "out").exists()


def test_the_command_prints_a_table_or_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "book.txt").write_text("\n--\n".join(TEXTS))
    arguments = ["--source", f"{tmp_path}/book.txt", "--out", f"{tmp_path}/out", "--vocab-size", "300"]
    arguments += ["--val-fraction", "0.3", "--document-separator", r"\n--\n"]
    assert prepare_command.main([*arguments, "--json"]) == 0
    answer = capsys.readouterr()
    record, manifest = json.loads(answer.out), read_manifest(tmp_path / "out")
    assert record["fingerprint"] == manifest.fingerprint
    assert record["tokenizer"]["mask_id"] == 1
    assert record["splits"]["train"]["documents"] + record["splits"]["val"]["documents"] == len(TEXTS)
    progress, note = answer.err.splitlines()
    assert progress.startswith("prepared ") and note.startswith("note: ")
    assert prepare_command.main([*arguments, "--quiet"]) == 0
    answer = capsys.readouterr()
    assert answer.err == note + "\n"
    assert f"{manifest.splits['train'].tokens:,}" in answer.out
    assert manifest.fingerprint[:16] in answer.out


@pytest.mark.parametrize("name", ["books[en]", "[bold]books", "[/b]ooks"])
def test_names_like_markup_are_shown_as_they_are(
    tmp_path: Path, tokenizer_path: str, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_corpus(Path("text.jsonl"))
    arguments = ["--source", "text.jsonl", "--out", name, "--tokenizer", tokenizer_path, "--val-fraction", "0.3"]
    assert main(["prepare", *arguments, "--quiet"]) == 0
    assert name in capsys.readouterr().out.splitlines()[0]
    assert main(["prepare", "--verify", name]) == 0
    assert f"{name}: whole" in capsys.readouterr().out.splitlines()[0]


def test_bytes_that_do_not_come_back_are_counted_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = forgetful_tokenizer(tmp_path / "tokenizer")
    source = write_corpus(tmp_path / "text.jsonl", ["The sea" + " x" * n for n in range(60)])
    arguments = ["--source", source, "--val-fraction", "0.3", "--tokenizer", tokenizer, "--eos-token", "[SEP]"]
    assert main(["prepare", *arguments, "--out", f"{tmp_path}/lossy", "--json", "--quiet"]) == 0
    answer = capsys.readouterr()
    splits = json.loads(answer.out)["splits"]
    assert splits["train"]["lost_bytes"] is None
    assert splits["val"]["lost_bytes"] == splits["val"]["documents"]  # one capital each
    assert read_manifest(tmp_path / "lossy").splits["val"].lost_bytes == splits["val"]["documents"]
    share = 100 * splits["val"]["documents"] / splits["val"]["bytes"]
    few, lossy = answer.err.splitlines()
    assert f" {splits['val']['documents']} validation documents only, " in few
    assert lossy.startswith(f"note: {share:.3g} % of the text's bytes do not come back from its tokens; ")


def test_a_tokenizer_of_our_own_loses_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_corpus(tmp_path / "text.jsonl", [f"Die See\n\n\t{n} 海 é e\u0301 \0 [MASK]" for n in range(60)])
    assert run(source, tmp_path / "out").splits["val"].lost_bytes == 0
    assert "note" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--source", "pipe"], "'pipe' is a pipe or a device, not a file"),
        (["--source", "/dev/zero"], "'/dev/zero' is a pipe or a device, not a file"),
        (["--source", "hf:pipe"], "'pipe' is a pipe or a device, not a file"),
        (["--source", "python-stdlib", "--document-separator", "x"], "--document-separator does nothing"),
        (["--source", "igsm:9", "--document-separator", "x"], "--document-separator does nothing"),
        (["--source", "text.jsonl", "--vocab-size", str(10**18)], f"vocabulary size {10**18} is above 16,777,216"),
        (["--source", "a\0b"], "NUL character"),
        (["--source", "text.jsonl", "--out", "a\0b"], "NUL character"),
        (["--source", "text.jsonl", "--tokenizer", "endless.json"], "the tokenizer cannot encode a text of"),
    ],
)
def test_hostile_inputs_are_one_line_and_leave_nothing(
    tmp_path: Path, arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    write_corpus(Path("text.jsonl"), [*("x" * n for n in range(1, 40)), "a" * 200 + "b"])
    hostile = json.loads(train_tokenizer(TEXTS, 300).to_str())
    hostile["pre_tokenizer"] = {
        "type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False,
    }  # fmt: skip
    Path("endless.json").write_text(json.dumps(hostile))
    before = sorted(path.name for path in tmp_path.iterdir())
    assert main(["prepare", "--out", "out", "--vocab-size", "300", "--quiet", *arguments]) == 2
    [line] = capfd.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert said in line
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "required: out"),
        (["--out", "x", "--vocab-size", "many"], "vocab_size"),
        (["--out", "x", "--sauce", "y"], "--sauce"),
    ],
)
def test_a_wrong_option_is_one_line(arguments: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        prepare_command.main(arguments)
    assert "\n" not in str(caught.value)
    assert "llada prepare --help" in str(caught.value)


def test_a_terminal_shows_how_far_it_is() -> None:
    console = Console(force_terminal=True, width=120, record=True)
    counts = Split(documents=3, tokens=9, bytes=30, shards=())
    with PrepareProgress(console=console) as report:
        report.phase("tokenizing", total_bytes=200)
        report.update([counts], position=100, force=True)
        assert report._bar.tasks[0].percentage == 50.0
        report.phase("tokenizing", total_bytes=200, max_bytes=40)
        report.update([counts], position=100, force=True)
        assert report._bar.tasks[0].percentage == 75.0
        report.finish("out", skipped=2)
    text = console.export_text()
    assert "prepared 'out': 3 documents, 9 tokens, 30 bytes" in text
    assert "2 files skipped" in text
