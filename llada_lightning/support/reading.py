"""Text, JSON and YAML files of users: bounded in size and depth, and without keys that appear twice.

The parsers of Python and of PyYAML keep the last of two equal keys in silence, follow anchors without bound, and stop
at deep nesting with an error of their own. Every file that a person edits, or a stranger sent, is read here instead.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Hashable
from typing import Any

import yaml

from llada_lightning.support.errors import UserError
from llada_lightning.support.printing import shortened

MAX_TEXT_BYTES = 1 << 28
"""Largest text file that is read as a whole; a tokenizer.json of a large vocabulary has some 2**25 bytes."""

MAX_YAML_BYTES = 1 << 24
"""Largest YAML text that is parsed."""

MAX_DEPTH = 100
"""Deepest nesting of JSON and YAML."""

MAX_YAML_NODES = 1_000_000
"""Most values of a YAML text, each alias counted as a copy of what it refers to."""


class FormatError(UserError):
    """A text that is not what it should be: not UTF-8, not JSON, not YAML, nested too deeply, or a key given twice."""


def read_text(path: str | os.PathLike[str], limit: int = MAX_TEXT_BYTES, *, pipe: bool = False) -> str:
    """Returns the text of a UTF-8 file, without its byte order mark if there is one.

    Args:
        path: Path of a regular file.
        limit: Largest number of bytes that is read.
        pipe: Whether the path may also be a pipe, as in ``--prompts-file <(command)``. A path that a program found may
            not: reading a pipe that nobody writes to never ends.

    Raises:
        UserError: The path is missing, is not a regular file, cannot be read, or is too large.
        FormatError: The bytes are not UTF-8.
    """
    shown = shortened(path)
    try:
        # O_NONBLOCK: opening a pipe without a writer returns at once, and is refused below.
        flags = os.O_RDONLY | os.O_CLOEXEC | (0 if pipe else os.O_NONBLOCK)
        with open(os.open(path, flags), "rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            if not (stat.S_ISREG(mode) or (pipe and stat.S_ISFIFO(mode))):
                raise UserError(f"'{shown}' is not a regular file; give a text file")
            content = file.read(limit + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the path
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"'{shown}' cannot be read: {reason}; check the path") from error
    if len(content) > limit:
        raise UserError(f"'{shown}' has more than {limit:,} bytes, the most that is read of such a file")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        message = f"'{shown}' is not UTF-8: byte 0x{content[error.start]:02x} in line {line}; save it as UTF-8"
        raise FormatError(message) from error


def read_json(path: str | os.PathLike[str]) -> Any:
    """Returns the value of a JSON file; see :func:`parse_json`.

    Raises:
        UserError: See :func:`read_text` and :func:`parse_json`.
    """
    return parse_json(read_text(path), f"'{shortened(path)}'")


def read_yaml(path: str | os.PathLike[str]) -> Any:
    """Returns the value of a YAML file; see :func:`parse_yaml`.

    Raises:
        UserError: See :func:`read_text` and :func:`parse_yaml`.
    """
    return parse_yaml(read_text(path, MAX_YAML_BYTES), f"'{shortened(path)}'")


# --- JSON ------------------------------------------------------------------------------------------------------------


def parse_json(text: str | bytes, source: str, first_line: int = 1) -> Any:
    """Returns the value of a JSON text.

    Args:
        text: The text, or its bytes in UTF-8; a byte order mark is left out.
        source: The name of the text, with quotes where it has some, for messages.
        first_line: Line number of the text's first line in its file, for messages.

    Raises:
        FormatError: The text is not JSON, a key appears twice in one object (both lines are named), it is nested more
            than MAX_DEPTH deep, or a number has too many digits.
    """
    try:
        text = text.decode("utf-8-sig") if isinstance(text, bytes) else text.removeprefix("\ufeff")
        value = json.loads(text, object_pairs_hook=_without_repetition)
    except _RepeatedKeyError as error:
        raise FormatError(f"{source}: {_repeated_json_key(text, first_line)}; keep one of them") from error
    except RecursionError as error:
        raise FormatError(f"{source} is nested too deeply; at most {MAX_DEPTH} levels are read") from error
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise FormatError(f"{source} is not JSON: {error.msg} in line {line}, column {error.colno}") from error
    except ValueError as error:  # not UTF-8, or a whole number with thousands of digits
        raise FormatError(f"{source} is not JSON: {shortened(error)}") from error
    # Looking at the characters is quick, and enough to spare nearly every text the search.
    if min(text.count("["), text.count("]")) + min(text.count("{"), text.count("}")) > MAX_DEPTH:
        _require_shallow(value, source)
    return value


class _RepeatedKeyError(Exception):
    pass


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise _RepeatedKeyError
    return found


_JSON_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\]:,]')


def _repeated_json_key(text: str | bytes, first_line: int) -> str:
    """Names the first key that appears twice in one object of a JSON text, and both lines."""
    assert isinstance(text, str)
    objects: list[dict[str, int] | None] = []  # lines of the keys of each open object; None: an array
    previous = ""
    for match in _JSON_TOKEN.finditer(text):
        token = match[0]
        if token in "{[":
            objects.append({} if token == "{" else None)
        elif token in "}]":
            objects.pop()
        elif token.startswith('"') and previous in ("{", ",") and objects and objects[-1] is not None:
            key, line = json.loads(token, strict=False), first_line + text.count("\n", 0, match.start())
            if key in objects[-1]:
                return _repetition(key, objects[-1][key], line)
            objects[-1][key] = line
        previous = token
    raise AssertionError("a repeated key was found before")


def _repetition(key: object, first: int, second: int) -> str:
    where = f"twice in line {first}" if first == second else f"in line {first} and again in line {second}"
    return f"the key '{shortened(key, 80)}' is given {where}"


def _require_shallow(value: Any, source: str) -> None:
    level = [value]  # the values at one depth
    for _ in range(MAX_DEPTH + 1):
        containers = [
            outer.values() if isinstance(outer, dict) else outer for outer in level if isinstance(outer, (dict, list))
        ]
        level = [inner for container in containers for inner in container]
        if not level:
            return
    raise FormatError(f"{source} is nested too deeply; at most {MAX_DEPTH} levels are read")


# --- YAML ------------------------------------------------------------------------------------------------------------


def parse_yaml(text: str, source: str) -> Any:
    """Returns the value of a YAML text, read by PyYAML's safe loader.

    Args:
        text: The text.
        source: The name of the text, with quotes where it has some, for messages.

    Raises:
        FormatError: The text is not YAML, or :func:`check_yaml` refuses it.
    """
    check_yaml(text, source)
    try:
        loader = _SafeLoader(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date or a number that is none
        raise _not_yaml(source, error) from error


_SafeLoader: type[yaml.SafeLoader] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_resolver = yaml.resolver.Resolver()


def check_yaml(text: str, source: str) -> None:
    """Refuses a YAML text that a parser would read wrongly in silence, or without bound.

    Args:
        text: The text.
        source: The name of the text, with quotes where it has some, for messages.

    Raises:
        FormatError: The text is not YAML; a key appears twice in one mapping (both lines are named); a number is one
            that YAML 1.1 reads by base 8 or 60, such as 010 and 12:30; it is nested more than MAX_DEPTH deep; an
            anchor refers to itself; or it is larger than MAX_YAML_BYTES or, with its aliases written out, has more
            than MAX_YAML_NODES values.
    """
    if len(text) > MAX_YAML_BYTES:
        raise FormatError(f"{source} has more than {MAX_YAML_BYTES:,} characters, the most that is read as YAML")
    try:
        _check_events(text, source)
    except (yaml.YAMLError, ValueError) as error:
        raise _not_yaml(source, error) from error


class _Open:
    """A collection of a YAML text whose end has not been read."""

    def __init__(self, anchor: str | None, is_mapping: bool) -> None:
        self.anchor = anchor
        self.keys: dict[Hashable, int] | None = {} if is_mapping else None  # key -> line
        self.children = 0
        self.nodes = 1

    @property
    def awaits_key(self) -> bool:
        return self.keys is not None and self.children % 2 == 0


def _check_events(text: str, source: str) -> None:
    """Walks through the events of a YAML text, which needs no recursion and builds nothing."""
    stack = [_Open(None, is_mapping=False)]
    nodes_of_anchor: dict[str, int] = {}
    for event in yaml.parse(text, Loader=_SafeLoader):
        if isinstance(event, yaml.CollectionStartEvent):
            stack.append(_Open(event.anchor, isinstance(event, yaml.MappingStartEvent)))
            if len(stack) > MAX_DEPTH + 1:
                raise FormatError(f"{source} is nested too deeply; at most {MAX_DEPTH} levels are read")
            continue
        if isinstance(event, yaml.CollectionEndEvent):
            closed = stack.pop()
            anchor, nodes = closed.anchor, closed.nodes
        elif isinstance(event, yaml.ScalarEvent):
            _note_key(stack[-1], event, source)
            _refuse_other_bases(event, source)
            anchor, nodes = event.anchor, 1
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor in {collection.anchor for collection in stack}:
                line = _line(event)
                raise FormatError(f"{source}: the anchor '{event.anchor}' refers to itself in line {line}")
            anchor, nodes = None, nodes_of_anchor.get(event.anchor or "", 1)
        else:
            continue
        if anchor is not None:
            nodes_of_anchor[anchor] = nodes
        stack[-1].children += 1
        stack[-1].nodes += nodes
        if stack[-1].nodes > MAX_YAML_NODES:
            raise FormatError(f"{source} has more than {MAX_YAML_NODES:,} values with its aliases written out")


def _note_key(parent: _Open, event: yaml.ScalarEvent, source: str) -> None:
    if not parent.awaits_key:
        return
    assert parent.keys is not None
    tag = event.tag or _resolver.resolve(yaml.ScalarNode, event.value, event.implicit)
    key, line = (tag, event.value), _line(event)
    if key in parent.keys:
        raise FormatError(f"{source}: {_repetition(event.value, parent.keys[key], line)}; keep one of them")
    parent.keys[key] = line


_OTHER_BASES = re.compile(r"[-+]?(0[0-7_]+|[1-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?)")
"""Whole numbers with a leading zero, and numbers with colons: YAML 1.1 reads them by base 8 and by base 60."""


def _refuse_other_bases(event: yaml.ScalarEvent, source: str) -> None:
    if event.tag is None and event.implicit[0] and _OTHER_BASES.fullmatch(event.value):
        base = 60 if ":" in event.value else 8
        raise FormatError(
            f"{source}: {event.value} in line {_line(event)} is {_SafeLoader(event.value).get_single_data()} to YAML, "
            f"which reads it by base {base}; write the number that is meant, or the text in quotes"
        )


def _line(event: yaml.Event) -> int:
    assert event.start_mark is not None
    return int(event.start_mark.line) + 1


def _not_yaml(source: str, error: Exception) -> FormatError:
    return FormatError(f"{source} is not YAML: {shortened(error)}")
