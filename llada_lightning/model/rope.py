"""Rotary position embedding (Su et al. 2021), half-split as in Llama and LLaDA, computed in fp32."""

from __future__ import annotations

import torch
from torch import Tensor


def rope_tables(length: int, head_dim: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the positions 0..length-1: each (length, head_dim) float32."""
    exponents = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim
    positions = torch.arange(length, device=device, dtype=torch.float32)
    angles = torch.outer(positions, theta**-exponents)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def apply_rope(x_BHLD: Tensor, cos_LD: Tensor, sin_LD: Tensor) -> Tensor:
    """Rotate queries or keys by their positions, in fp32; the result has the input's type."""
    x = x_BHLD.float()
    first, second = x.chunk(2, dim=-1)
    rotated = torch.cat([-second, first], dim=-1)
    return (x * cos_LD + rotated * sin_LD).to(x_BHLD.dtype)
