"""What several objectives beside the reference say: at one loss, and of each other."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from helpers.studies import VALLEYS, simulated_study
from llada_lightning.study.fits import StudyFits, fit_table
from llada_lightning.study.report.verdict import verdict
from llada_lightning.study.tables.study import headline_lines
from llada_lightning.study.tables.style import with_short_powers

BUDGETS = tuple(np.geomspace(1e17, 1e19, 5))
RECIPE = "llada [loss_weight=ce]"


def with_recipe(factor: float, budgets: tuple[float, ...] | None = None) -> pd.DataFrame:
    """Both objectives, and `llada` by a recipe whose loss is that of `llada` times a factor, at some of the budgets."""
    table = simulated_study(VALLEYS, noise=0.001, budgets=BUDGETS)[0]
    other = table[table["objective"] == "llada"]
    if budgets is not None:
        near = np.abs(np.log(other["flops_6nd"].to_numpy(float)[:, None] / np.array(budgets))) < 0.1
        other = other[near.any(axis=1)]
    other = other.assign(variant="loss_weight=ce", val_nats_per_token=factor * other["val_nats_per_token"], seed=2)
    return pd.concat([table, other], ignore_index=True)


@pytest.fixture(scope="module")
def better() -> tuple[pd.DataFrame, StudyFits]:
    table = with_recipe(0.98)
    return table, fit_table(table, samples=200, conventions=("6nd",))


def test_multipliers_are_told_at_one_loss_first(better: tuple[pd.DataFrame, StudyFits]) -> None:
    _, fits = better
    (common,) = fits.common
    assert (common.reference, common.convention, common.method) == ("arm", "6nd", "read-off")
    assert list(common.multipliers) == ["llada", RECIPE]
    for name, estimate in common.multipliers.items():
        (entry,) = (
            entry
            for entry in fits.compute_multiplier
            if entry.point == (name, "arm", "6nd", common.reference_flops) and entry.method == "read-off"
        )
        assert entry.shown and estimate == entry.estimate
    assert common.multipliers[RECIPE].value < common.multipliers["llada"].value
    lines = headline_lines(fits, "6nd")
    told = [common.words, fits.contrasts[0].words]
    assert [line.strip() for line in lines[:2]] == list(map(with_short_powers, told))
    assert fits.as_dict()["common"][0]["multipliers"][RECIPE]["value"] == common.multipliers[RECIPE].value


@pytest.mark.parametrize(("factor", "pair"), [(0.98, ("llada", RECIPE)), (1.02, (RECIPE, "llada"))])
def test_two_objectives_are_compared_with_each_other(factor: float, pair: tuple[str, str]) -> None:
    fits = fit_table(with_recipe(factor), samples=200, conventions=("6nd",))
    (own,) = fits.contrasts
    assert (own.objective, own.better) == pair
    assert len(own.higher) == len(BUDGETS)
    points = fits.objectives["llada"].envelope["6nd"].points
    for point, higher in zip(points, own.higher.values(), strict=True):
        assert higher.value == pytest.approx(abs(1 - factor) * point.loss, rel=0.05)
        assert higher.low < higher.value < higher.high
    assert own.factor is not None and own.flops is not None
    lines = [fits.line(name, "read-off", "6nd", name) for name in pair]
    assert lines[0] and lines[1]
    same = lines[0].loss([own.factor.value * own.flops])[0]  # the loss that the better one reaches with these FLOPs
    assert same == pytest.approx(lines[1].loss([own.flops])[0], rel=1e-3)
    assert own.words.startswith(f"Of {pair[0]} and {pair[1]} (6ND), the former needs {own.factor.value:.3g} (")


def test_equal_objectives_are_not_told_apart() -> None:
    fits = fit_table(with_recipe(1.0), samples=200, conventions=("6nd",))
    assert all(own.low < 0 < own.high for own in fits.contrasts[0].higher.values())


def test_budgets_that_do_not_meet_give_no_contrast() -> None:
    table = with_recipe(0.98)
    recipe = table["variant"].notna().to_numpy()
    table.loc[recipe, ["flops_6nd", "flops_total"]] *= 1e4
    assert fit_table(table, samples=100, conventions=("6nd",)).contrasts == []


def test_the_verdict_compares_objectives_at_one_loss_and_directly(better: tuple[pd.DataFrame, StudyFits]) -> None:
    table, fits = better
    first, second, third, last = verdict(table, fits, "6nd")
    (common,), (contrast,) = fits.common, fits.contrasts
    assert first.startswith("For the loss of ") and f" and {RECIPE} needs " in first
    assert f"that arm reaches with {common.reference_flops:.3g}".replace("e+", "e") in first
    assert second == with_short_powers(contrast.words)
    assert "the methods that are relied on at that loss for llada (" in third.lower()
    assert last.startswith("Compared are ")


def test_one_objective_beside_the_reference_has_neither() -> None:
    table = simulated_study(VALLEYS, noise=0.001, budgets=BUDGETS)[0]
    fits = fit_table(table, samples=100, conventions=("6nd",))
    assert fits.common == [] and fits.contrasts == []
    assert fits.answers("6nd") == [own.words for own in fits.headlines]
