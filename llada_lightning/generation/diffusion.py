"""The reverse process of `llada`: pure, in blocks of a fixed length, or in blocks that grow (Sec. 2.4, B.4)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from llada_lightning.checkpoints.language_model import LanguageModel
from llada_lightning.generation import remasking
from llada_lightning.generation.canvas import Canvas
from llada_lightning.generation.finish import holds_stop
from llada_lightning.generation.noise import Noise
from llada_lightning.generation.prediction import predict_tokens
from llada_lightning.generation.predictor import Predictor
from llada_lightning.generation.settings import Settings


def denoise(lm: LanguageModel, canvas: Canvas, settings: Settings, noise: Noise, on_step: Callable[[int], None]) -> int:
    """Fill the masked tokens of a canvas; returns the number of the model's forward passes.

    A row whose answer has ended leaves the batch: what is still masked behind its EOS would be discarded.

    Args:
        on_step: called with the number of each step that unmasked something.
    """
    denoiser = Denoiser(lm, canvas, settings, noise)
    steps_before = 0
    # Texts with gaps are one block: of all columns, of which what is not masked stays.
    size = canvas.length if settings.infill else settings.block_length
    for begin in range(canvas.answer, canvas.length, size):
        steps_done = denoiser.open_block(begin, begin + size)
        while denoiser.rows is not None:
            steps_done += 1
            if denoiser.step(steps_done, steps_before + steps_done):
                on_step(steps_before + steps_done)
        steps_before += settings.steps_per_block if settings.steps else steps_done
    return denoiser.predictor.passes


@dataclass(frozen=True)
class Rows:
    """The rows of the batch that a block still works on.

    Args:
        rows_R: int64, where they stand in the canvas.
        masked_R: int64, tokens of the block that were masked when it began.
        steps_R: int64, steps of the block.
    """

    rows_R: Tensor
    masked_R: Tensor
    steps_R: Tensor

    def only(self, index_R: Tensor) -> Rows:
        return Rows(self.rows_R[index_R], self.masked_R[index_R], self.steps_R[index_R])


class Denoiser:
    """Works on one block of the canvas at a time; ``rows`` is None when a block is done."""

    def __init__(self, lm: LanguageModel, canvas: Canvas, settings: Settings, noise: Noise) -> None:
        self.lm, self.canvas, self.settings, self.noise = lm, canvas, settings, noise
        self.predictor = Predictor(lm, canvas, settings)
        self.released = settings.compat is not None
        self.done_B = torch.zeros(len(canvas.tokens_BL), dtype=torch.bool, device=lm.device)
        self.rows: Rows | None = None

    def open_block(self, begin: int, end: int) -> int:
        """Turn to the columns ``begin`` to ``end``; returns the steps done there: 0."""
        masked_B = self.canvas.masked_BL[:, begin:end].sum(dim=1)
        # Released: a [MASK] that was drawn as a token of an earlier block is a candidate again.
        self.begin, self.end = self._first_masked() if self.released else begin, end
        rows_R = (~self.done_B & (masked_B > 0)).nonzero()[:, 0]
        masked_R = masked_B[rows_R]
        # One token a step where nothing else is said: of texts with gaps each has its own number of them.
        steps_R = torch.full_like(masked_R, self.settings.steps_per_block) if self.settings.steps else masked_R
        self.rows = Rows(rows_R, masked_R, steps_R) if len(rows_R) else None
        self.predictor.open_block(self.begin, end, end if self.settings.grows else self.canvas.length)
        return 0

    def _first_masked(self) -> int:
        return int(self.canvas.masked_BL.any(dim=0).nonzero()[0])

    def step(self, step: int, number: int) -> bool:
        """One step from t to s; False where it unmasks nothing, and so needs no prediction.

        What is masked is never read off the tokens, except as released, where a drawn [MASK] stays masked.

        Args:
            step: within the block, from 1.
            number: of the whole generation.
        """
        assert self.rows is not None
        rows_R = self.rows.rows_R
        candidates_RK = self.canvas.masked_BL[rows_R, self.begin : self.end]
        chosen_RK, wanted_RK = self._before_predicting(self.rows, candidates_RK, step)
        if not self.released and not bool(wanted_RK.any()):
            return False
        place_M, column_M = wanted_RK.nonzero(as_tuple=True)
        row_M, column_M = rows_R[place_M], column_M + self.begin
        prediction = predict_tokens(
            self.predictor(rows_R, wanted_RK),
            self.predictor.logits,
            self.lm.model.vocab_size,
            (row_M, column_M),
            self.settings,
            self.noise,
            self.lm.end_token_ids,
        )
        if chosen_RK is None:
            chosen_RK = self._surest(self.rows, wanted_RK, prediction.confidence_M, step)
        kept_M = chosen_RK[wanted_RK]
        self.canvas.commit(
            row_M[kept_M], column_M[kept_M], prediction.tokens_M[kept_M], prediction.probability_M[kept_M], number
        )
        if self.released:
            self.canvas.masked_BL = self.canvas.tokens_BL.eq(self.predictor.mask_token_id)
            self.rows = self.rows if step < self.settings.steps_per_block else None
        else:
            self._leave_what_is_done()
        return True

    def _before_predicting(self, rows: Rows, candidates_RK: Tensor, step: int) -> tuple[Tensor | None, Tensor]:
        """What this step unmasks, where that does not depend on the predictions; and what has to be predicted."""
        if self.settings.threshold is not None:
            return None, candidates_RK
        counts_R = self._counts(rows, step)
        if self.released:
            return None, candidates_RK
        if not self.settings.random:
            return None, candidates_RK & (counts_R > 0)[:, None]
        uniform_RK = self.noise.uniform(rows.rows_R, candidates_RK, self.begin)
        if self.settings.remasking == "random":
            chosen_RK = remasking.by_the_reverse_process(uniform_RK, candidates_RK, step, rows.steps_R)
        else:
            chosen_RK = remasking.most_confident(uniform_RK, candidates_RK, counts_R)
        return chosen_RK, chosen_RK

    def _counts(self, rows: Rows, step: int) -> Tensor:
        count = remasking.released_counts_to_keep if self.released else remasking.counts_to_keep
        return count(rows.masked_R, step, rows.steps_R)

    def _surest(self, rows: Rows, wanted_RK: Tensor, confidence_M: Tensor, step: int) -> Tensor:
        """(R, K) bool: the predictions that stay, by their confidence."""
        if self.settings.random:  # released: chance is a confidence
            confidence_RK = self.noise.uniform(rows.rows_R, wanted_RK, self.begin)
        else:
            confidence_RK = torch.full(wanted_RK.shape, -torch.inf, device=confidence_M.device)
            confidence_RK[wanted_RK] = confidence_M
        if self.released:
            counts_R = self._counts(rows, step)
            return remasking.released_choice(confidence_RK, wanted_RK, counts_R, self.begin, self.canvas.length)
        confidence_RK = remasking.without_rounding(confidence_RK)
        if self.settings.threshold is not None:
            return remasking.above_threshold(confidence_RK, wanted_RK, self.settings.threshold)
        return remasking.most_confident(confidence_RK, wanted_RK, self._counts(rows, step))

    def _leave_what_is_done(self) -> None:
        assert self.rows is not None
        masked_BK = self.canvas.masked_BL[:, self.begin : self.end]
        if not self.settings.infill:
            self.done_B |= self.canvas.ended(self.lm.end_token_ids)
            if self.settings.stop and not bool(masked_BK[~self.done_B].any()):
                self.done_B |= holds_stop(self.lm, self.canvas, self.settings.stop)
        rows_R = self.rows.rows_R
        goes_on_R = ~self.done_B[rows_R] & masked_BK[rows_R].any(dim=1)
        if bool(goes_on_R.all()):
            return
        index_R = goes_on_R.nonzero()[:, 0]
        self.predictor.keep_rows(index_R)
        self.rows = self.rows.only(index_R) if len(index_R) else None
