"""The reverse process of masked diffusion: a canvas is filled block by block, each block in steps (Sec. 2.4, B.4).

Where the schedule alone says how many tokens a step reveals, the host knows every number of a step beforehand. Such a
step asks the device for nothing but whether answers have ended, and that a step later (:class:`LateFlags`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llada_lightning.generation import reveal
from llada_lightning.generation.canvas import STILL_MASKED, Canvas, LateFlags, Places
from llada_lightning.generation.predictor import BlockPredictor, SamplerNoise, predict_tokens
from llada_lightning.generation.sampling import Sampling

if TYPE_CHECKING:
    from llada_lightning.checkpoints.language_model import LanguageModel


@dataclass(frozen=True)
class BlockRows:
    """The R rows of the batch that a block still works on, each a list of the host and (R,) int64 of the device.

    Args:
        rows, rows_R: Their rows of the canvas.
        masked, masked_R: The tokens of the block that were masked when it began.
        steps, steps_R: The steps of the block.
    """

    rows: list[int]
    masked: list[int]
    steps: list[int]
    rows_R: Tensor
    masked_R: Tensor
    steps_R: Tensor

    @classmethod
    def of(cls, rows: list[int], masked: list[int], steps: list[int], device: torch.device) -> BlockRows:
        return cls(rows, masked, steps, *torch.tensor([rows, masked, steps], device=device))

    def part(self, index: list[int]) -> BlockRows:
        """Some of them, by their place among the R."""
        lists = [[values[place] for place in index] for values in (self.rows, self.masked, self.steps)]
        return BlockRows.of(lists[0], lists[1], lists[2], self.rows_R.device)

    def left(self, step: int) -> list[int]:
        """The tokens of each row that are masked before a step, by the schedule."""
        return [n - n * (step - 1) // steps for n, steps in zip(self.masked, self.steps, strict=True)]

    def counts(self, step: int) -> list[int]:
        """The tokens of each row that a step reveals, by the schedule."""
        return [reveal.counts_to_keep(n, step, steps) for n, steps in zip(self.masked, self.steps, strict=True)]


class Denoiser:
    """Fills the masked tokens of a canvas, one block at a time; ``rows`` is None when a block is done."""

    takes_every_step = False
    """Whether also a step that unmasks nothing asks the model."""

    def __init__(self, lm: LanguageModel, canvas: Canvas, settings: Sampling, noise: SamplerNoise) -> None:
        self.lm, self.canvas, self.settings, self.noise = lm, canvas, settings, noise
        self.predictor = BlockPredictor(lm, canvas, settings)
        self.rule = reveal.RULES[settings.remasking]
        self.by_schedule = settings.threshold is None and self.rule.by_schedule
        self.flags = LateFlags(lm.device)
        self.done_B = torch.zeros(len(canvas.tokens_BL), dtype=torch.bool, device=lm.device)
        self.steps_B = torch.zeros(len(canvas.tokens_BL), dtype=torch.int64, device=lm.device)
        self.rows: BlockRows | None = None

    def denoise(self, on_step: Callable[[int], None]) -> int:
        """Denoise block by block; returns the number of the model's forward passes.

        A row whose answer has ended leaves the batch: what is still masked behind its EOS would be discarded.
        ``on_step`` is called with the number of each step that revealed something.
        """
        steps_before, blocks = 0, self._blocks()
        shares = self.settings.steps_of_blocks([end - begin for begin, end in blocks])
        for number, (begin, end) in enumerate(blocks):
            steps = None if shares is None else shares[number]
            self._open_block(begin, end, steps_before, steps)
            steps_done = 0
            while self.rows is not None:
                steps_done += 1
                if self._step(self.rows, steps_done):
                    on_step(steps_before + steps_done)
            steps_before += steps or steps_done
        return self.predictor.passes

    def _blocks(self) -> list[tuple[int, int]]:
        """The columns of each block, first and behind the last."""
        canvas, settings = self.canvas, self.settings
        # Texts with gaps are one block: of all columns, of which what is not masked stays.
        size = canvas.length if settings.infill or settings.block_length is None else settings.block_length
        begin = first = canvas.answer or int(self.lm.shift_targets)  # with them the first column is given
        if self.lm.block_length is not None:  # the blocks of the text, of which the prompt has a part of one
            first -= (first - int(canvas.padding_B[0])) % size
        edges = [begin, *range(first + size, canvas.length, size), canvas.length]
        return list(pairwise(edges))

    def _open_block(self, begin: int, end: int, steps_before: int, steps: int | None) -> None:
        """Turn to the columns ``begin`` to ``end``, after so many steps, for so many; None: as many as it needs."""
        masked_B = self.canvas.masked_BL[:, begin:end].sum(dim=1).masked_fill(self.done_B, 0)
        rows, masked = [], []
        for row, count in enumerate(masked_B.tolist()):
            if count:
                rows.append(row)
                masked.append(count)
        if steps is not None:
            self.steps_B.fill_(steps_before)
        if not rows:
            self.rows = None
            return
        # One token a step where nothing else is said: of texts with gaps each has its own number of them.
        self.rows = BlockRows.of(rows, masked, masked if steps is None else [steps] * len(rows), self.lm.device)
        self.begin, self.end = self.first_column(begin), end
        self.predictor.open_block(self.begin, end, end if self.settings.grows else self.canvas.length)

    def _step(self, rows: BlockRows, step: int) -> bool:
        """One step from t to s, the number ``step`` of its block; False where it unmasks nothing and so needs no
        prediction."""
        self.steps_B[rows.rows_R] += 1
        candidates_RK = self.canvas.masked_BL[rows.rows_R, self.begin : self.end]
        chosen_RK, wanted_RK, counts = self.before_predicting(rows, candidates_RK, step)
        if not self.takes_every_step and not any(counts):
            return False
        place_M, column_M = wanted_RK.nonzero_static(size=sum(counts)).unbind(dim=1)
        of_token = [row for row, count in zip(rows.rows, counts, strict=True) for _ in range(count)]
        places = Places(of_token, rows.rows_R[place_M], column_M + self.begin)
        tokens_M, probability_M, confidence_M = predict_tokens(
            self.predictor(rows.rows_R, place_M, column_M),
            self.predictor.logits,
            self.lm,
            places,
            self.settings,
            self.noise,
        )
        if chosen_RK is None:
            confidence_RK = torch.full(candidates_RK.shape, -torch.inf, device=self.lm.device)
            confidence_RK[place_M, column_M] = confidence_M
            chosen_RK = self.surest(rows, wanted_RK, confidence_RK, step)
        kept_M = chosen_RK[place_M, column_M]
        self.canvas.reveal(places, kept_M, tokens_M, probability_M, self.steps_B[places.rows_M])
        self.after(rows, step)
        return True

    def first_column(self, begin: int) -> int:
        """Where the columns to predict begin."""
        return begin

    def before_predicting(
        self, rows: BlockRows, candidates_RK: Tensor, step: int
    ) -> tuple[Tensor | None, Tensor, list[int]]:
        """What this step unmasks, where that does not depend on the predictions; what has to be predicted, and how many
        tokens of each row that is."""
        if self.settings.threshold is not None:
            return None, candidates_RK, number_of_each(candidates_RK)
        counts, counts_R = rows.counts(step), reveal.counts_to_keep(rows.masked_R, step, rows.steps_R)
        if self.rule.choice is None:
            reveals = zip(rows.left(step), counts, strict=True)
            return None, candidates_RK & (counts_R > 0)[:, None], [left if count else 0 for left, count in reveals]

        def uniform() -> Tensor:
            left = rows.left(step) if self.by_schedule else number_of_each(candidates_RK)
            return self.noise.uniform(rows.rows, candidates_RK, left, self.begin)

        chosen_RK = self.rule.choice(reveal.State(candidates_RK, counts_R, step, rows.steps_R, uniform))
        return chosen_RK, chosen_RK, counts if self.by_schedule else number_of_each(chosen_RK)

    def surest(self, rows: BlockRows, candidates_RK: Tensor, confidence_RK: Tensor, step: int) -> Tensor:
        """(R, K) bool: the predictions that stay, by their confidence, (R, K) float32; -inf elsewhere."""
        if self.settings.threshold is not None:
            return reveal.above_threshold(confidence_RK, candidates_RK, self.settings.threshold)
        counts_R = reveal.counts_to_keep(rows.masked_R, step, rows.steps_R)
        return reveal.most_confident(reveal.without_rounding(confidence_RK), candidates_RK, counts_R)

    def after(self, rows: BlockRows, step: int) -> None:
        """Rows whose block is done, or whose answer has ended, leave."""
        if self.by_schedule:
            goes_on = [step < steps for steps in rows.steps]
        else:
            goes_on = self.canvas.masked_BL[rows.rows_R, self.begin : self.end].any(dim=1).tolist()
        if not self.settings.infill:
            self.done_B |= self.canvas.ended(self.lm.end_token_ids)
            done = self.flags.exchange(self.done_B)
            goes_on = [more and not done[row] for row, more in zip(rows.rows, goes_on, strict=True)]
            if self.settings.stop and not any(goes_on):
                self.done_B |= self.canvas.holds_stop(self.lm, self.settings.stop)
        if all(goes_on):
            return
        index = [place for place, more in enumerate(goes_on) if more]
        self.rows = None
        if index:
            self.rows = rows.part(index)
            self.predictor.keep_rows(torch.tensor(index, device=self.lm.device))


class ReleasedDenoiser(Denoiser):
    """As the authors' released sampler, for ``compat="llada"``.

    Reads off the tokens what is masked, so that a drawn [MASK] is predicted again, and takes all steps of a block.

    The number of tokens to unmask is that of the block; candidates are also the [MASK]s that earlier blocks have left.
    """

    takes_every_step = True

    def first_column(self, begin: int) -> int:
        return int(self.canvas.masked_BL.any(dim=0).nonzero()[0])

    def before_predicting(
        self, rows: BlockRows, candidates_RK: Tensor, step: int
    ) -> tuple[Tensor | None, Tensor, list[int]]:
        return None, candidates_RK, number_of_each(candidates_RK)

    def surest(self, rows: BlockRows, candidates_RK: Tensor, confidence_RK: Tensor, step: int) -> Tensor:
        if self.rule.choice is not None:  # chance is a confidence
            confidence_RK = self.noise.uniform(rows.rows, candidates_RK, [], self.begin)
        counts = [
            reveal.released_counts_to_keep(n, step, steps) for n, steps in zip(rows.masked, rows.steps, strict=True)
        ]
        return reveal.released_choice(confidence_RK, candidates_RK, counts, self.begin, self.canvas.length)

    def after(self, rows: BlockRows, step: int) -> None:
        canvas = self.canvas
        canvas.masked_BL = canvas.tokens_BL.eq(self.predictor.mask_token_id) & ~canvas.given_BL
        canvas.step_BL.masked_fill_(canvas.masked_BL, STILL_MASKED)
        canvas.confidence_BL.masked_fill_(canvas.masked_BL, 0.0)
        if step == self.settings.steps_per_block:
            self.rows = None


def number_of_each(chosen_RK: Tensor) -> list[int]:
    """The number of entries of each row that are set; the host waits for it."""
    counts: list[int] = chosen_RK.sum(dim=1).tolist()
    return counts
