"""The tokens of a batch while they are denoised."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llada_lightning.checkpoints.language_model import LanguageModel
from llada_lightning.generation.sampling import Snapshot

STILL_MASKED = -1


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
    """

    tokens_BL: Tensor
    masked_BL: Tensor
    given_BL: Tensor
    padding_B: Tensor
    step_BL: Tensor
    confidence_BL: Tensor
    answer: int

    @classmethod
    def of(cls, rows: list[list[int]], length: int, mask_token_id: int, device: torch.device) -> Canvas:
        """Prompts and behind each of them ``length`` masked tokens."""
        answer = max(map(len, rows))
        canvas = cls._padded([row + [mask_token_id] * length for row in rows], mask_token_id, device, answer)
        canvas.masked_BL[:, answer:] = True
        return canvas._opened()

    @classmethod
    def with_gaps(cls, rows: list[list[int]], mask_token_id: int, device: torch.device) -> Canvas:
        """Texts whose [MASK]s are to be filled; all of each is its answer."""
        canvas = cls._padded(rows, mask_token_id, device, 0)
        present_BL = torch.arange(canvas.length, device=device) >= canvas.padding_B[:, None]
        canvas.masked_BL = (canvas.tokens_BL == mask_token_id) & present_BL
        return canvas._opened()

    @classmethod
    def _padded(cls, rows: list[list[int]], filler: int, device: torch.device, answer: int) -> Canvas:
        longest = max(map(len, rows))
        tokens_BL = torch.tensor([[filler] * (longest - len(row)) + row for row in rows], dtype=torch.int64)
        tokens_BL = tokens_BL.view(len(rows), longest).to(device)
        return cls(
            tokens_BL=tokens_BL,
            masked_BL=torch.zeros_like(tokens_BL, dtype=torch.bool),
            given_BL=torch.zeros_like(tokens_BL, dtype=torch.bool),
            padding_B=torch.tensor([longest - len(row) for row in rows], device=device),
            step_BL=torch.zeros_like(tokens_BL),
            confidence_BL=torch.ones_like(tokens_BL, dtype=torch.float32),
            answer=answer,
        )

    def _opened(self) -> Canvas:
        self.given_BL = ~self.masked_BL
        self.step_BL[self.masked_BL] = STILL_MASKED
        return self

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
    def positions(self) -> Tensor | None:
        """(B, L) int64, positions in the unpadded sequence; None where they are the columns."""
        if not bool(self.padding_B.any()):
            return None
        columns_L = torch.arange(self.length, device=self.tokens_BL.device)
        return (columns_L - self.padding_B[:, None]).clamp(min=0)

    def commit(self, rows_M: Tensor, columns_M: Tensor, tokens_M: Tensor, confidence_M: Tensor, step_M: Tensor) -> None:
        """Unmask M tokens."""
        place = rows_M, columns_M
        self.tokens_BL[place] = tokens_M
        self.confidence_BL[place] = confidence_M
        self.step_BL[place] = step_M
        self.masked_BL[place] = False

    def ended(self, end_token_ids: tuple[int, ...]) -> Tensor:
        """(B,) bool: whether an answer holds a token that ends it, and nothing before that is still masked."""
        ends = torch.tensor(end_token_ids, device=self.tokens_BL.device)
        masked_BA = self.masked_BL[:, self.answer :]
        ends_BA = torch.isin(self.tokens_BL[:, self.answer :], ends) & ~masked_BA
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
        starts = [max(self.answer, padding) for padding in self.padding_B.tolist()]
        return Snapshot(
            tokens=[row[start:] for row, start in zip(self.tokens_BL.tolist(), starts, strict=True)],
            step_of_token=[row[start:] for row, start in zip(self.step_BL.tolist(), starts, strict=True)],
            step=step,
            steps=steps,
            first=first,
        )
