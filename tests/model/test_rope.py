"""Rotary positions: relative, half-split, fp32 inside."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llada_lightning.model.attention import apply_rope, rope_tables

CPU = torch.device("cpu")
positions = st.integers(0, 2000)


def random_vectors(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def rotate(x_D: Tensor, position: int, theta: float) -> Tensor:
    cos_LD, sin_LD = rope_tables(position + 1, len(x_D), theta, CPU)
    return apply_rope(x_D, cos_LD[position], sin_LD[position])


@settings(deadline=None)
@given(positions, positions, positions, st.sampled_from([1e4, 5e5]), st.integers(0, 1000))
def test_products_depend_on_the_distance_only(m: int, n: int, shift: int, theta: float, seed: int) -> None:
    q_D, k_D = random_vectors(2, 32, seed=seed)
    here = rotate(q_D, m, theta) @ rotate(k_D, n, theta)
    there = rotate(q_D, m + shift, theta) @ rotate(k_D, n + shift, theta)
    # Angles of some thousand radians have errors of 1e-4 in fp32.
    torch.testing.assert_close(here, there, rtol=0, atol=1e-3 * (q_D.norm() * k_D.norm()).item())


@settings(deadline=None)
@given(positions, st.integers(0, 1000))
def test_rotation_keeps_lengths_and_position_0_rotates_nothing(position: int, seed: int) -> None:
    x_D = random_vectors(64, seed=seed)
    torch.testing.assert_close(rotate(x_D, position, 1e4).norm(), x_D.norm())
    assert torch.equal(rotate(x_D, 0, 1e4), x_D)


@pytest.mark.parametrize("theta", [1e4, 5e5])
def test_half_split_formula(theta: float) -> None:
    """Dimension j turns with j + D/2 by position * theta^(-2j/D), as in Llama and LLaDA; not with j + 1."""
    x_BHLD = random_vectors(2, 3, 50, 16)
    ours = apply_rope(x_BHLD, *rope_tables(50, 16, theta, CPU)).numpy()
    x = x_BHLD.double().numpy()
    for position in range(50):
        for j in range(8):
            angle = position * theta ** (-2 * j / 16)
            a, b = x[..., position, j], x[..., position, j + 8]
            np.testing.assert_allclose(ours[..., position, j], a * np.cos(angle) - b * np.sin(angle), atol=3e-5)
            np.testing.assert_allclose(ours[..., position, j + 8], b * np.cos(angle) + a * np.sin(angle), atol=3e-5)


def test_tables_and_rotation_are_fp32_under_bf16() -> None:
    tables = rope_tables(4096, 64, 1e4, CPU)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = rope_tables(4096, 64, 1e4, CPU)
    assert all(torch.equal(a, b) and a.dtype == torch.float32 for a, b in zip(tables, under_autocast, strict=True))
    x_BHLD = random_vectors(1, 2, 4096, 64).bfloat16()
    rotated = apply_rope(x_BHLD, *tables)
    assert rotated.dtype == torch.bfloat16
    assert torch.equal(rotated, apply_rope(x_BHLD.float(), *tables).bfloat16())


def test_tables_are_accurate_at_the_papers_length() -> None:
    cos_LD, sin_LD = rope_tables(4096, 128, 5e5, CPU)
    angles = np.outer(np.arange(4096), 5e5 ** -(np.arange(0, 128, 2) / 128))
    for ours, exact in ((cos_LD, np.cos(angles)), (sin_LD, np.sin(angles))):
        np.testing.assert_allclose(ours.numpy(), np.tile(exact, 2), atol=1e-3)  # 4095 radians have 2.4e-4 in fp32
