"""The reverse process of `llada`: pure, in blocks of a fixed length, or in blocks that grow (Sec. 2.4, B.4)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from llada_lightning.checkpoints.language_model import LanguageModel
from llada_lightning.generation import reveal
from llada_lightning.generation.canvas import Canvas
from llada_lightning.generation.predictor import Noise, Predictor, predict_tokens
from llada_lightning.generation.sampling import Sampling


def denoise(denoiser: Denoiser, on_step: Callable[[int], None]) -> int:
    """Fill the masked tokens of a canvas; returns the number of the model's forward passes.

    A row whose answer has ended leaves the batch: what is still masked behind its EOS would be discarded.

    Args:
        denoiser: The denoiser of a canvas whose answers are all masked.
        on_step: A function that is called with the number of each step that revealed something.
    """
    canvas, settings = denoiser.canvas, denoiser.settings
    steps_before = 0
    # Texts with gaps are one block: of all columns, of which what is not masked stays.
    size = canvas.length if settings.infill or settings.block_length is None else settings.block_length
    for begin in range(canvas.answer, canvas.length, size):
        denoiser.open_block(begin, begin + size)
        steps_done = 0
        while denoiser.rows is not None:
            steps_done += 1
            if denoiser.step(steps_done):
                on_step(steps_before + steps_done)
        steps_before += settings.steps_per_block or steps_done
    return denoiser.predictor.passes


@dataclass(frozen=True)
class Rows:
    """The rows of the batch that a block still works on.

    Args:
        rows_R: (R,) int64, their rows of the canvas.
        masked_R: (R,) int64, the tokens of the block that were masked when it began.
        steps_R: (R,) int64, the steps of the block.
    """

    rows_R: Tensor
    masked_R: Tensor
    steps_R: Tensor

    def only(self, index_R: Tensor) -> Rows:
        return Rows(self.rows_R[index_R], self.masked_R[index_R], self.steps_R[index_R])


class Denoiser:
    """Works on one block of the canvas at a time; ``rows`` is None when a block is done."""

    takes_every_step = False
    """Whether also a step that unmasks nothing asks the model."""

    def __init__(self, lm: LanguageModel, canvas: Canvas, settings: Sampling, noise: Noise) -> None:
        self.lm, self.canvas, self.settings, self.noise = lm, canvas, settings, noise
        self.predictor = Predictor(lm, canvas, settings)
        self.rule = reveal.RULES[settings.remasking]
        self.done_B = torch.zeros(len(canvas.tokens_BL), dtype=torch.bool, device=lm.device)
        self.steps_B = torch.zeros(len(canvas.tokens_BL), dtype=torch.int64, device=lm.device)
        self.rows: Rows | None = None

    def open_block(self, begin: int, end: int) -> None:
        """Turn to the columns ``begin`` to ``end``."""
        masked_B = self.canvas.masked_BL[:, begin:end].sum(dim=1)
        rows_R = (~self.done_B & (masked_B > 0)).nonzero()[:, 0]
        masked_R, steps = masked_B[rows_R], self.settings.steps_per_block
        if steps is not None:
            self.steps_B.fill_((begin - self.canvas.answer) // (end - begin) * steps)
        # One token a step where nothing else is said: of texts with gaps each has its own number of them.
        self.rows = Rows(rows_R, masked_R, masked_R if steps is None else torch.full_like(masked_R, steps))
        if not len(rows_R):
            self.rows = None
            return
        self.begin, self.end = self.first_column(begin), end
        self.predictor.open_block(self.begin, end, end if self.settings.grows else self.canvas.length)

    def step(self, step: int) -> bool:
        """One step from t to s; False where it unmasks nothing, and so needs no prediction.

        Args:
            step: The number of the step within the block, from 1.
        """
        assert self.rows is not None
        rows = self.rows
        self.steps_B[rows.rows_R] += 1
        candidates_RK = self.canvas.masked_BL[rows.rows_R, self.begin : self.end]
        counts_R = self.counts(rows, step)
        chosen_RK, wanted_RK = self.before_predicting(rows, candidates_RK, counts_R, step)
        if not self.takes_every_step and not bool(wanted_RK.any()):
            return False
        place_M, column_M = wanted_RK.nonzero(as_tuple=True)
        row_M, column_M = rows.rows_R[place_M], column_M + self.begin
        prediction = predict_tokens(
            self.predictor(rows.rows_R, wanted_RK),
            self.predictor.logits,
            self.lm.model.vocab_size,
            (row_M, column_M),
            self.settings,
            self.noise,
            self.lm.end_token_ids,
        )
        if chosen_RK is None:
            chosen_RK = self.surest(rows, wanted_RK, prediction.confidence_M, counts_R)
        kept_M = chosen_RK[wanted_RK]
        self.canvas.commit(
            row_M[kept_M],
            column_M[kept_M],
            prediction.tokens_M[kept_M],
            prediction.probability_M[kept_M],
            self.steps_B[row_M[kept_M]],
        )
        self.after(step)
        return True

    def first_column(self, begin: int) -> int:
        """Where the columns to predict begin."""
        return begin

    def counts(self, rows: Rows, step: int) -> Tensor:
        """(R,) tokens that the schedule unmasks in a step."""
        return reveal.counts_to_keep(rows.masked_R, step, rows.steps_R)

    def before_predicting(
        self, rows: Rows, candidates_RK: Tensor, counts_R: Tensor, step: int
    ) -> tuple[Tensor | None, Tensor]:
        """What this step unmasks, where that does not depend on the predictions; and what has to be predicted."""
        if self.settings.threshold is not None:
            return None, candidates_RK
        if self.rule.choice is None:
            return None, candidates_RK & (counts_R > 0)[:, None]

        def uniform() -> Tensor:
            return self.noise.uniform(rows.rows_R, candidates_RK, self.begin)

        chosen_RK = self.rule.choice(reveal.State(candidates_RK, counts_R, step, rows.steps_R, uniform))
        return chosen_RK, chosen_RK

    def surest(self, rows: Rows, candidates_RK: Tensor, confidence_M: Tensor, counts_R: Tensor) -> Tensor:
        """(R, K) bool: the predictions that stay, by their confidence."""
        confidence_RK = self.spread(candidates_RK, confidence_M)
        if self.settings.threshold is not None:
            return reveal.above_threshold(confidence_RK, candidates_RK, self.settings.threshold)
        return reveal.most_confident(reveal.without_rounding(confidence_RK), candidates_RK, counts_R)

    def spread(self, candidates_RK: Tensor, confidence_M: Tensor) -> Tensor:
        """(R, K) float32 of M confidences; -inf where nothing was predicted."""
        confidence_RK = torch.full(candidates_RK.shape, -torch.inf, device=confidence_M.device)
        confidence_RK[candidates_RK] = confidence_M
        return confidence_RK

    def after(self, step: int) -> None:
        """Rows whose block is done, or whose answer has ended, leave."""
        assert self.rows is not None
        masked_BK = self.canvas.masked_BL[:, self.begin : self.end]
        if not self.settings.infill:
            self.done_B |= self.canvas.ended(self.lm.end_token_ids)
            if self.settings.stop and not bool(masked_BK[~self.done_B].any()):
                self.done_B |= self.canvas.holds_stop(self.lm, self.settings.stop)
        rows_R = self.rows.rows_R
        goes_on_R = ~self.done_B[rows_R] & masked_BK[rows_R].any(dim=1)
        if bool(goes_on_R.all()):
            return
        index_R = goes_on_R.nonzero()[:, 0]
        self.predictor.keep_rows(index_R)
        self.rows = self.rows.only(index_R) if len(index_R) else None


class ReleasedDenoiser(Denoiser):
    """As the authors' released sampler, for ``compat="llada"``.

    Reads off the tokens what is masked, so that a drawn [MASK] is predicted again, and takes all steps of a block.

    The number of tokens to unmask is that of the block; candidates are also the [MASK]s that earlier blocks have left.
    """

    takes_every_step = True

    def first_column(self, begin: int) -> int:
        return int(self.canvas.masked_BL.any(dim=0).nonzero()[0])

    def counts(self, rows: Rows, step: int) -> Tensor:
        return reveal.released_counts_to_keep(rows.masked_R, step, rows.steps_R)

    def before_predicting(
        self, rows: Rows, candidates_RK: Tensor, counts_R: Tensor, step: int
    ) -> tuple[Tensor | None, Tensor]:
        return None, candidates_RK

    def surest(self, rows: Rows, candidates_RK: Tensor, confidence_M: Tensor, counts_R: Tensor) -> Tensor:
        if self.rule.choice is not None:  # chance is a confidence
            confidence_RK = self.noise.uniform(rows.rows_R, candidates_RK, self.begin)
        else:
            confidence_RK = self.spread(candidates_RK, confidence_M)
        return reveal.released_choice(confidence_RK, candidates_RK, counts_R, self.begin, self.canvas.length)

    def after(self, step: int) -> None:
        canvas = self.canvas
        canvas.masked_BL = canvas.tokens_BL.eq(self.predictor.mask_token_id) & ~canvas.given_BL
        canvas.step_BL[canvas.masked_BL], canvas.confidence_BL[canvas.masked_BL] = -1, 0.0
        if step == self.settings.steps_per_block:
            self.rows = None
