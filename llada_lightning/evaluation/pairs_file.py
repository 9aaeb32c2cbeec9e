"""The file of `llada score --pairs`: a JSON object a line, a continuation or a choice of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llada_lightning.checkpoints.language_model import LanguageModel
from llada_lightning.data.text_files import REFUSED_BESIDE_PROMPTS, UnreadFields, some
from llada_lightning.evaluation.requests import Truncation, Written, check_question, encode_pair, moved_space
from llada_lightning.support.errors import UserError
from llada_lightning.support.printing import shortened
from llada_lightning.support.reading import parse_json, read_text

_KNOWN = ("prompt", "continuation", "choices", "answer")


@dataclass(frozen=True)
class Pair:
    """A prompt and what may follow it.

    Args:
        prompt: The token ids of the prompt, cut where it was too long.
        continuations: The token ids of the one continuation, or of each of the choices.
        written_bytes: The number of UTF-8 bytes of each continuation as it was written, by which lm-evaluation-harness
            compares choices; None where it was written as ids and there is no tokenizer.
        scored_bytes: The number of UTF-8 bytes of the ids of each continuation, with the white space that moved to it;
            None likewise.
        is_choice: Whether the line had choices.
        answer: The index of the right choice, where the line has it.
        truncated: The number of tokens cut from the prompt's left.
        lost_bytes: The number of ``scored_bytes``, of all continuations together, that the ids do not give back.
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
    be left out), where P and C are texts or lists of token ids, encoded by :func:`requests.encode_pair`. Empty lines
    are passed over. A note names what else the lines hold.

    Raises:
        UserError: the file cannot be read or is empty; a line, named by its number, is no such object, has a field that
            would change its meaning or an empty continuation, mixes the two forms, or does not fit the model.
    """
    pairs: list[Pair] = []
    unread = UnreadFields()
    for where, record in _lines(path):
        pair = _pair(record, lm, where)
        unread.add_row(record, _KNOWN, where, REFUSED_BESIDE_PROMPTS)
        if pairs and pair.is_choice != pairs[0].is_choice:
            raise UserError(f"{where}: choices and continuations in one file; give a file of each")
        cut = check_question(lm, pair.prompt, pair.continuations, truncate, [where] * len(pair.continuations))[0]
        pairs.append(replace(pair, prompt=list(cut.prompt), truncated=cut.truncated))
    if not pairs:
        raise UserError(f"{path}: holds no line; write one JSON object a line")
    unread.note(str(path))
    return pairs


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(read_text(path).split("\n"), 1):
        where = f"{path}:{number}"
        if line.strip():
            yield where, _record(parse_json(line, where, number), where)


def _record(record: Any, where: str) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise UserError(f"{where}: holds {type(record).__name__}, not a JSON object; write one object a line")
    if "prompt" not in record or ("continuation" in record) == ("choices" in record):
        keys = some(f"'{shortened(name, 60)}'" for name in record) or "nothing"
        raise UserError(f"{where}: has {keys}; a line has 'prompt' and either 'continuation' or 'choices'")
    return record


def _pair(record: dict[str, Any], lm: LanguageModel, where: str) -> Pair:
    is_choice = "choices" in record
    written = record["choices"] if is_choice else [record["continuation"]]
    if not isinstance(written, list) or not written:
        raise UserError(f"{where}: 'choices' is {str(written)[:40]!r}; give a list of at least one")
    prompt = _written(record["prompt"], lm, f"{where}: 'prompt'")
    values = [_written(value, lm, where) for value in written]
    if not is_choice and record.get("answer") is not None:
        raise UserError(f"{where}: has 'answer' beside 'continuation'; it is of 'choices' alone, remove it")
    answer = record.get("answer")
    right = type(answer) is int and 0 <= answer < len(written)
    if answer is not None and not right:
        raise UserError(
            f"{where}: 'answer' is {shortened(repr(answer), 40)}; give the index of a choice, 0 to {len(written) - 1}"
        )
    of_choice = [f"{where}, choice {k}" if is_choice else where for k in range(len(values))]
    encoded = [encode_pair(lm, prompt, value, name) for value, name in zip(values, of_choice, strict=True)]
    if any(ids != encoded[0][0] for ids, _ in encoded):
        raise UserError(
            f"{where}: choices of both texts and ids behind a prompt that ends in white space; write all alike"
        )
    written_bytes = _sizes(lm, values)
    scored = [_scored(prompt, value) for value in values]
    lost_bytes = sum(lm.lost_bytes(value) for value in scored if isinstance(value, str))
    ids = [ids for _, ids in encoded]
    return Pair(encoded[0][0], ids, written_bytes, _sizes(lm, scored), is_choice, answer, lost_bytes=lost_bytes)


def _scored(prompt: Written, value: Written) -> Written:
    """A continuation with the white space that moves to it."""
    return moved_space(prompt, value)[1] if isinstance(prompt, str) and isinstance(value, str) else value


def _sizes(lm: LanguageModel, values: list[Written]) -> list[int] | None:
    """UTF-8 bytes of each; None where ids cannot be decoded."""
    if lm.tokenizer is None and not all(isinstance(value, str) for value in values):
        return None
    return [len((value if isinstance(value, str) else lm.decode(value)).encode()) for value in values]


def _written(value: Any, lm: LanguageModel, where: str) -> Written:
    """A text or a list of ids of the vocabulary."""
    ids = isinstance(value, list) and all(type(token) is int for token in value)
    if not ids and not isinstance(value, str):
        raise UserError(f"{where}: {str(value)[:40]!r} is neither a text nor a list of token ids; give one of them")
    outside = next((token for token in value if ids and not 0 <= token < lm.model.vocab_size), None)
    if outside is not None:
        raise UserError(
            f"{where}: id {shortened(outside, 40)} is outside of the vocabulary of {lm.model.vocab_size}; is it "
            "another model's tokenizer?"
        )
    if isinstance(value, str) and any("\ud800" <= letter <= "\udfff" for letter in value):
        raise UserError(
            f"{where}: {value[:40]!r} holds half of a surrogate pair, which is no character; write both halves"
        )
    return value
