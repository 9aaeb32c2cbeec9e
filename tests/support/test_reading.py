"""Files that people wrote: byte order marks, repeated keys, and texts made to exhaust a parser."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from llada_lightning.support.errors import UserError
from llada_lightning.support.reading import (
    MAX_DEPTH,
    FormatError,
    check_yaml,
    parse_json,
    parse_yaml,
    read_json,
    read_text,
    read_yaml,
)

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(VALUES)
def test_json_and_yaml_are_read_as_the_libraries_read_them(value: object) -> None:
    text = json.dumps(value)
    assert parse_json(text, "text") == value
    assert parse_yaml(yaml.safe_dump(value), "text") == yaml.safe_load(yaml.safe_dump(value))


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path, mark: str) -> None:
    path = tmp_path / "file"
    path.write_text(mark + '{"a": "é"}', encoding="utf-8")
    assert read_text(path) == '{"a": "é"}'
    assert read_json(path) == read_yaml(path) == {"a": "é"}
    assert parse_json(path.read_bytes(), "file") == parse_json(mark + '{"a": "é"}', "file") == {"a": "é"}


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ('{"a": 1, "a": 2}', "the key 'a' is given twice in line 1"),
        ('{"b": [{"a": 1,\n "c": "\\"a\\": {"}],\n\n "b": 2}', "the key 'b' is given in line 1 and again in line 4"),
        ('{"b": {"\\u0061": "a",\n"a": [1, "a"]}}', "the key 'a' is given in line 1 and again in line 2"),
    ],
)  # fmt: skip
def test_a_key_twice_in_json_is_refused_with_both_lines(text: str, where: str) -> None:
    with pytest.raises(FormatError, match=f"^'f.json': {where}; keep one of them$"):
        parse_json(text, "'f.json'")


def test_the_line_of_a_row_is_that_of_its_file() -> None:
    with pytest.raises(FormatError, match="twice in line 7"):
        parse_json('{"a": 1, "a": 2}', "rows.jsonl", first_line=7)


@pytest.mark.parametrize(
    ("text", "first", "second"),
    [
        ("model: 1\ndata: 2\nmodel: 3\n", 1, 3),
        ("model:\n  lr: 1\n  b: {c: 1}\n  'lr': 2\n", 2, 4),
        ("- {a: 1,\n   b: 2,\n   a: 3}\n", 1, 3),
    ],
)
def test_a_key_twice_in_yaml_is_refused_with_both_lines(text: str, first: int, second: int) -> None:
    with pytest.raises(FormatError, match=f"is given in line {first} and again in line {second}; keep one"):
        parse_yaml(text, "'f.yaml'")


def test_equal_keys_of_different_mappings_and_of_different_types_are_no_repetition() -> None:
    assert parse_yaml("a: {x: 1}\nb: {x: 1}\nc: [{x: 1}, {x: 2}]\n1: d\n'1': e\n", "text") == {
        "a": {"x": 1}, "b": {"x": 1}, "c": [{"x": 1}, {"x": 2}], 1: "d", "1": "e",
    }  # fmt: skip
    assert parse_yaml("base: &b {x: 1}\nuse:\n  <<: *b\n  x: 2\n", "text")["use"] == {"x": 2}


@pytest.mark.parametrize("depth", [MAX_DEPTH + 2, 3_000, 100_000])
def test_deep_nesting_is_refused_in_one_line(depth: int) -> None:
    for text in ("[" * depth + "]" * depth, '{"a":' * depth + "1" + "}" * depth, "[" * depth):
        for parse in (parse_json, parse_yaml):
            with pytest.raises(FormatError, match=r"^'f' is (nested too deeply|not (JSON|YAML))") as error:
                parse(text, "'f'")
            assert "\n" not in str(error.value)
            assert len(str(error.value)) < 400


def test_what_is_a_hundred_deep_is_read() -> None:
    text = "[" * MAX_DEPTH + "]" * MAX_DEPTH
    assert parse_json(text, "text") == parse_yaml(text, "text")


def test_anchors_that_refer_to_themselves_or_multiply_are_refused() -> None:
    with pytest.raises(FormatError, match="the anchor 'a' refers to itself in line 2"):
        parse_yaml("a: &a\n  b: *a\n", "text")
    bomb = "a0: &a0 [1, 1]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))
    with pytest.raises(FormatError, match="aliases written out"):
        check_yaml(bomb, "text")
    assert parse_yaml("a: &a [1, 2]\nb: [*a, *a]\n", "text")["b"] == [[1, 2], [1, 2]]


@pytest.mark.parametrize(
    ("number", "read", "base"), [("010", 8, 8), ("-0_7", -7, 8), ("12:30", 750, 60), ("1:30.5", 90.5, 60)]
)
def test_numbers_that_yaml_reads_by_another_base_are_refused(number: str, read: float, base: int) -> None:
    message = (
        f"text: {number} in line 2 is {read} to YAML, which reads it by base {base}; write the number that is meant"
    )
    with pytest.raises(FormatError, match=message):
        parse_yaml(f"names:\n- {number}\n", "text")
    with pytest.raises(FormatError, match="by base"):
        parse_yaml(f"a:\n  {number}: 1", "text")
    assert parse_yaml(f"names: ['{number}', !!str {number}]", "text") == {"names": [number, number]}


def test_other_numbers_are_read_as_ever() -> None:
    text = "[0, -0, 10, 0x1f, 008, 0.5, 00.5, 1e3, 1.0e+3, 2026-11-28, 0:x, a:b]"
    assert parse_yaml(text, "text") == yaml.safe_load(text)


@pytest.mark.parametrize("text", ["a: [1", "a: !!python/name:os.system x", "a: 2001-99-99", "\x00", "a: &x 1\nb: *y"])
def test_what_is_no_yaml_is_said_in_one_line(text: str) -> None:
    with pytest.raises(FormatError, match=r"^text is not YAML: ") as error:
        parse_yaml(text, "text")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "{", '{"a": 1}}', "9" * 5_000, b"\xff", '"\x01"', "\x00"])
def test_what_is_no_json_is_said_in_one_line(text: str | bytes) -> None:
    with pytest.raises(FormatError, match=r"^text is not JSON: ") as error:
        parse_json(text, "text")
    assert "\n" not in str(error.value)


def test_only_regular_files_of_bounded_size_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large").write_bytes(b"x" * 11)
    (tmp_path / "latin").write_bytes("a\nb\né".encode("latin-1"))
    cases = {
        "pipe": "'.*pipe' is not a regular file",
        "": "'.*' cannot be read: Is a directory",
        "missing": "'.*missing' cannot be read: No such file or directory",
        "large": "'.*large' has more than 10 bytes",
        "latin": "'.*latin' is not UTF-8: byte 0xe9 in line 3",
        "n" * 300: "cannot be read: File name too long",
        "a\0b": "cannot be read: embedded null byte",
    }
    for name, message in cases.items():
        with pytest.raises(UserError, match=message):
            read_text(f"{tmp_path}/{name}", limit=10)
    with pytest.raises(UserError, match="'/dev/zero' is not a regular file"):
        read_text("/dev/zero", pipe=True)


def test_a_pipe_is_read_where_it_may_be_one() -> None:
    read_end, write_end = os.pipe()
    os.write(write_end, b"text")
    os.close(write_end)
    assert read_text(f"/dev/fd/{read_end}", pipe=True) == "text"
    os.close(read_end)
