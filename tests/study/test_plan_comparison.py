"""What a plan says of its comparison: rules beyond their range, losses that do not meet, short runs, and the remedy."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llada_lightning.objectives import OBJECTIVES
from llada_lightning.run import Source
from llada_lightning.study.plan import Grid, Plan, Recipe, Stream, plan_study
from llada_lightning.study.plan.comparison import budgets_of, comparison_notes, measured_multiplier, overlap_factor
from llada_lightning.support.errors import UserError

STREAM = Stream(vocab_size=512, sequence_length=64)
SHAPES = Grid(shapes=["107k", "214k", "443k"])


def the_note(plan: Plan, words: str) -> str | None:
    """The only note of a plan that holds some words; None where there is none."""
    found = [note for note in plan.warnings() if words in note]
    assert len(found) <= 1
    return found[0] if found else None


def test_rules_outside_of_their_range_are_one_note_with_the_furthest_factor() -> None:
    note = the_note(plan_study([1e11, 4e11], STREAM, grid=SHAPES), "rules were fitted on")
    assert note is not None and "deepseek at 2e+11 FLOPs, 5e+05 times below 1e+17 to 2e+19" in note and "--tune" in note
    mixed = plan_study([1e11, 4e11], STREAM, grid=SHAPES, recipe=Recipe(lr_rule="kaplan", batch_rule="step-law"))
    note = the_note(mixed, "rules were fitted on")
    assert note is not None and "step-law at" in note and "tokens" in note and "kaplan" not in note


def test_within_their_range_or_replaced_by_numbers_rules_are_not_mentioned() -> None:
    inside = plan_study([1e18, 2e18], Stream(50_257, 1024))
    numbers = plan_study([1e11, 2e11], STREAM, grid=SHAPES, recipe=Recipe(lr=1e-3, batch=4))
    assert the_note(inside, "rules were fitted on") is None
    assert the_note(numbers, "rules were fitted on") is None


@given(st.lists(st.floats(1e10, 1e20), min_size=1, max_size=4, unique=True), st.floats(1, 1e3))
def test_overlapping_budgets_are_the_others_over_the_multiplier(budgets: list[float], multiplier: float) -> None:
    factor = overlap_factor(budgets, ["arm", "llada"], "6nd", multiplier)
    assert factor == multiplier and budgets_of("llada", budgets, factor) == tuple(budgets)
    assert budgets_of("arm", budgets, factor) == pytest.approx([budget / multiplier for budget in budgets], rel=6e-3)


def test_the_multiplier_is_the_one_measured_nearest() -> None:
    factor = overlap_factor([1e13, 1e14], ["arm", "llada"], "6nd", None)
    assert budgets_of("arm", [1e13, 1e14], factor) == (2.63e11, 2.63e12)
    assert budgets_of("arm", [1e20], overlap_factor([1e20], ["llada", "arm"], "6nd", None)) == (5e18,)
    found = measured_multiplier("llada", "total", 1e13)
    assert found is not None and found[0] == 20
    assert measured_multiplier("arm", "6nd", 1e13) is None


def test_a_multiplier_that_was_measured_far_away_is_told_unless_one_is_given() -> None:
    def told(**options: Any) -> list[str]:
        notes = comparison_notes(plan_study([1e15, 2e15], STREAM, grid=SHAPES, overlap=True, **options))
        return [note for note in notes if "may not meet" in note]

    [note] = told()
    assert "lowered by 38, which was measured at 5e+13 FLOPs of llada; here llada has 2e+15 at most" in note
    assert told(multiplier=38) == []


@pytest.mark.parametrize("names", [["arm"], ["llada"]])
def test_there_is_nothing_to_overlap_without_the_reference_and_another(names: list[str]) -> None:
    with pytest.raises(UserError, match=rf"--objectives names {names[0]}: give arm and another one"):
        overlap_factor([1e12], names, "6nd", None)


def test_without_a_measured_multiplier_one_must_be_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OBJECTIVES, "llada", replace(OBJECTIVES["llada"], multipliers={}))
    with pytest.raises(UserError, match="no multiplier of llada was measured; give one by --multiplier"):
        plan_study([1e12, 2e12], STREAM, grid=SHAPES, overlap=True)
    plan = plan_study([1e12, 2e12], STREAM, grid=SHAPES, overlap=True, multiplier=8)
    assert (plan.budgets_of("arm"), plan.budgets_of("llada")) == ((1.25e11, 2.5e11), (1e12, 2e12))


def test_with_overlap_the_losses_meet_and_the_other_objectives_runs_are_as_before() -> None:
    before, after = (plan_study([1e12, 2e12], STREAM, grid=SHAPES, overlap=overlap) for overlap in (False, True))
    assert the_note(before, "share no loss") is not None
    assert the_note(after, "share no loss") is None
    assert after.budgets == (2.63e10, 5.26e10, 1e12, 2e12)
    assert [own for own in before.trunks if own.objective == "llada"] == [
        own for own in after.trunks if own.objective == "llada"
    ]


def test_budgets_that_a_wrong_multiplier_has_put_too_low_are_said() -> None:
    lowered = plan_study([1e13, 2e13], STREAM, grid=SHAPES, overlap=True, multiplier=100)
    assert the_note(lowered, "share no loss") is None  # by the multiplier that was given they meet
    note = the_note(replace(lowered, multiplier=5), "share no loss")
    assert note is not None and "arm's end at 2e+11 FLOPs, llada's begin at 1e+13" in note
    assert "A factor of 10 is missing: give a smaller --multiplier" in note


def test_short_results_are_counted_where_both_objectives_have_their_losses() -> None:
    """By hand: 107k at batch 16 takes 6 x 106,816 x 16 x 63.685 = 6.53e8 FLOPs a step; 1e11 are 153 steps."""
    budgets = [1e11, 1e12, 1e13]
    plan = plan_study(budgets, STREAM, grid=SHAPES, recipe=Recipe(batch=16), multiplier=10)
    table = plan.table()
    shared = table[
        ((table.objective == "arm") & (table.budget <= 1e12)) | ((table.objective == "llada") & (table.budget >= 1e12))
    ]
    short = shared[shared.steps < 500]
    assert (len(shared), len(short)) == (12, 5)
    fewest = int(table.query("objective == 'arm' and shape == '443k' and budget == 1e11").steps.iloc[0])
    note = the_note(plan, "fewer than 500 steps")
    assert note is not None
    assert note.startswith("5 of 12 results whose losses arm and llada may share have fewer than 500 steps")
    assert f"the fewest: {fewest} of arm at 1e+11 FLOPs" in note


def test_long_results_single_objectives_and_losses_apart_have_no_note_on_short_results() -> None:
    recipe = Recipe(batch=1)
    assert (
        the_note(plan_study([1e13, 1e14], STREAM, grid=SHAPES, recipe=recipe, multiplier=2), "fewer than 500") is None
    )
    assert the_note(plan_study([1e10], STREAM, grid=SHAPES, objectives=["arm"]), "fewer than 500") is None
    assert the_note(plan_study([1e11], STREAM, grid=SHAPES), "fewer than 500") is None


def test_epochs_are_counted_for_every_objective() -> None:
    stream = Stream(vocab_size=512, sequence_length=64, sources=(Source(1.0, 10_000),))
    plan = plan_study([1e12, 4e12], stream, grid=SHAPES, recipe=Recipe(batch=16), overlap=True)
    totals, table = plan.totals(), plan.table()
    for name, rows in table.groupby("objective"):
        own = totals["by_objective"][name]
        assert own["epochs"] == pytest.approx(rows.epochs.max())
        assert own["tokens_needed"] == pytest.approx(rows.tokens.max())
    assert totals["epochs"] == totals["by_objective"]["llada"]["epochs"] > 2
    note = the_note(plan, "read the data up to")
    assert note is not None and "results of llada" in note and "is not known" in note
    assert math.isclose(totals["by_objective"]["arm"]["epochs"], totals["epochs"] / 38, rel_tol=0.02)
