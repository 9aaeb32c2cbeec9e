"""Prompts of a command line: from options, a file, or what is piped in."""

from __future__ import annotations

import json
import os
import re
import stat
import sys
from collections.abc import Sequence
from pathlib import Path

from llada_lightning.errors import UserError

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
    try:
        text = sys.stdin.read()
    except UnicodeDecodeError as error:
        raise UserError(f"prompt: what comes on stdin is not UTF-8 ({error.reason}); convert it") from error
    return text.removesuffix("\n")  # of echo


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
    path = Path(file).expanduser()
    if path.suffix not in (".txt", ".jsonl"):
        raise UserError(f"prompts file '{file}': its ending is neither .txt nor .jsonl; give one of them")
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # a prompt may hold the other ends of lines of Unicode
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise UserError(f"prompts file '{file}' cannot be read ({reason}); give a text file") from error
    lines = [line.removesuffix("\r") for line in lines]
    read = _text_prompt if path.suffix == ".txt" else _json_prompt
    prompts = [read(line, f"prompts file '{file}', line {n}") for n, line in enumerate(lines, 1) if line.strip()]
    if not prompts:
        raise UserError(f"prompts file '{file}' holds no prompt; write one a line")
    return prompts


def _text_prompt(line: str, _: str) -> Prompt:
    return line


def _json_prompt(line: str, where: str) -> Prompt:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise UserError(f'{where} is not JSON ({error}); write {{"prompt": "…"}}') from error
    prompt = record.get("prompt") if isinstance(record, dict) else None
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
