"""The mask predictor's logits of a block, with guidance and with caches."""

from __future__ import annotations

import torch
from torch import Tensor

from llada_lightning.checkpoints.language_model import LanguageModel
from llada_lightning.generation.canvas import Canvas
from llada_lightning.generation.settings import Settings
from llada_lightning.generation.tokens import guide
from llada_lightning.model.attention import KeyValueCache


class Predictor:
    """Predicts masked tokens of the columns of one block at a time.

    With a cache, the first pass over a block computes the whole canvas. Later ones take the keys and values of what
    stands before the block (`prefix`), or also of what stands behind it (`dual`), from that pass, although they
    would have changed with the block: an approximation (Wu et al. 2025).
    """

    def __init__(self, lm: LanguageModel, canvas: Canvas, settings: Settings) -> None:
        assert lm.mask_token_id is not None
        self._lm, self._canvas, self._settings = lm, canvas, settings
        self.mask_token_id = lm.mask_token_id
        self._positions_BL, self._attention_mask_BL = canvas.positions, canvas.attention_mask
        self.passes = 0

    def open_block(self, begin: int, end: int, visible: int) -> None:
        """Turn to the columns ``begin`` to ``end`` of a canvas of which the first ``visible`` columns exist."""
        self._begin, self._end, self._visible = begin, end, visible
        self._cache = KeyValueCache(visible) if self._settings.cache != "none" else None
        self._fresh = True

    def keep_rows(self, index_R: Tensor) -> None:
        """Go on with some of the rows of the last pass, by their place in it."""
        if self._cache is not None and not self._fresh:
            if self._settings.cfg_scale > 0:
                index_R = torch.cat([index_R, index_R + self._rows])
            self._cache.keep_rows(index_R)

    def __call__(self, rows_R: Tensor, wanted_RK: Tensor) -> Tensor:
        """What the wanted columns of the block are predicted from.

        Args:
            rows_R: (R,) int64, rows of the canvas.
            wanted_RK: (R, K) bool over the block's columns.

        Returns:
            (G, M, D) in the order of ``wanted_RK.nonzero()``, for :meth:`logits`; G is 2 with guidance, else 1.
        """
        first, last = self._columns()
        tokens_RT = self._canvas.tokens_BL[rows_R, first:last]
        self._rows = len(rows_R)
        if self._settings.cfg_scale > 0:
            without_RT = tokens_RT.masked_fill(self._canvas.given_BL[rows_R, first:last], self.mask_token_id)
            tokens_RT = torch.cat([tokens_RT, without_RT])
            rows_R = torch.cat([rows_R, rows_R])
        if self._cache is not None:
            self._cache.position = first
        hidden_RKD = self._lm.model.hidden(
            tokens_RT,
            causal=False,
            attention_mask_BL=_rows(self._attention_mask_BL, rows_R, 0, self._visible),
            positions_BL=_rows(self._positions_BL, rows_R, first, last),
            cache=self._cache,
            queries=slice(self._begin - first, self._end - first),
        )
        if self._cache is not None and self._fresh:
            self._cache.advance(last)  # from now on all of these are held
        self._fresh = False
        self.passes += 1
        return hidden_RKD.unflatten(0, (-1, self._rows))[:, wanted_RK]

    def logits(self, hidden_GMD: Tensor) -> Tensor:
        """(M, V) float32; [MASK]'s is -inf. As the released code takes them: in the model's type, [MASK]'s included."""
        logits_GMV: Tensor = self._lm.model.head(hidden_GMD)
        if self._settings.compat is None:
            logits_GMV = logits_GMV.float()
        logits_MV = logits_GMV[0]
        if self._settings.cfg_scale > 0:
            logits_MV = guide(logits_MV, logits_GMV[1], self._settings.cfg_scale)
        if self._settings.compat is None:
            logits_MV[:, self.mask_token_id] = -torch.inf
        return logits_MV

    def _columns(self) -> tuple[int, int]:
        """What the next pass computes."""
        if self._cache is None or self._fresh:
            return 0, self._visible
        return self._begin, self._visible if self._settings.cache == "prefix" else self._end


def _rows(x_BL: Tensor | None, rows_R: Tensor, begin: int, end: int) -> Tensor | None:
    return None if x_BL is None else x_BL[rows_R, begin:end]
