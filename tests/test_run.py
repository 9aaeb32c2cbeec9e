"""A run is resolved from what it is asked to be: batch, steps, rate, warmup and decay."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llada_lightning.compute.rules import Rules
from llada_lightning.compute.schedule import WSD
from llada_lightning.compute.shapes import get_shape
from llada_lightning.objectives import OBJECTIVES
from llada_lightning.run import MIN_STEPS, Length, Spec, Stream, resolve
from llada_lightning.support.errors import UserError

SHAPE = get_shape("107k")
STREAM = Stream(vocab_size=512, sequence_length=64, random_length_share=0.0)


def spec(objective: str = "llada", **given: object) -> Spec:
    return Spec(**{"objective": OBJECTIVES[objective], "shape": SHAPE, "stream": STREAM, **given})  # type: ignore[arg-type]


@given(st.sampled_from(sorted(OBJECTIVES)), st.floats(1e9, 1e15), st.sampled_from(["deepseek", "step-law"]))
def test_a_batch_by_rule_is_a_power_of_two_and_leaves_steps_enough(objective: str, flops: float, rule: str) -> None:
    run = resolve(spec(objective, length=Length(flops=(flops,)), rules=Rules(batch=rule)))
    assert math.log2(run.global_batch).is_integer()
    assert run.steps[0] >= MIN_STEPS or run.global_batch == 1


@given(st.floats(1e10, 1e15), st.integers(1, 64))
def test_the_steps_cost_the_budget_to_half_a_step(flops: float, batch: int) -> None:
    run = resolve(spec(length=Length(flops=(flops,)), global_batch=batch))
    assert abs(run.steps[0] * run.per_step.flops_6nd - flops) <= 0.5 * run.per_step.flops_6nd * (1 + 1e-9)


def test_the_steps_of_the_example_in_the_documents() -> None:
    stream = Stream(vocab_size=512, sequence_length=64)
    run = resolve(spec(stream=stream, length=Length(flops=(1e10,)), global_batch=16))
    text = " ".join((Path(__file__).parents[1] / "docs" / "training.md").read_text().split())
    assert (
        f"a step costs 6 × {SHAPE.params_nonembedding:,} × 16 × 63.685 = {run.per_step.flops_6nd:.3g} FLOPs".replace(
            "e+08", "e8"
        )
        in text
    )
    assert f"a budget of 1e10 makes {run.steps[0]} steps" in text


def test_budgets_share_a_trunk_and_end_in_decays_of_their_own() -> None:
    run = resolve(spec(length=Length(flops=(1e11, 2e11, 4e11)), global_batch=4))
    first, *others = run.schedules
    assert run.steps == (609, 1219, 2438)  # of 6 x 106,816 x 256 = 1.641e8 FLOPs each
    assert all((other.lr, other.warmup_steps) == (first.lr, first.warmup_steps) for other in others)
    assert [schedule.decay_steps for schedule in run.schedules] == [round(0.2 * steps) for steps in run.steps]


def test_the_line_for_people_names_each_rule_or_that_it_is_set() -> None:
    by_rule = resolve(spec(length=Length(steps=600), rules=Rules(lr="kaplan"), global_batch=None))
    assert by_rule.described() == (
        f"run: 600 steps of {by_rule.global_batch} sequences (rule deepseek), the first 30 warm up (rule study), "
        f"learning rate {by_rule.schedules[0].lr:.4g} (rule kaplan); outside of the range that deepseek was fitted on"
    )
    schedule = WSD(lr=1e-3, warmup_fraction=0.1)
    given = resolve(spec(length=Length(flops=(1e11, 2e11)), schedule=schedule, global_batch=4))
    assert given.described() == (
        "run: 609 and 1,219 steps of 4 sequences (as set), the first 86 warm up (as set), learning rate 0.001 (as set)"
    )


def test_a_budget_below_a_step_names_what_may_change() -> None:
    with pytest.raises(UserError, match=r"below one step of llada 107k.*smaller batch, sequence length or shape"):
        resolve(spec(length=Length(flops=(1e5,))))
