"""Prompts of a command line: from options, a file, or what is piped in."""

from __future__ import annotations

import os
import re
import stat
import sys
from collections.abc import Sequence

from llada_lightning.data.text_files import REFUSED_BESIDE_PROMPTS, UnreadFields
from llada_lightning.support.errors import UserError
from llada_lightning.support.files import expanded
from llada_lightning.support.printing import shortened
from llada_lightning.support.reading import MAX_TEXT_BYTES, parse_json, read_text

STDIN = "-"

Prompt = str | list[int]

_GAP = re.compile(r"\[MASK(?::(\d+))?\]")
_MOST_IN_A_GAP = 1 << 20


def given_prompts(texts: Sequence[str], file: str | None) -> list[Prompt]:
    """The prompts in the order of options, then file; what is piped in where neither is given; else none.

    Args:
        texts: of ``--prompt``; `-` stands for what comes on stdin.
        file: of ``--prompts-file``.

    Raises:
        UserError: the file is missing, empty, or not of its kind; a text is not UTF-8.
    """
    prompts: list[Prompt] = [_from_stdin() if text == STDIN else text for text in texts]
    if file is not None:
        prompts += read_prompts(file)
    if not prompts and _piped():
        prompts = [_from_stdin()]
    for prompt in prompts:
        if isinstance(prompt, str):
            check_text(prompt)
    return prompts


def check_text(text: str) -> None:
    """Raises UserError where a text holds bytes that are no characters: Python keeps such as halves of pairs."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"prompt: character {error.start + 1} is not UTF-8; convert the text") from error


def _from_stdin() -> str:
    if sys.stdin is None:
        raise UserError("prompt: stdin is closed; pipe a text in, or give --prompt TEXT")
    try:
        text = sys.stdin.read(MAX_TEXT_BYTES + 1)
    except UnicodeDecodeError as error:
        raise UserError(f"prompt: what comes on stdin is not UTF-8 ({error.reason}); convert it") from error
    except OSError as error:
        raise UserError(f"prompt: stdin cannot be read ({error.strerror or error}); pipe a text in") from error
    if len(text) > MAX_TEXT_BYTES:
        raise UserError(f"prompt: stdin has more than {MAX_TEXT_BYTES:,} characters; pipe a shorter text in")
    return text.removeprefix("\ufeff").removesuffix("\n")  # the byte order mark, and the line end of echo


def _piped() -> bool:
    """Whether stdin is a pipe or a file: a socket or a null device, as under schedulers, holds no prompt."""
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (AttributeError, OSError, ValueError):  # none, closed, or not of the system
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode)


def read_prompts(file: str) -> list[Prompt]:
    """The prompts of a `.txt`, one a line, or of a `.jsonl`, each line's `prompt`: a text, or a list of token ids.

    Raises:
        UserError: the file is missing, empty, or not of its kind; says which line.
    """
    path = expanded(file)
    if path.suffix not in (".txt", ".jsonl"):
        raise UserError(f"prompts file '{file}': its ending is neither .txt nor .jsonl; give one of them")
    # A prompt may hold the other ends of lines of Unicode.
    lines = [line.removesuffix("\r") for line in read_text(path, pipe=True).split("\n")]
    shown = f"prompts file '{shortened(file)}'"
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise UserError(f"{shown} holds no prompt; write one a line")
    if path.suffix == ".txt":
        return [line for _, line in numbered]
    unread = UnreadFields()
    prompts = [_json_prompt(line, number, f"{shown}, line {number}", unread) for number, line in numbered]
    unread.note(shown)
    return prompts


def _json_prompt(line: str, number: int, where: str, unread: UnreadFields) -> Prompt:
    record = parse_json(line, where, number)
    fields = record if isinstance(record, dict) else {}
    unread.add_row(fields, ("prompt",), where, REFUSED_BESIDE_PROMPTS)
    prompt = fields.get("prompt")
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, list) and all(isinstance(token, int) and not isinstance(token, bool) for token in prompt):
        return prompt
    raise UserError(f'{where}: "prompt" is neither a text nor a list of token ids; write {{"prompt": "…"}}')


def holds_gap(text: str) -> bool:
    """Whether a text has a gap as :func:`with_gaps` knows it."""
    return _GAP.search(text) is not None


def with_gaps(text: str, mask_token: str) -> str:
    """The text with each `[MASK:12]` as 12 times the mask token, and `[MASK]` as one.

    Raises:
        UserError: a gap of no token, or of more than any model takes.
    """

    def gap(found: re.Match[str]) -> str:
        count = int(found[1] or 1)
        if not 0 < count <= _MOST_IN_A_GAP:
            raise UserError(f"prompt: the gap {found[0]} has {count} tokens; give from 1 to {_MOST_IN_A_GAP}")
        return mask_token * count

    return _GAP.sub(gap, text)
