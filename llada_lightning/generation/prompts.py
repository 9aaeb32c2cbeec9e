"""Prompts of every form, from Python, from a command line and of a conversation, to token ids, checked."""

from __future__ import annotations

import os
import re
import stat
import sys
from collections.abc import Iterable, Sequence
from itertools import count
from numbers import Integral
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from llada_lightning.data.text_files import REFUSED_BESIDE_PROMPTS, UnreadFields
from llada_lightning.generation.sampling import only_left_to_right
from llada_lightning.support.errors import UserError
from llada_lightning.support.files import expanded
from llada_lightning.support.printing import shortened
from llada_lightning.support.reading import MAX_TEXT_BYTES, parse_json, read_text

if TYPE_CHECKING:  # commands read prompts before they load torch
    from torch import Tensor

    from llada_lightning.checkpoints.language_model import LanguageModel
    from llada_lightning.data.chat import Message

Prompts: TypeAlias = "str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]] | Tensor | np.ndarray[Any, Any]"

Prompt = str | list[int]

_GAP = re.compile(r"\[MASK(?::(\d+))?\]")
_MOST_IN_A_GAP = 1 << 20

# --- from Python ------------------------------------------------------------------------------------------------------


def prompt_ids(
    lm: LanguageModel, prompts: Prompts, attention_mask: Tensor | None = None, infill: bool = False
) -> list[list[int]]:
    """The ids of each prompt, padding taken off.

    Args:
        lm: The model, whose tokenizer reads text.
        prompts: A text, several texts, the ids of one prompt or of several, or a tensor (B, P).
        attention_mask: (B, P), 0 or False where a tensor of prompts is padded, on either side.
        infill: Whether prompts hold [MASK]s. In a text, the token as the tokenizer spells it is one masked token.

    Raises:
        UserError: An id is outside of the vocabulary, or [MASK] is where it must not be.
    """
    if infill and not lm.facts.masks:
        why = "cannot see what stands behind a gap" if only_left_to_right(lm) else "has no [MASK] to fill"
        raise UserError(f"infill: '{lm.name}' is an {lm.objective}, which {why}; leave it out")
    import torch

    if isinstance(prompts, np.ndarray):
        prompts = torch.from_numpy(prompts)
    if isinstance(prompts, torch.Tensor):
        rows = _rows(prompts, attention_mask)
    elif attention_mask is not None:
        raise UserError("attention_mask: given with prompts that are no tensor; lists of ids need none")
    elif isinstance(prompts, str):
        rows = [_encode(lm, prompts, infill)]
    elif len(prompts) and all(isinstance(prompt, Integral) for prompt in prompts):
        rows = [_ids(prompts, 0)]
    else:
        rows = [_encode(lm, p, infill) if isinstance(p, str) else _ids(p, i) for i, p in enumerate(prompts)]
    if not rows:
        raise UserError("prompts: none given; give at least one")
    for number, row in enumerate(rows, 1):
        _check(lm, row, number, infill)
    return rows


def _ids(prompt: Any, i: int) -> list[int]:
    ids: list[Any] = list(prompt) if isinstance(prompt, Iterable) else [None]
    if not all(isinstance(token, Integral) for token in ids):
        raise UserError(f"prompt {i + 1}: {str(prompt)[:60]} given; a prompt is a text or a list of token ids")
    return [int(token) for token in ids]


def _rows(prompts_BP: Tensor, attention_mask: Tensor | None) -> list[list[int]]:
    if prompts_BP.ndim == 1:
        prompts_BP = prompts_BP[None]
        attention_mask = None if attention_mask is None else attention_mask[None]
    if prompts_BP.ndim != 2 or prompts_BP.is_floating_point():
        raise UserError(
            f"prompts: a tensor of shape {tuple(prompts_BP.shape)} and type {prompts_BP.dtype} given; it must hold "
            "whole numbers, a row for each prompt"
        )
    if attention_mask is None:
        return [list(map(int, row)) for row in prompts_BP.tolist()]
    if attention_mask.shape != prompts_BP.shape:
        raise UserError(
            f"attention_mask: shape {tuple(attention_mask.shape)} given for prompts of shape {tuple(prompts_BP.shape)}"
        )
    present_BP = attention_mask.bool()
    for i, present in enumerate(present_BP):
        places = present.nonzero()[:, 0].tolist()
        if places and len(places) != places[-1] - places[0] + 1:
            raise UserError(f"attention_mask: row {i + 1} has a hole; padding stands on one side or both of a prompt")
    return [row[keep].tolist() for row, keep in zip(prompts_BP, present_BP, strict=True)]


def _encode(lm: LanguageModel, text: str, infill: bool) -> list[int]:
    if not infill:
        return lm.encode_prompt(text)
    if lm.mask_token_id is None or lm.tokenizer is None:
        return lm.encode(text)  # which says what is missing
    mask_token = lm.tokenizer.id_to_token(lm.mask_token_id)
    if mask_token is None:
        raise UserError(f"infill: the tokenizer of '{lm.name}' has no token {lm.mask_token_id}, [MASK]; give token ids")
    # Text never becomes a special token: a gap is put between the pieces.
    first, *others = text.split(mask_token)
    ids = lm.encode_prompt(first)
    for piece in others:
        ids += [lm.mask_token_id, *lm.encode_within(piece)]
    return ids


