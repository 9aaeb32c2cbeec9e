"""IsoFLOP parabolas: optima recovered, bias flagged, what they lack said."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from helpers.studies import CHINCHILLA, VALLEYS, Chinchilla, World, record, simulated_study
from llada_lightning.study.fits import IsoflopFit, fit_isoflop, fit_table
from llada_lightning.study.fits.runs import in_canonical_order, noise_of_runs
from llada_lightning.study.fits.uncertainty import Spread
from llada_lightning.study.results import table_of_records

FLOPS = ["tokens", "flops_6nd", "flops_attention", "flops_head", "flops_total"]


def arm_fit(world: World, samples: int = 300, **study: object) -> IsoflopFit:
    table, _ = simulated_study(world, **study)  # type: ignore[arg-type]
    arm = in_canonical_order(table[table["objective"] == "arm"])
    return fit_isoflop(arm, "6nd", "nats_per_token", noise_of_runs(arm, None, samples, 0))


def test_optima_of_parabolas_are_recovered() -> None:
    law = VALLEYS["arm"]
    fit = arm_fit(VALLEYS, noise=1e-7)
    assert len(fit.budgets) == 6
    for budget in fit.budgets:
        assert budget.interior
        assert budget.n_opt.value == pytest.approx(law.n_opt(budget.flops), rel=1e-4)
        assert budget.d_opt.value == pytest.approx(budget.flops / 6 / budget.n_opt.value)
        assert budget.tokens_per_param.value == pytest.approx(budget.d_opt.value / budget.n_opt.value)
        assert budget.loss_opt.value == pytest.approx(law.best(budget.flops), rel=1e-5)
        assert budget.curve(budget.n_opt.value) == pytest.approx(law.best(budget.flops), rel=1e-5)
    assert fit.n_law and fit.d_law and fit.loss_law
    assert fit.n_law.b == pytest.approx(law.n_exponent, abs=1e-4)
    assert fit.d_law.b == pytest.approx(1 - law.n_exponent, abs=1e-4)
    assert fit.loss_law.b == pytest.approx(law.b, abs=1e-4)


def test_intervals_hold_the_value() -> None:
    for budget in arm_fit(VALLEYS).budgets:
        for estimate in (budget.n_opt, budget.d_opt, budget.tokens_per_param, budget.loss_opt):
            assert estimate.low < estimate.value < estimate.high


def test_the_curve_of_losses_follows_an_irreducible_part_that_a_power_law_misses() -> None:
    fit, law = arm_fit(CHINCHILLA, noise=1e-7), CHINCHILLA["arm"]
    assert fit.loss_curve and fit.loss_law
    budgets = np.array([budget.flops for budget in fit.budgets])
    observed = np.array([budget.loss_opt.value for budget in fit.budgets])
    by_curve, by_law = (np.abs(np.log(line.loss(budgets) / observed)).max() for line in (fit.loss_curve, fit.loss_law))
    assert by_curve < 0.15 * by_law
    assert observed == pytest.approx(law.best(budgets), rel=2e-3)


def test_an_optimum_outside_of_the_grid_is_flagged_and_left_out() -> None:
    fit = arm_fit(VALLEYS, noise=1e-4, drift=2.0)  # the outer budgets' grids miss their optimum
    assert [budget.interior for budget in fit.budgets] == [False, True, True, True, True, False]
    assert "outside of the grid at 1e+17, 1e+19 FLOPs" in str(fit.note)
    assert fit.n_law
    assert fit.n_law.b == pytest.approx(VALLEYS["arm"].n_exponent, abs=0.02)


def test_a_valley_that_leans_is_flagged_where_the_grid_is_off_its_centre() -> None:
    skewed = {"arm": Chinchilla(1.0, 3000.0, 0.5, 60.0, 0.18)}
    fit = arm_fit(skewed, noise=1e-4, shapes=7, width=12.0, drift=0.8)
    assert sum(budget.bias is not None for budget in fit.budgets) >= 3
    assert min(budget.grid_sensitivity or 0 for budget in fit.budgets if budget.bias is not None) > 0.02
    straight = arm_fit({"arm": VALLEYS["arm"]}, noise=1e-4, shapes=7, width=12.0, drift=0.8)
    assert not any(budget.bias is not None for budget in straight.budgets)
    table, _ = simulated_study(skewed, noise=1e-4, shapes=7, width=12.0, drift=0.8)
    assert any("beyond its interval" in note for note in fit_table(table, samples=200).notes)


def test_too_few_shapes_say_how_many_are_needed() -> None:
    fit = arm_fit(VALLEYS, shapes=2)
    assert fit.budgets == []
    assert fit.n_law is None
    assert "1e+17 (2), 1.6e+17" not in str(fit.note)
    assert "at least 3 shapes" in str(fit.note)


def test_too_few_budgets_say_how_many_are_needed() -> None:
    fit = arm_fit(VALLEYS, budgets=(1e17, 1e18))
    assert len(fit.budgets) == 2
    assert fit.n_law is None
    assert "budgets with an optimum inside the grid: 2; at least 3 are needed" in str(fit.note)


def test_three_shapes_without_standard_errors_have_no_intervals() -> None:
    fit = arm_fit(VALLEYS, shapes=3, stderr=False)
    assert all(np.isnan(budget.n_opt.low) and np.isfinite(budget.n_opt.value) for budget in fit.budgets)
    assert "no intervals" in str(fit.note)
    assert fit.n_law  # the scatter of the optima about the law is known
    assert fit.n_law.interval_b[0] < fit.n_law.b < fit.n_law.interval_b[1]


def test_three_shapes_borrow_the_spread_of_another_fit() -> None:
    table, _ = simulated_study(CHINCHILLA, shapes=3, noise=0.001, spread=0.003)
    arm = in_canonical_order(table[table["objective"] == "arm"])
    noise = noise_of_runs(arm, None, 300, 0)
    alone = fit_isoflop(arm, "6nd", "nats_per_token", noise)
    borrowed = fit_isoflop(arm, "6nd", "nats_per_token", noise, borrowed=Spread(0.003, 10, np.nan))
    assert all(np.isnan(budget.n_opt.low) for budget in alone.budgets)  # known errors are not all that there is
    assert all(budget.n_opt.low < budget.n_opt.value < budget.n_opt.high for budget in borrowed.budgets)
    for fits in (fit_table(table, samples=300), fit_table(table.assign(val_stderr=np.nan), samples=300)):
        own = fits.objectives["arm"]
        assert own.parametric
        assert own.spread == own.parametric.scatter
        assert all(np.isfinite(budget.n_opt.high) for budget in own.isoflop["6nd"].budgets)
    five, _ = simulated_study({"llada": CHINCHILLA["llada"]}, shapes=5, noise=0.001, spread=0.003)
    mixed = fit_table(pd.concat([arm, five], ignore_index=True), samples=300)
    assert mixed.objectives["arm"].spread == mixed.objectives["llada"].spread
    assert mixed.objectives["llada"].spread.dof == 12


def test_runs_beside_the_budgets_are_counted() -> None:
    table, _ = simulated_study({"arm": VALLEYS["arm"]})
    lonely = table.iloc[[0]].assign(run="alone", **{name: table.iloc[0][name] * 1.3 for name in FLOPS})
    fits = fit_table(pd.concat([table, lonely], ignore_index=True), samples=200)
    assert any("6nd: 1 runs left out: by 6ND they share no budget" in note for note in fits.notes)


def test_a_flat_valley_has_an_open_interval() -> None:
    fit = arm_fit({"arm": VALLEYS["arm"].__class__(3.6, 0.06, 5e7, 0.5, width=1e-4)}, noise=0.01)
    ends = [(budget.n_opt.low, budget.n_opt.high) for budget in fit.budgets]
    assert any(low == 0 or high == np.inf for low, high in ends)


def test_runs_planned_by_the_other_convention_form_no_budgets() -> None:
    table, _ = simulated_study(VALLEYS)
    fits = fit_table(table, samples=200)
    for own in fits.objectives.values():
        assert own.isoflop["total"].budgets == []
        assert "6ND + attention + head: they were not planned to be equal by it" in str(own.isoflop["total"].note)
    swapped = table.assign(flops_6nd=table["flops_total"], flops_total=table["flops_6nd"])
    assert len(fit_table(swapped, samples=200).objectives["arm"].isoflop["total"].budgets) == 6


def test_a_study_that_is_not_finished_is_not_called_unplanned() -> None:
    """One shape has all of its budgets, the second one the first budget alone."""
    runs = [("107k", 1e12), ("107k", 2e12), ("107k", 4e12), ("443k", 1e12)]
    table = table_of_records([record("arm", shape, budget, 4.0 - 1e-13 * budget) for shape, budget in runs])
    note = str(fit_table(table, samples=200).objectives["arm"].isoflop["6nd"].note)
    assert "do not share budgets by 6ND: others of these budgets are not finished, or none are planned" in note
    assert "budgets (shapes): 1e+12 (2)" in note
