"""What the authors' released sampler does in another way than ours, for ``compat="llada"``."""

from __future__ import annotations

import torch
from torch import Tensor

from llada_lightning.generation.diffusion import Denoiser, Rows


class ReleasedDenoiser(Denoiser):
    """Reads off the tokens what is masked, so that a drawn [MASK] is predicted again, and takes all steps of a block.

    The number of tokens to unmask is that of the block; candidates are also the [MASK]s that earlier blocks have left.
    """

    takes_every_step = True

    def first_column(self, begin: int) -> int:
        return int(self.canvas.masked_BL.any(dim=0).nonzero()[0])

    def counts(self, rows: Rows, step: int) -> Tensor:
        return released_counts_to_keep(rows.masked_R, step, rows.steps_R)

    def before_predicting(
        self, rows: Rows, candidates_RK: Tensor, counts_R: Tensor, step: int
    ) -> tuple[Tensor | None, Tensor]:
        return None, candidates_RK

    def surest(self, rows: Rows, candidates_RK: Tensor, confidence_M: Tensor, counts_R: Tensor) -> Tensor:
        if self.settings.random:  # chance is a confidence
            confidence_RK = self.noise.uniform(rows.rows_R, candidates_RK, self.begin)
        else:
            confidence_RK = self.spread(candidates_RK, confidence_M)
        return released_choice(confidence_RK, candidates_RK, counts_R, self.begin, self.canvas.length)

    def after(self, step: int) -> None:
        canvas = self.canvas
        canvas.masked_BL = canvas.tokens_BL.eq(self.predictor.mask_token_id) & ~canvas.given_BL
        canvas.step_BL[canvas.masked_BL], canvas.confidence_BL[canvas.masked_BL] = -1, 0.0
        if step == self.settings.steps_per_block:
            self.rows = None


def released_counts_to_keep(masked_R: Tensor, step: int, steps: Tensor | int) -> Tensor:
    """As ``remasking.counts_to_keep``: the remainder of an uneven division goes to the first steps."""
    return masked_R // steps + (step <= masked_R % steps).long()


def released_choice(confidence_RK: Tensor, candidates_RK: Tensor, counts_R: Tensor, begin: int, length: int) -> Tensor:
    """The surest by ``topk`` over the canvas of ``length`` columns: of equals, frequent in bfloat16, those it gives."""
    confidence_RL = torch.full((len(confidence_RK), length), -torch.inf, device=confidence_RK.device)
    columns = slice(begin, begin + confidence_RK.shape[1])
    confidence_RL[:, columns] = confidence_RK.float().masked_fill(~candidates_RK, -torch.inf)
    chosen_RL = torch.zeros_like(confidence_RL, dtype=torch.bool)
    for row, count in enumerate(counts_R.tolist()):
        chosen_RL[row, confidence_RL[row].topk(count).indices] = True
    return chosen_RL[:, columns] & candidates_RK
