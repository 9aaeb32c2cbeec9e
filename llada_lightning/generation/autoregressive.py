"""Sampling of `arm` from left to right, with or without a cache of keys and values."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from llada_lightning.checkpoints.language_model import LanguageModel
from llada_lightning.generation.canvas import Canvas
from llada_lightning.generation.finish import holds_stop
from llada_lightning.generation.noise import Noise
from llada_lightning.generation.prediction import predict_tokens
from llada_lightning.generation.settings import Settings
from llada_lightning.model.attention import KeyValueCache


def write(lm: LanguageModel, canvas: Canvas, settings: Settings, noise: Noise, on_step: Callable[[int], None]) -> int:
    """Fill the answers of a canvas token by token; returns the number of forward passes.

    A row whose answer has ended leaves the batch. Arguments as those of ``diffusion.denoise``.
    """
    rows_R = torch.arange(len(canvas.tokens_BL), device=lm.device)
    mask_BL, positions_BL = canvas.attention_mask, canvas.positions
    cache = KeyValueCache(canvas.length) if settings.cache == "kv" else None
    passes = 0

    def logits_of(hidden_GRD: Tensor) -> Tensor:
        logits_RV: Tensor = lm.model.head(hidden_GRD[0]).float()
        if lm.mask_token_id is not None:
            logits_RV[:, lm.mask_token_id] = -torch.inf
        return logits_RV

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
        place = rows_R, torch.full_like(rows_R, column)
        prediction = predict_tokens(
            hidden_RTD[:, -1][None], logits_of, lm.model.vocab_size, place, settings, noise, lm.end_token_ids
        )
        step = column - canvas.answer + 1
        canvas.commit(*place, prediction.tokens_M, prediction.probability_M, torch.full_like(rows_R, step))
        on_step(step)

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
