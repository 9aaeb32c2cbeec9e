"""Where prompts come from."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest

from llada_lightning.generation import prompts as prompt_sources
from llada_lightning.generation.prompts import given_prompts, read_prompts, with_gaps
from llada_lightning.support.errors import UserError


def test_options_come_before_the_file_and_a_dash_is_stdin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "p.txt").write_text("three\r\n\nfour\u2028still four\n")
    monkeypatch.setattr("sys.stdin", io.StringIO("two\nlines\n"))
    assert given_prompts(["one", "-"], str(tmp_path / "p.txt")) == [
        "one",
        "two\nlines",
        "three",
        "four\u2028still four",
    ]


@pytest.mark.parametrize("kind", ["pipe", "file", "null"])
def test_what_is_piped_in_is_the_prompt_where_none_is_given(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "pipe":
        reading, writing = os.pipe()
        os.write(writing, b"piped\n")
        os.close(writing)
        stdin = os.fdopen(reading)
    else:
        (tmp_path / "in").write_text("piped\n")
        stdin = (tmp_path / "in" if kind == "file" else Path(os.devnull)).open()
    with stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        assert given_prompts(["one"], None) == ["one"]
        assert given_prompts([], None) == ([] if kind == "null" else ["piped"])


def test_a_jsonl_holds_texts_and_ids(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "a\\nb", "n": 1}\n\n{"prompt": [3, 4]}\n{"prompt": []}\n')
    assert read_prompts(str(tmp_path / "p.jsonl")) == ["a\nb", [3, 4], []]
    assert capsys.readouterr().err == f"note: prompts file '{tmp_path}/p.jsonl': not read: 'n' (1 row)\n"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("p.txt", None, "cannot be read"),
        ("p.txt", b"\n \n", "holds no prompt"),
        ("p.txt", b"\xff\xfe", "not UTF-8"),
        ("p.csv", b"a", "neither .txt nor .jsonl"),
        ("p.jsonl", b'{"prompt": "a"}\n{', "line 2 is not JSON"),
        ("p.jsonl", b'{"text": "a"}', "line 1: .* neither a text nor a list"),
        ("p.jsonl", b'{"prompt": [1, true]}', "neither a text nor a list"),
        ("p.jsonl", b"[1]", "neither a text nor a list"),
        ("p.jsonl", b"[" * 100_000 + b"]" * 100_000, "line 1 is nested too deeply"),
        ("p.jsonl", b'{"prompt": "a\0"}', "line 1 is not JSON"),
        ("p.jsonl", b'\n{"prompt": "a", "prompt": "b"}', "line 2: the key 'prompt' is given twice in line 2"),
        ("p.jsonl", b'{"prompt": "a", "system": "Be brief."}', "line 1: has 'system', which is not understood"),
        ("p.jsonl", b'{"prompt": "a", "input": "b"}', "line 1: has 'input'"),
        ("p\0.txt", None, "cannot be read: embedded null byte"),
    ],
)
def test_a_file_that_is_none_of_prompts(tmp_path: Path, name: str, content: bytes | None, words: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=words) as mistake:
        read_prompts(str(tmp_path / name))
    assert len(str(mistake.value).splitlines()) == 1


@pytest.mark.parametrize(("name", "content"), [("p.txt", "the sea\n"), ("p.jsonl", '{"prompt": "the sea"}\n')])
def test_a_byte_order_mark_is_no_part_of_a_prompt(
    name: str, content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8-sig")
    assert read_prompts(str(tmp_path / name)) == ["the sea"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\ufeffthe sea\n"))
    assert given_prompts(["-"], None) == ["the sea"]


def test_stdin_that_gives_no_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", None)
    assert given_prompts([], None) == []
    with pytest.raises(UserError, match="stdin is closed"):
        given_prompts(["-"], None)
    monkeypatch.setattr("sys.stdin", io.StringIO("four"))
    monkeypatch.setattr(prompt_sources, "MAX_TEXT_BYTES", 3)
    with pytest.raises(UserError, match="stdin has more than 3 characters"):
        given_prompts(["-"], None)
    with (tmp_path / "out").open("w") as file:  # opened for writing
        monkeypatch.setattr("sys.stdin", file)
        with pytest.raises(UserError, match="stdin cannot be read"):
            given_prompts(["-"], None)


def test_bytes_that_are_no_text() -> None:
    with pytest.raises(UserError, match="character 2 is not UTF-8"):
        given_prompts(["a\udcff"], None)


def test_gaps_are_so_many_mask_tokens() -> None:
    assert with_gaps("a[MASK:3]b[MASK]c<m>", "<m>") == "a<m><m><m>b<m>c<m>"
    assert with_gaps("[MASK:x] [mask:3]", "<m>") == "[MASK:x] [mask:3]"
    for gap in ("[MASK:0]", "[MASK:99999999999]"):
        with pytest.raises(UserError, match="give from 1"):
            with_gaps(gap, "<m>")
