"""The tokens of a step with how sure the model is of them, from what the Transformer computed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from llada_lightning.generation.noise import Noise
from llada_lightning.generation.settings import Settings
from llada_lightning.generation.tokens import LOWEST, confidence, draw_tokens, likeliest, probability

LOGITS_AT_ONCE = {"cpu": 1 << 23, "cuda": 1 << 28}
"""Logits that are made and used before the next are: on a CPU what fits its caches, elsewhere the memory."""


@dataclass(frozen=True)
class Prediction:
    """Of M masked positions.

    Args:
        tokens_M: int64.
        probability_M: float32, that the model gives each token.
        confidence_M: float32, by which predictions are kept or masked again.
    """

    tokens_M: Tensor
    probability_M: Tensor
    confidence_M: Tensor


def predict_tokens(
    hidden_GMD: Tensor,
    logits_of: Callable[[Tensor], Tensor],
    words: int,
    place: tuple[Tensor, Tensor],
    settings: Settings,
    noise: Noise,
    end_token_ids: tuple[int, ...],
) -> Prediction:
    """Predict M tokens, some at a time: all their logits would be the largest tensor of all.

    Args:
        hidden_GMD: what ``logits_of`` takes, (G, m, D) to (m, V).
        words: V.
        place: rows and columns of the canvas, (M,) int64 each.
    """
    count = hidden_GMD.shape[1]
    at_once = max(1, LOGITS_AT_ONCE.get(hidden_GMD.device.type, 1 << 26) // words)
    if settings.compat is not None:
        at_once = max(1, count)  # its noise is drawn once a step, also where nothing is left to predict
    parts = [
        _predict(
            logits_of(hidden_GMD[:, begin : begin + at_once]),
            place[0][begin : begin + at_once],
            place[1][begin : begin + at_once],
            settings,
            noise,
            end_token_ids,
        )
        for begin in range(0, max(1, count), at_once)
    ]
    return Prediction(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _predict(
    logits_MV: Tensor,
    rows_M: Tensor,
    columns_M: Tensor,
    settings: Settings,
    noise: Noise,
    end_token_ids: tuple[int, ...],
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, their probabilities and confidences, each (M,)."""
    gumbel_MV, allowed_MV = None, logits_MV
    if settings.temperature > 0:
        gumbel_MV = noise.gumbel(rows_M, columns_M, logits_MV.shape[1])
        allowed_MV = likeliest(logits_MV, settings.temperature, settings.top_k, settings.top_p)
    tokens_M = draw_tokens(allowed_MV, settings.temperature, gumbel_MV)
    probability_M = probability(logits_MV, tokens_M)
    confidence_M = confidence(logits_MV, probability_M, settings.remasking)
    if settings.zero_eos_confidence and settings.compat is None:
        ends_E = torch.tensor(end_token_ids, device=tokens_M.device)
        confidence_M = confidence_M.masked_fill(torch.isin(tokens_M, ends_E), LOWEST)
    elif settings.zero_eos_confidence:
        # Released: once the tokens are drawn, the end of a turn loses its logit, and EOS at temperature 0 alone.
        eos, *others = end_token_ids
        logits_MV[:, [eos, *others] if settings.temperature == 0 else others] = -torch.inf
        confidence_M = probability(logits_MV, tokens_M)
    return tokens_M, probability_M.float(), confidence_M.float()
