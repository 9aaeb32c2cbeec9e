"""Peaks of devices by name, and the rule for the learning rate."""

from __future__ import annotations

import math

import pytest

from llada_lightning.scaling.hardware import peak_flops
from llada_lightning.scaling.hyperparameters import learning_rate


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H800", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("cpu", None),
        ("NVIDIA H1000", None),
        ("Some GPU of tomorrow", None),
    ],
)
def test_a_known_name_has_its_dense_peak_and_an_unknown_one_none(name: str, peak: float | None) -> None:
    assert peak_flops(name) == peak


def test_the_rate_follows_kaplan_and_falls_with_size() -> None:
    assert learning_rate(1e6) == pytest.approx(0.003239 - 0.0001395 * math.log(1e6))
    rates = [learning_rate(10.0**n) for n in range(4, 12)]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] == 1e-4
