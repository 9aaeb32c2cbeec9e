"""Peaks and memory of devices by name, and the rules for learning rate, batch and warmup."""

from __future__ import annotations

import math

import pytest

from llada_lightning.compute.hardware import MEMORY_GB, PEAK_FLOPS_BF16, memory_bytes, peak_flops
from llada_lightning.compute.rules import (
    BATCH_RULES,
    LEARNING_RATE_RULES,
    RANGES,
    Range,
    Rules,
    Size,
    learning_rate,
    lone_warmup,
    study_warmup,
)
from llada_lightning.support.errors import UserError


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
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA H100 NVL", 835e12),
        ("h100 sxm", 989e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA GB200", 2500e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA A40", 149.7e12),
        ("NVIDIA A30", 165e12),
        ("NVIDIA L40", 181e12),
        ("NVIDIA RTX A6000", 154.8e12),
        ("NVIDIA GeForce RTX 3090", 71e12),
        ("AMD Instinct MI300X", 1307.4e12),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA RTX 6000 Ada Generation", None),
        ("Tesla V100-SXM2-32GB", None),
        ("Tesla T4", None),
        ("NVIDIA H800 PCIe", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("cpu", None),
        ("NVIDIA H1000", None),
        ("Some GPU of tomorrow", None),
    ],
)
def test_a_known_name_has_its_dense_peak_and_an_unknown_one_none(name: str, peak: float | None) -> None:
    assert peak_flops(name) == peak


@pytest.mark.parametrize(
    ("name", "gigabytes"),
    [
        ("h100", 80),
        ("NVIDIA H200", 141),
        ("NVIDIA A100-SXM4-80GB", 80),
        ("NVIDIA A100-PCIE-40GB", 40),
        ("A100", 40),
        ("NVIDIA GH200 480GB", 96),
        ("AMD Instinct MI300X", 192),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("Some GPU of tomorrow 80GB", None),
    ],
)
def test_memory_is_the_data_sheets_or_what_the_name_says(name: str, gigabytes: float | None) -> None:
    assert memory_bytes(name) == (None if gigabytes is None else gigabytes * 1e9)


def test_every_device_with_a_peak_has_a_memory() -> None:
    assert list(PEAK_FLOPS_BF16) == list(MEMORY_GB)


@pytest.mark.parametrize(("flops", "lr", "batch"), [(8.4e22, 4.2e-4, 2304 * 4096), (8.0e23, 3.2e-4, 4608 * 4096)])
def test_deepseeks_rules_give_what_deepseek_7b_and_67b_were_trained_with(flops: float, lr: float, batch: int) -> None:
    """6ND of 2T tokens; the paper's Table 2 holds the two models' rates and batches."""
    size = Size(math.nan, math.nan, flops)
    assert learning_rate("deepseek", size) == pytest.approx(lr, rel=0.05)
    assert batch_tokens("deepseek", size) == pytest.approx(batch, rel=0.05)


def test_step_law_at_1b_and_100b_tokens() -> None:
    size = Size(1e9, 1e11, math.nan)
    # By hand: ln 1.79 - 0.713 ln 1e9 + 0.307 ln 1e11 = 0.5822 - 14.7757 + 7.7759 = -6.4176.
    assert LEARNING_RATE_RULES["step-law"](size) == pytest.approx(math.exp(-6.4176), rel=1e-3)
    # ln 0.58 + 0.571 ln 1e11 = -0.5447 + 14.4627 = 13.9180.
    assert batch_tokens("step-law", size) == pytest.approx(math.exp(13.9180), rel=1e-3)


def test_deepseeks_rate_is_the_best_of_a_scan_at_2e11_flops() -> None:
    assert 5e-3 < learning_rate("deepseek", Size(1, 1, 2e11)) < 1.5e-2


def test_a_rate_by_rule_has_three_digits_but_by_the_rule_lone_all() -> None:
    size = Size(1e6, 1e8, 2e11, flops_of_steps=2.01e11)
    assert learning_rate("deepseek", size) == 0.0121
    assert learning_rate("deepseek", size, scale=0.25) == 0.00301
    assert learning_rate("lone", size) == 0.3118 * 2.01e11**-0.1250


def test_a_studys_warmup_is_a_twentieth_of_the_steps_within_limits() -> None:
    assert [study_warmup([steps]) for steps in (1, 9, 100, 1000, 40_000, 10**6)] == [1, 1, 5, 50, 2000, 2000]
    assert study_warmup([100, 1600]) == 20  # of the geometric mean, 400
    assert study_warmup([100, 10_000, 1_000_000]) == 25  # a quarter of the shortest


def test_a_lone_warmup_is_a_twentieth_of_the_steps_without_limits() -> None:
    assert [lone_warmup([steps]) for steps in (1, 8, 100, 100_000)] == [0, 0, 5, 5000]
    assert lone_warmup([100, 1600]) == 20


@pytest.mark.parametrize("key", ["lr", "batch", "warmup"])
def test_an_unknown_rule_is_named_with_those_there_are(key: str) -> None:
    with pytest.raises(UserError, match=rf"^rules\.{key}: 'best' is not a rule; choose from .*lone$"):
        Rules(**{key: "best"}).check()


def test_the_rate_follows_kaplan_and_falls_with_size() -> None:
    def rate(size: float) -> float:
        return LEARNING_RATE_RULES["kaplan"](Size(size, math.nan, math.nan))

    assert rate(1e6) == pytest.approx(0.003239 - 0.0001395 * math.log(1e6))
    rates = [rate(10.0**n) for n in range(4, 12)]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] == 1e-4


def batch_tokens(name: str, size: Size) -> float:
    rule = BATCH_RULES[name]
    assert rule is not None
    return rule(size)


def test_a_rules_range_is_that_of_its_source() -> None:
    assert set(RANGES) == set(LEARNING_RATE_RULES)
    assert RANGES["deepseek"] == Range(flops=(1e17, 2e19))
    assert RANGES["step-law"].tokens == (4e9, 1e11)


def test_a_size_beyond_a_range_is_said_with_the_factor() -> None:
    below = RANGES["deepseek"].outside(Size(1e6, 1e8, 1e15))
    assert below is not None
    assert (below.quantity, below.value, below.factor) == ("flops", 1e15, pytest.approx(100))
    assert str(below) == "1e+15 FLOPs, 1e+02 times below 1e+17 to 2e+19"
    above = RANGES["deepseek"].outside(Size(1e9, 1e11, 4e19))
    assert above is not None and str(above) == "4e+19 FLOPs, 2 times above 1e+17 to 2e+19"
    assert RANGES["deepseek"].outside(Size(1e9, 1e9, 6e18)) is None
    assert Range().outside(Size(1.0, 1.0, 1.0)) is None


def test_of_several_quantities_the_one_furthest_beyond_is_said() -> None:
    outside = RANGES["step-law"].outside(Size(1e8, 1e6, 6e14))
    assert outside is not None
    assert outside.quantity == "tokens" and outside.factor == pytest.approx(4000)
