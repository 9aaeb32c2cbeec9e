"""Keys and values of positions that need not be computed again."""

from __future__ import annotations

import torch
from torch import Tensor


class KeyValueCache:
    """Rotated keys and values of each block, by position.

    A forward pass writes those of its tokens from ``position`` on, over what stood there, and attends to all that are
    held. So one class serves three ways: `arm` writes one token behind the others and moves on; a `llada` block with
    a prefix cache writes itself and all that follows, again and again; with a dual cache only itself.

    Args:
        capacity: positions to make room for.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.position = 0
        self.held = 0
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def keys_after(self, length: int) -> int:
        """Keys that are held once ``length`` tokens have been written at ``position``."""
        assert self.position + length <= self.capacity
        return max(self.held, self.position + length)

    def update(self, layer: int, k_BHLD: Tensor, v_BHLD: Tensor) -> tuple[Tensor, Tensor]:
        """Writes one block's keys and values; returns all that are held, each (B, H, S, D)."""
        end = self.position + k_BHLD.shape[2]
        if layer not in self._layers:
            batch, heads, _, dim = k_BHLD.shape
            self._layers[layer] = (
                k_BHLD.new_empty(batch, heads, self.capacity, dim),
                v_BHLD.new_empty(batch, heads, self.capacity, dim),
            )
        keys, values = self._layers[layer]
        keys[:, :, self.position : end] = k_BHLD
        values[:, :, self.position : end] = v_BHLD
        held = max(self.held, end)
        return keys[:, :, :held], values[:, :, :held]

    def advance(self, length: int) -> None:
        """The tokens of the last pass are there to stay; the next ones stand behind them."""
        self.position += length
        self.held = max(self.held, self.position)

    def keep_rows(self, rows_R: Tensor) -> None:
        """Goes on with some rows of the batch."""
        self._layers = {
            layer: (torch.index_select(keys, 0, rows_R), torch.index_select(values, 0, rows_R))
            for layer, (keys, values) in self._layers.items()
        }
