"""The file of `llada score --pairs`: a JSON object a line, a continuation or a choice of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llada_lightning.checkpoints.language_model import LanguageModel
from llada_lightning.errors import UserError
from llada_lightning.evaluation.requests import Truncation, check_question

Written = str | list[int]


@dataclass(frozen=True)
class Pair:
    """A prompt and what may follow it.

    Args:
        prompt: ids, cut where it was too long.
        continuations: ids; one, or each of the choices.
        written_bytes: UTF-8 bytes of each continuation as it was written, by which lm-evaluation-harness compares
            choices; None where it was written as ids and there is no tokenizer.
        scored_bytes: of each continuation with the white space that moved to it, as its ids say; None likewise.
        is_choice: whether the line had choices.
        answer: index of the right choice, where the line has it.
        truncated: tokens cut from the prompt's left.
        lost_bytes: those of ``scored_bytes``, of all continuations together, that the ids do not give back.
    """

    prompt: list[int]
    continuations: list[list[int]]
    written_bytes: list[int] | None
    scored_bytes: list[int] | None
    is_choice: bool
    answer: int | None
    truncated: int = 0
    lost_bytes: int = 0


def read_pairs(path: Path, lm: LanguageModel, truncate: Truncation | None = None) -> list[Pair]:
    """Reads and encodes every line.

    A line is ``{"prompt": P, "continuation": C}`` or ``{"prompt": P, "choices": [C, …], "answer": i}`` (the answer may
    be left out), where P and C are texts or lists of token ids. Text is encoded prompt and continuation apart, white
    space at the prompt's end moved to the continuation's beginning as lm-evaluation-harness does: tokenizers bind a
    space to the word behind it. Empty lines are passed over.

    Raises:
        UserError: the file cannot be read or is empty; a line, named by its number, is no such object, mixes the two
            forms, or does not fit the model.
    """
    pairs: list[Pair] = []
    for where, line in _lines(path):
        pair = _pair(_record(line, where), lm, where)
        if pairs and pair.is_choice != pairs[0].is_choice:
            raise UserError(f"{where}: choices and continuations in one file; give a file of each")
        cut = check_question(lm, pair.prompt, pair.continuations, truncate, [where] * len(pair.continuations))[0]
        pairs.append(replace(pair, prompt=list(cut.prompt), truncated=cut.truncated))
    if not pairs:
        raise UserError(f"{path}: holds no line; write one JSON object a line")
    return pairs


def encode_pair(lm: LanguageModel, prompt: Written, continuation: Written) -> tuple[list[int], list[int]]:
    """Ids of a prompt and of a continuation; white space at the end of a text prompt moves to a text continuation."""
    prompt, continuation = _moved(prompt, continuation)
    prompt_ids = lm.encode_prompt(prompt) if isinstance(prompt, str) else prompt
    return prompt_ids, lm.encode(continuation) if isinstance(continuation, str) else continuation


def _moved(prompt: Written, continuation: Written) -> tuple[Written, Written]:
    if not (isinstance(prompt, str) and isinstance(continuation, str)):
        return prompt, continuation
    kept = prompt.rstrip()
    return kept, prompt[len(kept) :] + continuation


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"pairs '{path}' cannot be read ({error.strerror}); give a JSONL file") from error
    except UnicodeDecodeError as error:
        raise UserError(f"pairs '{path}' is not UTF-8 text ({error.reason}); give a JSONL file") from error
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield f"{path}:{number}", line


def _record(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: is not a line of JSON ({error}); write one object a line") from error
    if not isinstance(record, dict):
        raise UserError(f"{where}: holds {type(record).__name__}, not a JSON object; write one object a line")
    if "prompt" not in record or ("continuation" in record) == ("choices" in record):
        keys = ", ".join(map(repr, record)) or "nothing"
        raise UserError(f"{where}: has {keys}; a line has 'prompt' and either 'continuation' or 'choices'")
    return record


def _pair(record: dict[str, Any], lm: LanguageModel, where: str) -> Pair:
    is_choice = "choices" in record
    written = record["choices"] if is_choice else [record["continuation"]]
    if not isinstance(written, list) or not written:
        raise UserError(f"{where}: 'choices' is {str(written)[:40]!r}; give a list of at least one")
    prompt, values = _written(record["prompt"], f"{where}: 'prompt'"), [_written(value, where) for value in written]
    answer = record.get("answer") if is_choice else None
    right = type(answer) is int and 0 <= answer < len(written)
    if answer is not None and not right:
        raise UserError(f"{where}: 'answer' is {answer!r}; give the index of a choice, 0 to {len(written) - 1}")
    encoded = [encode_pair(lm, prompt, value) for value in values]
    if any(ids != encoded[0][0] for ids, _ in encoded):
        raise UserError(
            f"{where}: choices of both texts and ids behind a prompt that ends in white space; write all alike"
        )
    written_bytes = _sizes(lm, values)
    scored = [_moved(prompt, value)[1] for value in values]
    lost_bytes = sum(lm.lost_bytes(value) for value in scored if isinstance(value, str))
    ids = [ids for _, ids in encoded]
    return Pair(encoded[0][0], ids, written_bytes, _sizes(lm, scored), is_choice, answer, lost_bytes=lost_bytes)


def _sizes(lm: LanguageModel, values: list[Written]) -> list[int] | None:
    """UTF-8 bytes of each; None where ids cannot be decoded."""
    if lm.tokenizer is None and not all(isinstance(value, str) for value in values):
        return None
    return [len((value if isinstance(value, str) else lm.decode(value)).encode()) for value in values]


def _written(value: Any, where: str) -> Written:
    """A text or a list of ids."""
    ids = isinstance(value, list) and all(type(token) is int for token in value)
    if not ids and not isinstance(value, str):
        raise UserError(f"{where}: {str(value)[:40]!r} is neither a text nor a list of token ids; give one of them")
    if isinstance(value, str) and any("\ud800" <= letter <= "\udfff" for letter in value):
        raise UserError(
            f"{where}: {value[:40]!r} holds half of a surrogate pair, which is no character; write both halves"
        )
    return value
