"""A tuning plan: a grid of rates and batches around the rules, at budgets whose losses meet."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from llada_lightning.objectives import OBJECTIVES
from llada_lightning.study.plan import Grid, Machine, Plan, Recipe, Stream, TuningGrid, plan_study
from llada_lightning.study.plan.outputs import Destination, sweep_text
from llada_lightning.support.errors import UserError

STREAM = Stream(vocab_size=512, sequence_length=64)
BUDGETS = [1e13, 2e13, 4e13]


def tuning(grid: TuningGrid | None = None, points: int = 1, **arguments: object) -> Plan:
    given = {"overlap": True, "grid": Grid(points=points), **arguments}
    return plan_study(BUDGETS, STREAM, tuning=grid or TuningGrid(), **given)  # type: ignore[arg-type]


def test_every_budget_has_a_grid_of_four_rates_and_three_batches_at_the_centre() -> None:
    plan = tuning()
    table = plan.table()
    assert len(plan.runs()) == len(table) == 2 * 3 * 4 * 3
    assert table.trunk.is_unique
    assert plan.budgets_of("arm") == (2.63e11, 5.26e11, 1.05e12)
    for (name, budget), rows in table.groupby(["objective", "budget"]):
        assert rows["shape"].nunique() == 1
        assert len(rows[["lr", "global_batch"]].drop_duplicates()) == len(rows) == 12
        rates, batches = sorted(rows.lr.unique()), sorted(rows.global_batch.unique())
        assert [after / before for before, after in pairwise(rates)] == pytest.approx([2, 2, 2], rel=0.01)
        assert [after / before for before, after in pairwise(batches)] == [2, 2]
        rule = 0.3118 * budget**-0.125 * OBJECTIVES[name].lr_scale
        assert (rates[1] * rates[2]) ** 0.5 == pytest.approx(rule, rel=0.01)


def test_where_rate_batch_and_shape_are_numbers_one_run_serves_all_budgets() -> None:
    shapes, recipe = Grid(shapes=("107k",)), Recipe(lr=0.003, batch=8)
    shared, apart = (
        plan_study(
            BUDGETS, STREAM, objectives=["llada"], tuning=TuningGrid(), grid=shapes, recipe=recipe, separate=separate
        )
        for separate in (False, True)
    )
    assert (len(shared.runs()), len(apart.runs())) == (12, 36)
    columns = ["budget", "lr", "global_batch", "steps"]
    first, second = (plan.table()[columns].sort_values(columns, ignore_index=True) for plan in (shared, apart))
    assert first.equals(second)
    # One decay of a fifth for each budget, and the rest of the largest run: 0.8 + 0.2 * 7 / 4 of 4e13 instead of 7e13.
    flops = [plan.totals()["flops_total"] for plan in (shared, apart)]
    assert flops[0] / flops[1] == pytest.approx((0.8 + 0.2 * 7 / 4) / (7 / 4), rel=0.01)


def test_the_shape_is_the_one_that_a_plan_has_in_its_middle() -> None:
    usual = plan_study(BUDGETS, STREAM, objectives=["llada"], grid=Grid(points=3)).table()
    for (_, budget), rows in tuning(objectives=["llada"], overlap=False).table().groupby(["objective", "budget"]):
        middle = usual[usual.budget == budget].sort_values("params_nonembedding")["shape"].iloc[1]
        assert set(rows["shape"]) == {middle}


@pytest.mark.parametrize(
    ("recipe", "centre"),
    [
        (Recipe(lr_scale={"llada": 0.5}), 0.5 * 0.3118 * 1e13**-0.125),
        (Recipe(lr=0.01), 0.01),
        (Recipe(lr_rule="kaplan"), None),
    ],
)
def test_the_centre_is_what_the_user_gives(recipe: Recipe, centre: float | None) -> None:
    rows = tuning(TuningGrid([1.0], [1.0]), objectives=["llada"], overlap=False, recipe=recipe).table()
    first = rows[rows.budget == 1e13].iloc[0]
    kaplan = plan_study([1e13], STREAM, objectives=["llada"], recipe=Recipe(lr_rule="kaplan"), grid=Grid(points=3))
    expected = centre or kaplan.table().set_index("shape").lr[first["shape"]]
    assert first.lr == pytest.approx(expected, rel=5e-3)


def test_a_batch_that_cannot_be_halved_moves_the_grid_up() -> None:
    rows = tuning(TuningGrid(batches=[0.25, 0.5, 1.0]), recipe=Recipe(batch=1)).table()
    assert sorted(rows.global_batch.unique()) == [1, 2, 4]
    machine = Machine(devices=4, micro_batch=2)
    rows = tuning(recipe=Recipe(batch=8), machine=machine).table()
    assert sorted(rows.global_batch.unique()) == [8, 16, 32]


def test_a_grid_that_is_continued_repeats_no_run() -> None:
    """More rates: what both grids have are the same runs, setting for setting."""

    def configs(rates: list[float]) -> list[str]:
        plan = tuning(TuningGrid(rates))
        return yaml.safe_load(sweep_text(plan, Destination("tune", "data"), "tune", []))["parameters"]["config"][
            "values"
        ]

    short, long = configs([0.5, 1.0]), configs([0.25, 0.5, 1.0])
    assert set(short) < set(long) and len(long) == 54


def test_seeds_and_shapes_multiply_the_grid() -> None:
    plan = tuning(points=3, seeds=[0, 1], objectives=["arm"], overlap=False)
    assert len(plan.runs()) == 3 * 3 * 12 * 2


def test_a_study_too_small_for_a_law_or_a_quadratic_is_said() -> None:
    notes = plan_study(
        [1e13, 2e13], STREAM, objectives=["arm"], grid=Grid(points=1), tuning=TuningGrid([1.0, 2.0])
    ).warnings()
    assert any("arm is tuned at 2 budget(s); a law needs 3" in note for note in notes)
    assert sum("2 rates and 3 batches; a quadratic needs 3 rates" in note for note in notes) == 2
    assert not any("rules were fitted on" in note or "out of reach" in note for note in tuning().warnings())


@pytest.mark.parametrize(
    ("grid", "words"),
    [
        (TuningGrid(rates=[0.0]), "--tune-rates 0 must be a number above 0"),
        (TuningGrid(batches=[float("nan")]), "--tune-batches nan must be"),
        (TuningGrid(rates=[1.0, 1.0]), "--tune-rates 1 1: give each factor once"),
        (TuningGrid(rates=[]), "give each factor once, and at least one"),
    ],
)
def test_factors_that_make_no_grid_are_refused(grid: TuningGrid, words: str) -> None:
    with pytest.raises(UserError, match="plan: ") as error:
        tuning(grid)
    assert words in str(error.value)


def test_every_run_of_a_sweep_has_its_own_rate_and_batch(tmp_path: Path) -> None:
    plan = tuning(objectives=["llada"], overlap=False)
    values = yaml.safe_load(sweep_text(plan, Destination("tune", "data"), "tune", []))["parameters"]["config"]["values"]
    configs = [yaml.safe_load(value) for value in values]
    pairs = {
        (
            config["budget"]["flops"],
            config["model"]["init_args"]["schedule"]["lr"],
            config["data"]["init_args"]["global_batch"],
        )
        for config in configs
    }
    assert len(pairs) == 36
