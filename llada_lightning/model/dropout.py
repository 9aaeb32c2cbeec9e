"""Dropout whose masks are pure functions of (seed, ordinal, layer, site, position, channel).

No random state is drawn from. So a sequence has the same mask on any device, in any micro-batch, when its block is
computed again in the backward pass, and after a resume.

A mask is made on the device, by a hash of 32 bits in operations on int64: two multiplications and three shifts, whose
products stay below 2^63 (constants of Wellons' Hash Prospector).
"""

from __future__ import annotations

import torch
from torch import Tensor

from llada_lightning.support.errors import UserError

SITES = 2
"""The places of a block that are dropped: the outputs of attention and of the feed-forward part."""

_WORD = 0xFFFFFFFF
_GOLDEN_RATIO_32 = 0x9E3779B9


def check_dropout(rate: float) -> None:
    """Refuse a rate outside of [0, 1)."""
    if not 0 <= rate < 1:
        raise UserError(f"model.dropout: {rate} given; it must lie in [0, 1), and 0 drops nothing")


def dropout_keys(seed: int, ordinals_B: Tensor, layers: int) -> Tensor:
    """The key of each sequence at each site of each layer.

    Args:
        seed: The seed of the run.
        ordinals_B: (B,) int64.
        layers: The number of layers.

    Returns:
        (layers, SITES, B) int64 in [0, 2^32).
    """
    place_LS1 = torch.arange(layers * SITES, device=ordinals_B.device).view(layers, SITES, 1)
    keys_LSB = _mixed(place_LS1 + _GOLDEN_RATIO_32 & _WORD)
    for word in (seed & _WORD, seed >> 32 & _WORD, ordinals_B & _WORD, ordinals_B >> 32 & _WORD):
        keys_LSB = _mixed(keys_LSB ^ word)
    return keys_LSB


def dropped(x_BLD: Tensor, keys_B: Tensor, rate: float, first: int = 0) -> Tensor:
    """Set each value to 0 with a probability, and divide the others by that of being kept.

    Args:
        x_BLD: (B, L, D), positions ``first`` to ``first`` + L - 1.
        keys_B: (B,) int64 of :func:`dropout_keys`.
        rate: The probability.
        first: The position of the first column.

    Returns:
        (B, L, D), the input's type.
    """
    length, width = x_BLD.shape[1:]
    positions_L = torch.arange(first, first + length, device=x_BLD.device)
    channels_D = torch.arange(width, device=x_BLD.device)
    rows_BL = _mixed(_mixed(positions_L + _GOLDEN_RATIO_32 & _WORD) ^ keys_B[:, None])
    kept_BLD = _mixed(rows_BL[:, :, None] ^ channels_D) >= round(rate * 2**32)
    return torch.where(kept_BLD, x_BLD / (1 - rate), 0.0)


def _mixed(words: Tensor) -> Tensor:
    """A permutation of the words of 32 bits in which each bit of the input changes half of the output's."""
    words = words ^ words >> 16
    words = words * 0x21F0AAAD & _WORD
    words = words ^ words >> 15
    words = words * 0x735A2D97 & _WORD
    return words ^ words >> 15
