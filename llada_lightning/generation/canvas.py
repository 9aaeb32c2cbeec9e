"""The tokens of a batch while they are denoised, and what the host asks about them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from llada_lightning.generation.sampling import Snapshot

if TYPE_CHECKING:
    from llada_lightning.checkpoints.language_model import LanguageModel

STILL_MASKED = -1

STEPS_LATE = {"cuda": 1}
"""By how many steps the host learns later than the device which answers have ended. So the device need not wait."""


class Places(NamedTuple):
    """M positions of a canvas, row by row.

    Args:
        rows: The row of each, on the host.
        rows_M, columns_M: (M,) int64, the row and the column of each.
    """

    rows: list[int]
    rows_M: Tensor
    columns_M: Tensor

    def part(self, begin: int, end: int) -> Places:
        """Those from ``begin`` to before ``end``."""
        return Places(self.rows[begin:end], self.rows_M[begin:end], self.columns_M[begin:end])


@dataclass
class Canvas:
    """A batch of sequences of L columns. Prompts end at the same column: what is missing is padded on the left.

    What is masked is carried here and never read off the tokens.

    Args:
        tokens_BL: (B, L) int64, the tokens.
        masked_BL: (B, L) bool, whether a position is still to be predicted.
        given_BL: (B, L) bool, whether a position is a prompt's, which classifier-free guidance masks.
        padding_B: (B,) int64, the columns of padding before each sequence.
        step_BL: (B, L) int64, the step at which each token appeared; 0 where given, -1 where still masked.
        confidence_BL: (B, L) float32, the probability of each token when it appeared.
        answer: The first column of the answers.
        started: The number of tokens before each text with gaps that are no part of it.
    """

    tokens_BL: Tensor
    masked_BL: Tensor
    given_BL: Tensor
    padding_B: Tensor
    step_BL: Tensor
    confidence_BL: Tensor
    answer: int
    started: int = 0

    @classmethod
    def of(
        cls, rows: list[list[int]], length: int | None, mask_token_id: int, device: torch.device, started: int = 0
    ) -> Canvas:
        """Prompts, and behind each of them ``length`` masked tokens.

        Without a length the rows are texts with gaps: their [MASK]s are masked, and all of each is its answer. The
        first ``started`` tokens of each row are the model's own, which guidance leaves.
        """
        longest, more = max(map(len, rows)), length or 0
        padded = [[mask_token_id] * (longest - len(row)) + row + [mask_token_id] * more for row in rows]
        tokens_BL = torch.tensor(padded, dtype=torch.int64).view(len(rows), longest + more).to(device)
        padding_B = torch.tensor([longest - len(row) for row in rows], device=device)
        columns_L = torch.arange(longest + more, device=device)
        if length is None:
            masked_BL = (tokens_BL == mask_token_id) & (columns_L >= padding_B[:, None])
        else:
            masked_BL = (columns_L >= longest).repeat(len(rows), 1)
        own_BL = (columns_L >= padding_B[:, None]) & (columns_L < padding_B[:, None] + started)
        return cls(
            tokens_BL=tokens_BL,
            masked_BL=masked_BL,
            given_BL=~masked_BL & ~own_BL,
            padding_B=padding_B,
            step_BL=masked_BL * STILL_MASKED,
            confidence_BL=torch.ones_like(tokens_BL, dtype=torch.float32),
            answer=0 if length is None else longest,
            started=started,
        )

    @property
    def length(self) -> int:
        return self.tokens_BL.shape[1]

    @property
    def attention_mask(self) -> Tensor | None:
        """(B, L) bool, False at the padding; None where there is none."""
        if not bool(self.padding_B.any()):
            return None
        return torch.arange(self.length, device=self.tokens_BL.device) >= self.padding_B[:, None]

    @property
    def starts(self) -> list[int]:
        """The first column of each answer."""
        return [max(self.answer, padding + self.started) for padding in self.padding_B.tolist()]

    @property
    def positions(self) -> Tensor | None:
        """(B, L) int64, positions in the unpadded sequence; None where they are the columns."""
        if not bool(self.padding_B.any()):
            return None
        columns_L = torch.arange(self.length, device=self.tokens_BL.device)
        return (columns_L - self.padding_B[:, None]).clamp(min=0)

    def reveal(self, places: Places, kept_M: Tensor, tokens_M: Tensor, confidence_M: Tensor, step_M: Tensor) -> None:
        """Unmask those of M tokens that are kept, (M,) bool."""
        at = places.rows_M, places.columns_M
        for all_BL, new_M in (
            (self.tokens_BL, tokens_M),
            (self.confidence_BL, confidence_M),
            (self.step_BL, step_M),
            (self.masked_BL, torch.zeros_like(kept_M)),
        ):
            all_BL[at] = new_M.where(kept_M, all_BL[at])

    def ended(self, end_token_ids: Sequence[int]) -> Tensor:
        """(B,) bool: whether an answer holds a token that ends it, and nothing before that is still masked."""
        masked_BA = self.masked_BL[:, self.answer :]
        ends_BA = is_any_of(self.tokens_BL[:, self.answer :], end_token_ids) & ~masked_BA
        return (ends_BA & (masked_BA.cumsum(1) == 0)).any(1)

    def holds_stop(self, lm: LanguageModel, stop: Sequence[str]) -> Tensor:
        """(B,) bool: the text of an answer, up to what is still masked, holds a stop string."""
        whole_BA = self.masked_BL[:, self.answer :].cumsum(dim=1) == 0
        answers = [
            lm.decode(row[whole].tolist())
            for row, whole in zip(self.tokens_BL[:, self.answer :], whole_BA, strict=True)
        ]
        return torch.tensor([any(text in answer for text in stop) for answer in answers], device=lm.device)

    def snapshot(self, step: int, steps: int, first: int) -> Snapshot:
        """The answers as they stand."""
        return Snapshot(
            tokens=[row[start:] for row, start in zip(self.tokens_BL.tolist(), self.starts, strict=True)],
            step_of_token=[row[start:] for row, start in zip(self.step_BL.tolist(), self.starts, strict=True)],
            step=step,
            steps=steps,
            first=first,
        )


class LateFlags:
    """Flags of the device by which the host decides.

    Read at once on a CPU. Elsewhere the host gets those of a step before, which have been copied while the device
    computed this one: it never waits for a step that the host has just begun. Flags that are set have to stay set.
    """

    def __init__(self, device: torch.device) -> None:
        self._late = STEPS_LATE.get(device.type, 0)
        self._copies: list[tuple[Tensor, torch.cuda.Event | None]] = []

    def exchange(self, flags_B: Tensor) -> list[bool]:
        """Takes the flags of this step, (B,) bool; returns the latest that have arrived."""
        event = None
        copy_B = flags_B.to("cpu", non_blocking=True) if flags_B.is_cuda else flags_B.clone()
        if flags_B.is_cuda:
            event = torch.cuda.Event()
            event.record()
        self._copies.append((copy_B, event))
        if len(self._copies) <= self._late:
            return [False] * len(flags_B)
        copy_B, event = self._copies.pop(0)
        if event is not None:
            event.synchronize()
        flags: list[bool] = copy_B.tolist()
        return flags


def is_any_of(tokens: Tensor, ids: Sequence[int]) -> Tensor:
    """Whether each token is one of a few, a bool tensor of their shape; the ids stay on the host."""
    found = torch.zeros_like(tokens, dtype=torch.bool)
    for token_id in ids:
        found |= tokens == token_id
    return found
