"""Sampling of `arm` from left to right, with or without a cache of keys and values."""

from __future__ import annotations

from collections.abc import Callable

import torch

from llada_lightning.checkpoints.language_model import LanguageModel
from llada_lightning.generation.canvas import Canvas
from llada_lightning.generation.finish import holds_stop
from llada_lightning.generation.noise import Noise
from llada_lightning.generation.settings import Settings
from llada_lightning.generation.tokens import draw_tokens, likeliest, probability
from llada_lightning.model.cache import KeyValueCache


def write(lm: LanguageModel, canvas: Canvas, settings: Settings, noise: Noise, on_step: Callable[[int], None]) -> int:
    """Fill the answers of a canvas token by token; returns the number of forward passes.

    A row whose answer has ended leaves the batch. Arguments as those of ``diffusion.denoise``.
    """
    rows_R = torch.arange(len(canvas.tokens_BL), device=lm.device)
    mask_BL, positions_BL = canvas.attention_mask, canvas.positions
    cache = KeyValueCache(canvas.length) if settings.cache == "kv" else None
    passes = 0
    for column in range(canvas.answer, canvas.length):
        first = cache.position if cache is not None else 0
        hidden_RTD = lm.model.hidden(
            canvas.tokens_BL[rows_R, first:column],
            causal=True,
            attention_mask_BL=None if mask_BL is None else mask_BL[rows_R, :column],
            positions_BL=None if positions_BL is None else positions_BL[rows_R, first:column],
            cache=cache,
        )
        passes += 1
        if cache is not None:
            cache.advance(column - first)
        logits_RV = lm.model.head(hidden_RTD[:, -1]).float()
        if lm.mask_token_id is not None:
            logits_RV[:, lm.mask_token_id] = -torch.inf
        columns_R = torch.full_like(rows_R, column)
        gumbel_RV = noise.gumbel(rows_R, columns_R, logits_RV.shape[1]) if settings.temperature > 0 else None
        allowed_RV = likeliest(logits_RV, settings.temperature, settings.top_k, settings.top_p)
        tokens_R = draw_tokens(allowed_RV, settings.temperature, gumbel_RV)
        canvas.commit(rows_R, columns_R, tokens_R, probability(logits_RV, tokens_R), column - canvas.answer + 1)
        on_step(column - canvas.answer + 1)

        done_B = canvas.ended(lm.end_token_ids)
        if settings.stop:
            done_B |= holds_stop(lm, canvas, settings.stop)
        goes_on_R = ~done_B[rows_R]
        if not bool(goes_on_R.any()):
            break
        if not bool(goes_on_R.all()):
            if cache is not None:
                cache.keep_rows(goes_on_R.nonzero()[:, 0])
            rows_R = rows_R[goes_on_R]
    return passes
