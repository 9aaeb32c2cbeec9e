"""Training as the released snippets write it (paper, Algorithm 1): what our own steps are compared with.

Logits of every position in fp32, one cross-entropy over those that boolean indexing picks, a plain AdamW. The snippets
are not at hand as a trainer, so this follows the paper's algorithm; the forward process is drawn beforehand, by our
own code, so that both see the same masks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from llada_lightning.model import Transformer


def released_llada_loss(
    model: Transformer, tokens_BL: Tensor, masked_BL: Tensor, p_B: Tensor, mask_token_id: int
) -> Tensor:
    """Eq. 3: cross-entropies of the masked tokens over p, summed, over all tokens.

    Args:
        model: gives logits of all positions.
        tokens_BL: (B, L) int64.
        masked_BL: (B, L) bool.
        p_B: (B,) float32, the probability with which each sequence's tokens were masked.
        mask_token_id: stands in the place of masked tokens; it gets a share of the probability, as released.

    Returns:
        () float32, nats a token.
    """
    noisy_BL = torch.where(masked_BL, mask_token_id, tokens_BL)
    p_BL = p_B[:, None].expand_as(tokens_BL)
    logits_BLV = model(noisy_BL, causal=False)
    nll_M = F.cross_entropy(logits_BLV[masked_BL], tokens_BL[masked_BL], reduction="none")
    return (nll_M / p_BL[masked_BL]).sum() / tokens_BL.numel()


def released_arm_loss(model: Transformer, tokens_BL: Tensor, start_token_id: int) -> Tensor:
    """Eq. 2: the mean cross-entropy of each token behind those before it, the first behind the start token.

    Args:
        model: gives logits of all positions.
        tokens_BL: (B, L) int64.
        start_token_id: stands before the first token.

    Returns:
        () float32, nats a token.
    """
    inputs_BL = F.pad(tokens_BL[:, :-1], (1, 0), value=start_token_id)
    logits_BLV = model(inputs_BL, causal=True)
    return F.cross_entropy(logits_BLV.flatten(0, 1), tokens_BL.flatten())
