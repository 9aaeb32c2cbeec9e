"""Where an answer ends."""

from __future__ import annotations

import torch
from torch import Tensor

from llada_lightning.checkpoints.language_model import LanguageModel
from llada_lightning.generation.canvas import Canvas
from llada_lightning.generation.result import Finish


def holds_stop(lm: LanguageModel, canvas: Canvas, stop: tuple[str, ...]) -> Tensor:
    """(B,) bool: the text of an answer, up to what is still masked, holds a stop string."""
    whole_BA = canvas.masked_BL[:, canvas.answer :].cumsum(dim=1) == 0
    answers = [
        lm.decode(row[whole].tolist())
        for row, whole in zip(canvas.tokens_BL[:, canvas.answer :], whole_BA, strict=True)
    ]
    return torch.tensor([any(text in answer for text in stop) for answer in answers], device=lm.device)


def cut(lm: LanguageModel, tokens: list[int], stop: tuple[str, ...]) -> tuple[int, Finish]:
    """How many tokens of an answer count, and what ended it: its first end token or stop string, both included."""
    ends = [i for i, token in enumerate(tokens) if token in lm.end_token_ids]
    count, finish = (ends[0] + 1, "eos") if ends else (len(tokens), "length")
    if any(text in lm.decode(tokens[:count]) for text in stop):
        count = next(i for i in range(count + 1) if any(text in lm.decode(tokens[:i]) for text in stop))
        return count, "stop"
    return count, finish  # type: ignore[return-value]


def text_before(text: str, stop: tuple[str, ...]) -> str:
    """A text without its first stop string and what follows."""
    found = [place for place in (text.find(string) for string in stop) if place >= 0]
    return text[: min(found)] if found else text
