"""Plans: grids, hyperparameters, trunks, and what they save, against numbers counted by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llada_lightning.compute.flops import Convention, cost_of_budgets, expected_length
from llada_lightning.compute.rules import Size, learning_rate
from llada_lightning.compute.shapes import get_shape
from llada_lightning.objectives import OBJECTIVES
from llada_lightning.run import Source
from llada_lightning.study.plan import Grid, Machine, Plan, Recipe, Stream, plan_study
from llada_lightning.study.plan.trunk import GRID_ANCHOR, GRID_STEP, grid_shapes, planned_shape
from llada_lightning.support.errors import UserError

STREAM = Stream(vocab_size=1024, sequence_length=128)
SHAPES = Grid(shapes=["107k", "214k", "443k"])


def test_a_row_counted_by_hand() -> None:
    """107k at 1e12 FLOPs, batch 16: N 106 816, 16 x 127.365 expected tokens a step."""
    plan = plan_study([1e12], STREAM, grid=SHAPES, recipe=Recipe(batch=16, lr=0.01))
    row = plan.table().query("objective == 'llada' and shape == '107k'").iloc[0]
    tokens_per_step = 16 * (0.99 * 128 + 0.01 * 129 / 2)
    steps = round(1e12 / (6 * 106_816 * tokens_per_step))
    assert (row.steps, row.warmup_steps, row.decay_steps) == (steps, round(0.05 * steps), round(0.2 * steps))
    tokens = steps * tokens_per_step
    assert row.tokens == pytest.approx(tokens)
    assert row.tokens_per_param == pytest.approx(tokens / 106_816)
    assert row.params_total == 106_816 + 2 * 1024 * 64
    assert row.flops_6nd == pytest.approx(6 * 106_816 * tokens)
    assert row.flops_attention == pytest.approx(12 * 2 * 64 * 128 * tokens)
    assert row.flops_head == pytest.approx(6 * 64 * 1024 * tokens * 1.001 / 2)
    assert (row.global_batch, row.global_batch_tokens, row.lr) == (16, 2048, 0.01)


def test_the_grid_lies_around_each_objectives_centre_and_is_common_to_all() -> None:
    plan = plan_study([1e18, 3e18, 1e19], Stream(50_257, 1024))
    table = plan.table()
    on_grid = {shape.params_nonembedding for shape in grid_shapes()}
    assert set(table.params_nonembedding) <= on_grid
    for (objective, _), rows in table.groupby(["objective", "budget"]):
        assert len(rows) == 5
        logs = sorted(math.log(ratio / OBJECTIVES[objective].tokens_per_param, 3) for ratio in rows.tokens_per_param)
        assert abs(logs[2]) < 0.55  # the middle one is at most half a step of the grid away, and rounding
        assert all(0.9 < upper - lower < 1.1 for lower, upper in pairwise(logs))
    by_objective = {name: set(rows["shape"]) for name, rows in table.groupby("objective")}
    assert len(by_objective["arm"] & by_objective["llada"]) >= 4


def test_the_grid_is_the_anchor_times_powers_of_its_step() -> None:
    for shape in grid_shapes():
        if shape.params_nonembedding > 1e6:
            power = math.log(shape.params_nonembedding / GRID_ANCHOR, GRID_STEP)
            assert abs(power - round(power)) < 0.11


def test_ratios_and_shapes_replace_the_grid() -> None:
    by_ratio = plan_study([1e18, 2e18], Stream(50_257, 1024), grid=Grid(tokens_per_param=[5, 10, 20, 40])).table()
    for _, rows in by_ratio.groupby(["objective", "budget"]):
        assert sorted(rows.tokens_per_param) == pytest.approx([5, 10, 20, 40], rel=0.12)
    by_shape = plan_study([1e11, 2e11], STREAM, grid=SHAPES).table()
    for _, rows in by_shape.groupby(["objective", "budget"]):
        assert list(rows["shape"]) == ["107k", "214k", "443k"]


def test_a_shape_is_taken_as_the_table_prints_it() -> None:
    chosen = plan_study([1e18], Stream(50_257, 1024))
    shapes = list(dict.fromkeys(trunk.shape for trunk in chosen.trunks))
    assert [planned_shape(shape.depth_by_width) for shape in shapes] == shapes
    assert planned_shape("22x2048") == get_shape("arm-1b")
    printed = plan_study([1e12], STREAM, grid=Grid(shapes=["2x64", "4x64", "4x128"]))
    assert printed.trunks == plan_study([1e12], STREAM, grid=Grid(shapes=["107k", "214k", "853k"])).trunks


@pytest.mark.parametrize("name", ["1x16", "0x64", "9x9", "7x", "nothing"])
def test_a_shape_that_is_none_names_the_form_and_no_other_option(name: str) -> None:
    budgets, grid = [2e11, 4e11], Grid(shapes=[name, "107k", "214k"])
    with pytest.raises(UserError, match=r"such as L[12]-d") as refused:
        plan_study(budgets, STREAM, grid=grid, overlap=True, multiplier=38)
    assert "--overlap" not in str(refused.value) and name in str(refused.value)


@settings(max_examples=40, deadline=None)
@given(
    exponents=st.lists(st.integers(0, 60), min_size=1, max_size=4, unique=True),
    convention=st.sampled_from(["6nd", "total"]),
    length=st.sampled_from([64, 256, 2048]),
    separate=st.booleans(),
)
def test_every_result_is_within_half_a_step_of_its_budget(
    exponents: list[int], convention: Convention, length: int, separate: bool
) -> None:
    """So both objectives spend the same, by the convention chosen, to within half a step of each."""
    budgets = [1e12 * 1.3**exponent for exponent in exponents]
    plan = plan_study(budgets, Stream(4096, length), convention=convention, separate=separate)
    assert set(plan.table().budget) == set(budgets)
    for trunk in plan.trunks:
        per_step = trunk.per_step.by(convention)
        steps = [branch.steps for branch in trunk.branches]
        assert steps == sorted(set(steps))
        for branch in trunk.branches:
            assert abs(branch.steps * per_step - branch.budget) <= per_step * (0.5 + 1e-9 * branch.steps)
            assert trunk.warmup_steps <= branch.fork_step <= branch.steps


def test_the_convention_decides_what_is_equal() -> None:
    for convention, column in (("6nd", "flops_6nd"), ("total", "flops_total")):
        table = plan_study([1e13], STREAM, grid=SHAPES, convention=convention).table()  # type: ignore[arg-type]
        spent = table[column]
        assert spent.max() / spent.min() < 1.03, "half a step at most"
    assert table.flops_6nd.max() / table.flops_6nd.min() > 1.1  # then 6ND differs


# --- hyperparameters -------------------------------------------------------------------------------------------------


def test_a_trunk_follows_the_rules_at_the_geometric_mean_of_its_budgets() -> None:
    [trunk] = [t for t in plan_study([1e17, 4e17], STREAM, grid=SHAPES).trunks if t.name == "arm-443k-s0"]
    assert trunk.lr == pytest.approx(learning_rate("deepseek", Size(math.nan, math.nan, 2e17)), rel=0.005)
    wanted = 0.2920 * 2e17**0.3271 / expected_length(128, 0.01)  # 1 069 sequences
    assert trunk.global_batch == 2 ** round(math.log2(wanted)) == 1024


def test_rules_and_numbers_can_be_chosen() -> None:
    kaplan = plan_study([1e12], STREAM, grid=SHAPES, recipe=Recipe(lr_rule="kaplan")).table()
    assert kaplan.lr.iloc[0] == pytest.approx(learning_rate("kaplan", Size(106_816, 0, 0)), rel=0.005)
    given_numbers = Recipe(lr=0.002, batch=12, warmup_steps=3, decay_fraction=0.5)
    fixed = plan_study([1e12], STREAM, grid=SHAPES, recipe=given_numbers).table()
    assert set(fixed.lr) == {0.002} and set(fixed.global_batch) == {12} and set(fixed.warmup_steps) == {3}
    assert list(fixed.decay_steps) == [round(0.5 * steps) for steps in fixed.steps]


def test_each_objective_may_have_its_own_rate() -> None:
    plain = plan_study([1e12], STREAM, grid=SHAPES).table().groupby("objective").lr.first()
    scaled = plan_study([1e12], STREAM, grid=SHAPES, recipe=Recipe(lr_scale={"llada": 0.4})).table()
    rates = scaled.groupby("objective").lr.first()
    assert rates["arm"] == plain["arm"]
    assert rates["llada"] == pytest.approx(0.4 * plain["llada"], rel=0.01)


def test_the_batch_shrinks_rather_than_the_steps() -> None:
    budget = 50 * 6 * get_shape("443k").params_nonembedding * expected_length(128, 0.01) * 1.01  # 50 steps at batch 1
    plan = plan_study([budget], STREAM, grid=SHAPES)
    smallest = next(trunk for trunk in plan.trunks if trunk.name == "arm-443k-s0")
    assert smallest.global_batch == 1
    assert smallest.branches[0].steps >= 50
    assert not any("fewer than 50 steps" in line for line in plan.warnings())


def test_devices_and_micro_batches_divide_the_batch() -> None:
    plan = plan_study([1e12], STREAM, grid=SHAPES, machine=Machine(devices=6, micro_batch=2))
    for trunk in plan.trunks:
        assert trunk.global_batch % 12 == 0
        assert trunk.accumulation == trunk.global_batch // 12
    with pytest.raises(UserError, match=r"global batch 16 is no multiple of 6 device\(s\)"):
        plan_study([1e12], STREAM, grid=SHAPES, recipe=Recipe(batch=16), machine=Machine(devices=6))


# --- trunks ----------------------------------------------------------------------------------------------------------


def four_budgets(separate: bool = False, decay: float = 0.15) -> Plan:
    """Four budgets spaced by 2 on the same three shapes."""
    recipe = Recipe(batch=16, decay_fraction=decay)
    return plan_study([1e12, 2e12, 4e12, 8e12], STREAM, grid=SHAPES, recipe=recipe, separate=separate)


def test_trunks_save_what_was_counted_by_hand() -> None:
    """8 x 0.85 to the last fork and 15 x 0.15 of decays, against 15: 1 - 9.05 / 15 = 39.7 %."""
    assert cost_of_budgets([1, 2, 4, 8], 0.15) == pytest.approx(9.05)
    totals = four_budgets().totals()
    assert totals["saved_share"] == pytest.approx(1 - 9.05 / 15, abs=0.002)
    assert (totals["runs"], totals["results"]) == (6, 24)
    computed = 3 * 2 * cost_of_budgets([1e12, 2e12, 4e12, 8e12], 0.15)
    assert totals["flops_6nd"] == pytest.approx(computed, rel=0.005)
    assert totals["flops_total"] == pytest.approx(
        totals["flops_6nd"] + totals["flops_attention"] + totals["flops_head"]
    )


@given(st.lists(st.floats(1e6, 1e24), min_size=1, max_size=6), st.floats(0, 0.99))
def test_a_trunk_costs_at_least_its_largest_budget_and_at_most_all(flops: list[float], decay: float) -> None:
    cost = cost_of_budgets(flops, decay)
    assert max(flops) * (1 - 1e-9) <= cost <= math.fsum(flops) * (1 + 1e-9)
    assert cost_of_budgets(flops[:1], decay) == pytest.approx(flops[0])


def test_separate_runs_agree_with_the_branches_in_all_but_sharing() -> None:
    shared, separate = four_budgets(), four_budgets(separate=True)
    columns = [column for column in shared.table().columns if column != "trunk"]
    assert shared.table()[columns].equals(separate.table()[columns])
    assert len(separate.runs()) == 24
    assert separate.table().trunk.nunique() == 24
    assert separate.totals()["saved_share"] == 0
    assert separate.totals()["flops_total"] == pytest.approx(shared.table().flops_total.sum())


def test_each_seed_has_trunks_of_its_own() -> None:
    plan = plan_study([1e12, 2e12], STREAM, grid=SHAPES, seeds=(3, 5), seeds_at="all")
    assert len(plan.runs()) == 2 * 3 * 2
    assert set(plan.table().groupby("seed").trunk.nunique()) == {6}


def test_further_seeds_are_run_at_the_middle_shape_of_the_smallest_budgets() -> None:
    budgets = [1e12, 2e12, 4e12, 8e12]
    rows = plan_study(budgets, STREAM, grid=SHAPES, seeds=(3, 5, 7)).table()
    first = rows[rows["seed"] == 3]
    for seed in (5, 7):
        own = rows[rows["seed"] == seed]
        assert sorted(own["budget"]) == sorted(2 * budgets[:3])  # of both objectives
        for row in own.to_dict("records"):
            same = first[(first["objective"] == row["objective"]) & (first["budget"] == row["budget"])]
            middle = same.sort_values("params_nonembedding").iloc[1]
            for name in ("shape", "lr", "global_batch", "warmup_steps", "steps", "decay_steps"):
                assert row[name] == middle[name], name
    assert (
        rows[rows["seed"] == 3]
        .drop(columns="seed")
        .equals(
            plan_study(budgets, STREAM, grid=SHAPES, seeds=(3,)).table().drop(columns="seed").set_index(first.index)
        )
    )


# --- data, warnings --------------------------------------------------------------------------------------------------


def test_data_needed_is_set_against_data_present() -> None:
    stream = Stream(1024, 128, sources=(Source(3.0, 600), Source(1.0, 100)))
    plan = plan_study([1e12], stream, grid=SHAPES, recipe=Recipe(batch=16))
    row = plan.table().query("objective == 'arm' and shape == '107k'").iloc[0]
    # Of 16 sequences a step, a quarter come from the source of 100, which repeats most.
    assert row.epochs == pytest.approx(row.steps * 16 / 4 / 100)
    totals = plan.totals()
    assert totals["tokens_present"] == 700 * 128
    assert totals["epochs"] == pytest.approx(row.epochs)
    assert any("Muennighoff" in line for line in plan.warnings())
    assert plan_study([1e12], STREAM, grid=SHAPES).table().epochs.isna().all()


def test_shapes_that_are_all_on_one_side_of_the_best_are_said_in_one_line() -> None:
    def said(*budgets: float, **arguments: Any) -> list[str]:
        plan = plan_study(budgets, STREAM, **arguments)
        return [line for line in plan.warnings() if "best shape" in line]

    plan = plan_study([1e9, 4e9, 1e15], STREAM)
    reached = plan.table().query("budget == 4e9").groupby("objective").tokens_per_param.max()
    [line] = said(1e9, 4e9, 1e15)
    ends = "at 1e+09 to 4e+09 FLOPs (at most"
    assert line == (
        f"the best shape may be smaller than all that are proposed: arm {ends} {reached['arm']:.3g} tokens per "
        f"parameter, best expected at 25), llada {ends} {reached['llada']:.3g} tokens per parameter, best expected at "
        "105); plan larger budgets, or give smaller --shapes"
    )
    [line] = said(1e10, objectives=["llada"])
    assert "proposed: llada at 1e+10 FLOPs (at most" in line
    [line] = said(1e15, objectives=["arm"], grid=Grid(centres={"arm": 1e-9}))
    assert "may be larger than" in line and line.endswith("plan smaller budgets, or give larger --shapes")
    assert not said(1e15) and not said(1e9, grid=SHAPES)


def test_few_steps_are_said() -> None:
    notes = plan_study([1e10], STREAM, grid=SHAPES, recipe=Recipe(batch=16)).warnings()
    assert any("fewer than 50 steps" in line for line in notes)


# --- refusals --------------------------------------------------------------------------------------------------------


def test_budgets_are_sorted() -> None:
    assert plan_study([4e12, 1e12], STREAM, grid=SHAPES).budgets == (1e12, 4e12)


@pytest.mark.parametrize(
    ("budgets", "arguments", "words"),
    [
        ([], {}, "holds no budget"),
        ([1e12, 1e12], {}, "given twice"),
        ([-1e12], {}, "above 0"),
        ([math.inf], {}, "inf is not a number of FLOPs"),
        ([1e6], {"grid": SHAPES}, r"is below one step of arm 107k"),
        ([1e12], {"grid": Grid(shapes=["107k", "214k"])}, r"2 shape\(s\) of arm \(107k, 214k\)"),
        ([1e12], {"grid": Grid(shapes=["107k", "107k", "214k"])}, "needs 3"),
        ([1e12], {"grid": Grid(tokens_per_param=[20, 20, 20.001])}, "1 shape"),
        ([1e12], {"grid": Grid(tokens_per_param=[20, -5, 10])}, "--tokens-per-param -5"),
        ([1e12], {"grid": Grid(shapes=["107k"], tokens_per_param=[20])}, "both given"),
        ([1e12], {"grid": Grid(points=2)}, "--points 2"),
        ([1e12], {"grid": Grid(centres={"arm": 0.0, "llada": 1.0})}, "--centre-arm 0"),
        ([1e12], {"recipe": Recipe(lr=-1.0)}, "--lr -1"),
        ([1e12], {"recipe": Recipe(lr_scale={"llada": 0.0})}, "--lr-scale-llada 0 must be"),
        ([1e12], {"recipe": Recipe(batch=0)}, "--batch 0"),
        ([1e12], {"recipe": Recipe(decay_fraction=1.0)}, "--decay-fraction 1"),
        ([1e12], {"grid": SHAPES, "recipe": Recipe(warmup_steps=10**6)}, "warmup ends at step 1000000"),
        ([1e12, 1.0000001e12], {"grid": SHAPES}, "make 766 and 766 steps of arm 107k"),
        ([1e12], {"stream": replace(STREAM, random_length_share=5)}, "random_length_share 5 must lie"),
        ([1e12], {"stream": replace(STREAM, mask_eps=7)}, "mask_eps 7 must lie"),
        ([1e12], {"seeds": (1, 1)}, "--seeds 1 1"),
        ([1e12], {"objectives": ()}, "--objectives"),
    ],
)
def test_what_makes_no_plan_is_refused_in_one_line(budgets: list[float], arguments: dict, words: str) -> None:
    with pytest.raises(UserError, match=words) as refused:
        plan_study(budgets, **{"stream": STREAM, **arguments})
    assert "\n" not in str(refused.value)
