"""The training losses: next-token prediction (Eq. 2) and masked diffusion (Eq. 3), in nats per token.

Both take a ``denominator`` instead of a mean: the number of tokens of the *global* batch over the number of its
micro-batches. The mean over micro-batches and ranks, which Lightning and DDP take, is then the loss per token of
the global batch, however it was split.
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


def next_token_loss(nll_N: Tensor, denominator: Tensor | float) -> Tensor:
    """Mean negative log-likelihood (Eq. 2), nats per token."""
    return nll_N.sum() / denominator


def masked_diffusion_loss(nll_M: Tensor, p_M: Tensor, denominator: Tensor | float) -> Tensor:
    """The loss of Eq. 3: masked tokens only, each over its mask probability, nats per token.

    Args:
        nll_M: (M,) negative log-likelihood of the masked tokens.
        p_M: (M,) probability with which each of them was masked.
        denominator: tokens, masked or not, that the loss is taken over.
    """
    return (nll_M / p_M).sum() / denominator
