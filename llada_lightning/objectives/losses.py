"""The training losses: next-token prediction (Eq. 2) and masked diffusion (Eq. 3), in nats per token.

Both are a weighted sum of negative log-likelihoods over a ``denominator``, the number of tokens of the *global* batch
over the number of its micro-batches. The mean over micro-batches and ranks, which Lightning and DDP take, is then the
loss per token of the global batch, however it was split.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def token_nll(logits_NV: Tensor, targets_N: Tensor, excluded_token_id: int | None = None) -> Tensor:
    """Negative log-likelihood of each target, in nats, computed in fp32.

    Args:
        logits_NV: (N, V), any floating type; overwritten where a token is excluded.
        targets_N: (N,) int64.
        excluded_token_id: a token that gets no probability: [MASK], which is never an answer. None gives it its
            share, as the authors' released code does.

    Returns:
        (N,) float32.
    """
    if excluded_token_id is not None:
        logits_NV[:, excluded_token_id] = float("-inf")
    return F.cross_entropy(logits_NV.float(), targets_N, reduction="none")


def shift_right(tokens_BL: Tensor, start_token_id: int) -> Tensor:
    """The input of next-token prediction: EOS, then every token but the last.

    EOS stands before the first token because it stands before every document. So `arm` predicts all L tokens of a
    sequence, just those that `llada` predicts, and the two losses are per the same token.
    """
    start_B1 = tokens_BL.new_full((tokens_BL.shape[0], 1), start_token_id)
    return torch.cat([start_B1, tokens_BL[:, :-1]], dim=1)


def masked_diffusion_weights(p_M: Tensor, scored: int) -> Tensor:
    """What the loss of Eq. 3 weighs the masked tokens' negative log-likelihoods by; that of Eq. 2 takes each once.

    Args:
        p_M: (M,) probability with which each of them was masked.
        scored: the first so many are masked tokens; what follows only fills up a shape, and counts nothing.

    Returns:
        (M,) 1/p, and 0 behind the scored ones.
    """
    fills_M = torch.arange(len(p_M), device=p_M.device) >= scored
    return p_M.reciprocal().masked_fill(fills_M, 0.0)
