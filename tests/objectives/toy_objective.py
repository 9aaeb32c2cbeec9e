"""A third objective in one file: `toy` masks every token with one fixed probability.

Each masked token counts once, so the training loss is a surrogate. The validation value is the bound of Eq. 14, as of
`llada`, so that the results of both can be compared. The file registers itself when LLADA_PLUGINS names it.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from llada_lightning.objectives import Objective, TrainingKind, llada, register
from llada_lightning.objectives.batches import TrainingBatch
from llada_lightning.objectives.forward_process import random_mask
from llada_lightning.training.language_module import LanguageModule

RATIO = 0.3

register(
    Objective(
        name="toy",
        label="toy (bound)",
        colour="#009E73",
        line=":",
        marker="^",
        filled=False,
        module=f"{__name__}.ToyModule",
        val_kind="bound",
        causal=False,
        masks=True,
        starts_with_eos=False,
        logit_share=lambda mask_eps: RATIO,
        tokens_per_param=60.0,
    )
)


class ToyModule(LanguageModule):
    """Masked diffusion at one mask probability, with a surrogate loss."""

    objective = "toy"
    sequence_nll = llada.sequence_nll

    def training_loss(self, batch: TrainingBatch) -> Tensor:
        """The mean negative log-likelihood of the masked tokens times their share."""
        tokens_BL = batch.tokens_BL
        ratio_B = np.full(len(tokens_BL), RATIO)
        mask_BL = random_mask(self.seed, batch.ordinals_B.cpu().numpy(), ratio_B, tokens_BL.shape[1])
        masked_BL = torch.from_numpy(mask_BL).to(tokens_BL.device)
        if batch.attention_mask_BL is not None:
            masked_BL &= batch.attention_mask_BL
        once = batch.rows(slice(None), masked_BL)._replace(p_B=torch.ones_like(batch.p_B))
        return llada.training_loss(self, once)

    def training_kind(self, *given: object) -> TrainingKind:
        return "surrogate"
