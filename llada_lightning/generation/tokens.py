"""From logits to a token and how sure the model is of it."""

from __future__ import annotations

import torch
from torch import Tensor

from llada_lightning.generation.settings import Remasking

LOWEST = -1e3
"""A confidence below all others, and above that of what must not be chosen."""


def guide(logits_MV: Tensor, unconditional_MV: Tensor, scale: float) -> Tensor:
    """Unsupervised classifier-free guidance (Eq. 16): p(r | prompt)^(1 + w) / p(r | masks)^w, unnormalised."""
    return unconditional_MV + (1 + scale) * (logits_MV - unconditional_MV)


def draw_tokens(logits_MV: Tensor, temperature: float, gumbel_MV: Tensor | None) -> Tensor:
    """(M,) int64: the likeliest token, or one drawn by the Gumbel-max trick in float64.

    Args:
        logits_MV: float32; -inf for what must not be drawn.
        temperature: 0 for the likeliest.
        gumbel_MV: float64 standard Gumbel noise, where the temperature is not 0.
    """
    if gumbel_MV is None:
        return logits_MV.argmax(dim=-1)
    return (logits_MV.double() + temperature * gumbel_MV).argmax(dim=-1)


def likeliest(logits_MV: Tensor, temperature: float, top_k: int | None, top_p: float | None) -> Tensor:
    """The logits with -inf for all but the ``top_k`` likeliest, and the fewest that hold ``top_p`` of what is left.

    ``top_p`` counts the probabilities at ``temperature``, from which is drawn.
    """
    if top_k is not None and top_k < logits_MV.shape[-1]:
        values_MK, order_MK = logits_MV.topk(top_k, dim=-1)  # of equals only as many as asked for
        logits_MV = torch.full_like(logits_MV, -torch.inf).scatter(1, order_MK, values_MK)
    if top_p is not None and top_p < 1 and temperature > 0:
        sorted_MV, order_MV = logits_MV.sort(dim=-1, descending=True)
        p_MV = (sorted_MV.double() / temperature).softmax(dim=-1)
        superfluous_MV = p_MV.cumsum(dim=-1) - p_MV >= top_p  # those before hold the share already
        superfluous_MV = torch.zeros_like(superfluous_MV).scatter(1, order_MV, superfluous_MV)
        logits_MV = logits_MV.masked_fill(superfluous_MV, -torch.inf)
    return logits_MV


def probability(logits_MV: Tensor, tokens_M: Tensor) -> Tensor:
    """(M,) float32: the model's probability of each token."""
    return logits_MV.softmax(dim=-1).gather(1, tokens_M[:, None])[:, 0]


def confidence(logits_MV: Tensor, probability_M: Tensor, remasking: Remasking) -> Tensor:
    """(M,) float32, higher where the model is surer.

    `low_confidence`: the probability of the token (Algorithm 5). `margin`: how much likelier the likeliest word is
    than the second. `entropy`: minus the entropy of the prediction, in nats.
    """
    if remasking == "margin":
        first_M, second_M = logits_MV.softmax(dim=-1).topk(2, dim=-1).values.unbind(dim=-1)
        return first_M - second_M
    if remasking == "entropy":
        return -torch.special.entr(logits_MV.softmax(dim=-1)).sum(dim=-1)
    return probability_M