def _check(lm: LanguageModel, row: list[int], number: int, infill: bool) -> None:
    outside = next((token for token in row if not 0 <= token < lm.model.vocab_size), None)
    if outside is not None:
        raise UserError(f"prompt {number}: token {outside} is outside of the vocabulary of {lm.model.vocab_size}")
    gaps = row.count(lm.mask_token_id) if lm.mask_token_id is not None else 0
    if gaps and not infill:
        raise UserError(
            f"prompt {number}: holds [MASK] (id {lm.mask_token_id}) {gaps} times; fill such gaps with infill, or take "
            "it out"
        )
    from_before = only_left_to_right(lm) or lm.shift_targets
    if from_before and lm.start_token_id is None and (not row or row[0] == lm.mask_token_id):
        if row:
            raise UserError(
                f"prompt {number}: begins with a gap, and '{lm.name}' predicts a token from the one before it; give at "
                "least one token before the gap"
            )
        raise UserError(
            f"prompt {number}: an empty one gives '{lm.name}' nothing to begin with; give at least one token"
        )
    if infill and not gaps:
        raise UserError(
            f"prompt {number}: holds no [MASK] (id {lm.mask_token_id}) to fill; put one for each missing token"
        )


def check_context(lm: LanguageModel, rows: list[list[int]], length: int) -> None:
    """Refuse a prompt that is longer, with its answer, than anything that the model was trained on."""
    for i, row in enumerate(rows, 1):
        room = lm.context_length - len(row)
        if length > room:
            answer = f" and {length} of the answer are {len(row) + length}," if length else " are"
            shorter = f" or set length to at most {room}" if length and room > 0 else ""
            raise UserError(
                f"prompt {i}: {len(row)} tokens{answer} more than the {lm.context_length} that '{lm.name}' was trained "
                f"on; shorten the prompt by {length - room} tokens{shorter}"
            )


# --- from a command line ----------------------------------------------------------------------------------------------


def given_prompts(texts: Sequence[str], file: str | None) -> list[Prompt]:
    """The prompts of `--prompt` (`-`: stdin), then of `--prompts-file`; without either what is piped in; else none."""
    prompts: list[Prompt] = [_from_stdin() if text == "-" else text for text in texts]
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
    """The prompts of a `.txt`, one a line, or of a `.jsonl`, each line's `prompt`: a text, or a list of token ids."""
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
    prompts: list[Prompt] = []
    unread = UnreadFields()
    for number, line in numbered:
        where = f"{shown}, line {number}"
        record = parse_json(line, where, number)
        fields = record if isinstance(record, dict) else {}
        unread.add_row(fields, ("prompt",), where, REFUSED_BESIDE_PROMPTS)
        prompt: Any = fields.get("prompt")
        is_ids = isinstance(prompt, list) and all(type(token) is int for token in prompt)
        if not is_ids and not isinstance(prompt, str):
            raise UserError(f'{where}: "prompt" is neither a text nor a list of token ids; write {{"prompt": "…"}}')
        prompts.append(prompt)
    unread.note(shown)
    return prompts


def holds_gap(text: str) -> bool:
    """Whether a text has a gap as :func:`with_gaps` knows it."""
    return _GAP.search(text) is not None


def with_gaps(text: str, mask_token: str) -> str:
    """The text with each `[MASK:12]` as 12 times the mask token, and `[MASK]` as one."""

    def gap(found: re.Match[str]) -> str:
        tokens = int(found[1] or 1)
        if not 0 < tokens <= _MOST_IN_A_GAP:
            raise UserError(f"prompt: the gap {found[0]} has {tokens} tokens; give from 1 to {_MOST_IN_A_GAP}")
        return mask_token * tokens

    return _GAP.sub(gap, text)


# --- of a conversation ------------------------------------------------------------------------------------------------


def conversation_ids(lm: LanguageModel, messages: Sequence[Message]) -> list[int]:
    """The prompt that asks for the next answer; without a chat template the messages are joined by new lines."""
    if lm.dialogue is None:
        return lm.encode_prompt("".join(f"{message.content}\n" for message in messages))
    return lm.dialogue.ids(messages)


def fitting_ids(lm: LanguageModel, messages: Sequence[Message], length: int) -> tuple[list[int], int]:
    """The prompt of the newest turns that leave room for an answer of ``length`` tokens, and how many were left out.

    A turn is a question and its answer. The system's message and the last question stay, also where they do not fit:
    the sampler refuses these.
    """
    system = [message for message in messages if message.role == "system"]
    said = [message for message in messages if message.role != "system"]
    for left_out in count():
        ids = conversation_ids(lm, system + said[2 * left_out :])
        if len(ids) + length <= lm.context_length or len(said) <= 2 * (left_out + 1):
            break
    return ids, left_out
