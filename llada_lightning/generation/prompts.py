"""Prompts of every form to token ids, checked."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llada_lightning.checkpoints.language_model import LanguageModel
from llada_lightning.support.errors import UserError

Prompts = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]] | Tensor | np.ndarray[Any, Any]


def prompt_ids(
    lm: LanguageModel, prompts: Prompts, attention_mask: Tensor | None = None, infill: bool = False
) -> list[list[int]]:
    """The ids of each prompt, padding taken off.

    Args:
        lm: whose tokenizer reads text.
        prompts: a text, texts, ids of one prompt, ids of several, or a tensor (B, P).
        attention_mask: (B, P), 0 or False where a tensor of prompts is padded, on either side.
        infill: prompts hold [MASK]s; in a text its token, as the tokenizer spells it, stands for one masked token.

    Raises:
        UserError: an id is outside of the vocabulary, or [MASK] is where it must not be.
    """
    if infill and lm.causal:
        raise UserError(f"infill: '{lm.name}' is an arm, which cannot see what stands behind a gap; leave it out")
    if isinstance(prompts, np.ndarray):
        prompts = torch.from_numpy(prompts)
    if isinstance(prompts, Tensor):
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
    if lm.causal and not row and lm.start_token_id is None:
        raise UserError(
            f"prompt {number}: an empty one gives '{lm.name}' nothing to begin with; give at least one token"
        )
    if infill and not gaps:
        raise UserError(
            f"prompt {number}: holds no [MASK] (id {lm.mask_token_id}) to fill; put one for each missing token"
        )


def check_context(lm: LanguageModel, rows: list[list[int]], length: int) -> None:
    """Refuse what is longer than anything that the model was trained on.

    Raises:
        UserError: says which prompt, counted from 1, by how much it is too long, and what length is left.
    """
    for i, row in enumerate(rows, 1):
        room = lm.context_length - len(row)
        if length <= room:
            continue
        what = f"{len(row)} tokens"
        if length:
            what += f" and {length} of the answer are {len(row) + length},"
        else:
            what += " are"
        mend = f"shorten the prompt by {length - room} tokens"
        if length and room > 0:
            mend += f" or set length to at most {room}"
        raise UserError(f"prompt {i}: {what} more than the {lm.context_length} that '{lm.name}' was trained on; {mend}")


def as_batches(rows: list[Any], size: int | None) -> list[tuple[int, list[Any]]]:
    """Batches of at most ``size`` in order, each with the number of its first row."""
    if size is not None and (not isinstance(size, int) or size < 1):
        raise UserError(f"batch_size: {size} given; it must be a whole number of at least 1")
    size = size or len(rows)
    return [(first, rows[first : first + size]) for first in range(0, len(rows), size)]
