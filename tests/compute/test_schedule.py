"""Schedules: the paper's rates at the paper's tokens, and laws of warmup and decay."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llada_lightning.compute.schedule import WSD, Plateau
from llada_lightning.support.errors import UserError

TOKENS_PER_STEP = 1280 * 4096
TOTAL_STEPS = round(2.3e12 / TOKENS_PER_STEP)


def llada_8b() -> WSD:
    """Sec. 2.2: 0 to 4e-4 in 2000 steps, 1e-4 after 1.2T tokens and for 0.8T, linear to 1e-5 over the last 0.3T."""
    schedule = WSD(
        lr=4e-4,
        warmup_steps=2000,
        plateaus=[Plateau(lr=1e-4, from_tokens=1.2e12)],
        decay_tokens=0.3e12,
        final_lr=1e-5,
    )
    return schedule.resolve(TOTAL_STEPS, TOKENS_PER_STEP, default_lr=0.1)


def first_step_after(tokens: float) -> int:
    return math.ceil(tokens / TOKENS_PER_STEP)


@pytest.mark.parametrize(("step", "lr"), [(0, 0.0), (1, 2e-7), (1000, 2e-4), (1999, 3.998e-4), (2000, 4e-4)])
def test_llada_8b_warms_up(step: int, lr: float) -> None:
    assert llada_8b().at(step) == pytest.approx(lr, rel=1e-12)


@pytest.mark.parametrize(
    ("tokens", "lr"), [(0.1e12, 4e-4), (1.2e12, 1e-4), (1.3e12, 1e-4), (1.99e12, 1e-4), (2.0e12, 1e-4)]
)
def test_llada_8b_holds_its_plateaus(tokens: float, lr: float) -> None:
    assert llada_8b().at(first_step_after(tokens)) == pytest.approx(lr, rel=2e-4)  # 2.0T may be one step into decay


def test_llada_8b_drops_at_the_step_that_begins_with_1200_billion_tokens_processed() -> None:
    step = first_step_after(1.2e12)
    assert (step - 1) * TOKENS_PER_STEP < 1.2e12 <= step * TOKENS_PER_STEP
    assert (llada_8b().at(step - 1), llada_8b().at(step)) == (4e-4, 1e-4)


def test_llada_8b_decays_over_the_last_300_billion_tokens() -> None:
    schedule = llada_8b()
    start = TOTAL_STEPS - round(0.3e12 / TOKENS_PER_STEP)
    assert start * TOKENS_PER_STEP == pytest.approx(2.0e12, abs=TOKENS_PER_STEP)
    assert schedule.at(start) == 1e-4
    assert schedule.at(start + 1) < 1e-4
    assert schedule.at(first_step_after(2.15e12)) == pytest.approx(5.5e-5, rel=1e-4)
    assert schedule.at(TOTAL_STEPS - 1) == pytest.approx(1e-5, rel=1e-3)
    assert schedule.at(TOTAL_STEPS) == pytest.approx(1e-5, rel=1e-12)
    assert schedule.at(TOTAL_STEPS + 1) == pytest.approx(1e-5, rel=1e-12)


def test_defaults_are_fractions_of_the_run_and_of_the_rate() -> None:
    resolved = WSD().resolve(total_steps=1000, tokens_per_step=64, default_lr=3e-3)
    assert (resolved.lr, resolved.warmup_steps, resolved.decay_steps, resolved.total_steps) == (3e-3, 50, 200, 1000)
    assert resolved.final_lr == pytest.approx(3e-4)
    assert [resolved.at(s) for s in (0, 50, 800, 1000)] == pytest.approx([0, 3e-3, 3e-3, 3e-4])
    assert resolved.at(900) == pytest.approx((3e-3 + 3e-4) / 2)


def test_steps_win_over_tokens_and_tokens_over_fractions() -> None:
    by_tokens = WSD(decay_tokens=640, decay_fraction=0.5)
    assert by_tokens.resolve(100, 64, 1.0).decay_steps == 10
    by_steps = WSD(warmup_steps=7, warmup_fraction=0.5, decay_steps=20, decay_tokens=640)
    resolved = by_steps.resolve(100, 64, 1.0)
    assert (resolved.warmup_steps, resolved.decay_steps) == (7, 20)
    assert WSD(lr=0.2, final_lr=0.05).resolve(100, 64, 1.0).final_lr == 0.05


def test_every_plateau_holds_until_the_next() -> None:
    plateaus = [Plateau(lr=0.5, from_tokens=300), Plateau(lr=0.75, from_tokens=601)]
    schedule = WSD(lr=1.0, warmup_steps=0, plateaus=plateaus, decay_steps=0).resolve(100, 10, 0.1)
    rates = [schedule.at(step) for step in range(101)]
    assert rates == [1.0] * 30 + [0.5] * 31 + [0.75] * 40


@pytest.mark.parametrize(
    "schedule",
    [
        WSD(warmup_steps=60, decay_steps=41),
        WSD(warmup_steps=101, decay_steps=0),
        WSD(warmup_steps=0, decay_steps=101),
        WSD(decay_tokens=64 * 99.0),
        WSD(warmup_fraction=0.9),
        WSD(warmup_steps=10, plateaus=[Plateau(lr=1e-4, from_tokens=64 * 9)]),
        WSD(plateaus=[Plateau(lr=1e-4, from_tokens=64 * 81)], decay_steps=20),
        WSD(plateaus=[Plateau(lr=1e-4, from_tokens=64 * 50), Plateau(lr=1e-5, from_tokens=64 * 40)]),
    ],
    ids=str,
)
def test_parts_out_of_order_are_refused_in_one_line(schedule: WSD) -> None:
    with pytest.raises(UserError, match=r"^model\.schedule: .* of 100 steps; they must follow one another") as error:
        schedule.resolve(total_steps=100, tokens_per_step=64, default_lr=1.0)
    assert "\n" not in str(error.value)


resolved_schedules = st.builds(
    lambda lr, warmup, stable, decay, final: WSD(
        lr=lr, warmup_steps=warmup, decay_steps=decay, final_lr_fraction=final
    ).resolve(warmup + stable + decay, 64, default_lr=1.0),
    lr=st.floats(1e-6, 1.0),
    warmup=st.integers(0, 60),
    stable=st.integers(1, 60),
    decay=st.integers(0, 60),
    final=st.floats(0, 1),
)


@given(resolved_schedules)
def test_rates_rise_hold_and_fall_in_equal_steps(schedule: WSD) -> None:
    assert schedule.warmup_steps is not None and schedule.decay_steps is not None and schedule.total_steps is not None
    assert schedule.lr is not None and schedule.final_lr is not None
    rates = [schedule.at(step) for step in range(schedule.total_steps + 1)]
    steps = [b - a for a, b in pairwise(rates)]
    decay_start = schedule.total_steps - schedule.decay_steps
    tolerance = 1e-12 * schedule.lr
    rise, hold, fall = steps[: schedule.warmup_steps], steps[schedule.warmup_steps : decay_start], steps[decay_start:]
    assert rise == pytest.approx([schedule.lr / max(1, schedule.warmup_steps)] * len(rise), abs=tolerance)
    assert hold == [0.0] * len(hold)
    slope = (schedule.final_lr - schedule.lr) / max(1, schedule.decay_steps)
    assert fall == pytest.approx([slope] * len(fall), abs=tolerance)
    assert rates[0] == (0.0 if schedule.warmup_steps else schedule.lr)
    assert rates[schedule.warmup_steps] == schedule.lr
    assert rates[-1] == pytest.approx(schedule.final_lr if schedule.decay_steps else schedule.lr, abs=tolerance)


@given(
    st.integers(20, 10**6),
    st.integers(1, 10**7),
    st.floats(1e-6, 1.0),
    st.none() | st.integers(0, 5),
    st.none() | st.floats(0, 1e-3),
)
def test_resolving_again_changes_nothing(
    total_steps: int, tokens_per_step: int, default_lr: float, warmup_steps: int | None, final_lr: float | None
) -> None:
    schedule = WSD(warmup_steps=warmup_steps, final_lr=final_lr)
    resolved = schedule.resolve(total_steps, tokens_per_step, default_lr)
    assert resolved.resolve(total_steps, tokens_per_step, default_lr=7.0) == resolved
    assert schedule == WSD(warmup_steps=warmup_steps, final_lr=final_lr)  # its own values stay as they were


@pytest.mark.parametrize(
    ("schedule", "key"),
    [
        (WSD(warmup_steps=-1), "warmup_steps: -1"),
        (WSD(decay_steps=-1), "decay_steps: -1"),
        (WSD(lr=-1.0), "lr: -1.0"),
        (WSD(lr=float("nan")), "lr: nan"),
        (WSD(warmup_fraction=float("nan")), "warmup_fraction: nan"),
        (WSD(plateaus=[Plateau(lr=1e-4, from_tokens=float("inf"))]), "plateaus.0.from_tokens: inf"),
    ],
    ids=str,
)
def test_numbers_that_make_no_rate_are_refused(schedule: WSD, key: str) -> None:
    with pytest.raises(UserError, match=rf"^model\.schedule\.{key} must be a finite number"):
        schedule.resolve(100, 64.0, 1e-3)


def test_a_schedule_without_decay_goes_on_past_its_end() -> None:
    assert WSD(lr=1e-3, decay_steps=0).resolve(2, 64.0, 1e-3).at(5) == 1e-3
