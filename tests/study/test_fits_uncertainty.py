"""The noise model: spread by moments, joint draws, and covariances that do not fit."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

import llada_lightning.study.fits.uncertainty as noise_module
from helpers.studies import CHINCHILLA, VALLEYS, simulated_study
from llada_lightning.study.fits import fit_table, noise_of_runs, usable_runs
from llada_lightning.study.fits.least_squares import fit_linear
from llada_lightning.study.fits.uncertainty import UNKNOWN, Noise, Spread, drawn_tau
from llada_lightning.support.errors import UserError

LINE = np.stack([np.ones(400), np.linspace(-1, 1, 400)], axis=1)


@pytest.mark.parametrize("tau", [0.0, 0.02])
def test_the_spread_beyond_known_errors_is_found(tau: float) -> None:
    generator = np.random.default_rng(0)
    errors = generator.uniform(0.005, 0.03, 400)
    y = LINE @ (1.0, -0.3) + np.hypot(errors, tau) * generator.standard_normal(400)
    fit = fit_linear(LINE, y, Noise.of(np.diag(errors**2), "standard errors", 500, 0))
    assert fit.spread.tau == pytest.approx(tau, abs=0.003)
    assert fit.spread.dof == 398
    assert fit.theta == pytest.approx((1.0, -0.3), abs=0.01)


def test_without_known_errors_the_scatter_is_all() -> None:
    y = LINE @ (1.0, -0.3) + 0.01 * np.random.default_rng(1).standard_normal(400)
    fit = fit_linear(LINE, y, Noise.of(np.zeros((400, 400)), "scatter", 2000, 0))
    scatter = np.std(y - LINE @ fit.theta)
    assert fit.spread.tau == pytest.approx(0.01, rel=0.1)
    assert fit.draws[:, 0].std() == pytest.approx(scatter / 20, rel=0.1)


def test_an_error_that_all_share_is_no_spread() -> None:
    shared = Noise.of(np.full((400, 400), 1e-4) + 1e-6 * np.eye(400), "covariance", 500, 0)
    y = LINE @ (1.0, -0.3) + 0.013 + 1e-3 * np.random.default_rng(2).standard_normal(400)
    fit = fit_linear(LINE, y, shared)
    assert fit.spread.tau < 5e-4
    assert fit.spread.reduced_chi_square == pytest.approx(1.0, abs=0.2)
    assert fit.draws[:, 0].std() == pytest.approx(0.01, rel=0.1)
    assert fit.draws[:, 1].std() == pytest.approx(1e-3 / np.sqrt(np.sum(LINE[:, 1] ** 2)), rel=0.1)


def test_a_lack_of_fit_is_rare_where_the_line_holds_and_found_where_it_bends() -> None:
    """The p-value is uniform where the model holds, correlated errors and a drawn spread included."""
    generator, design = np.random.default_rng(3), LINE[::50]
    covariance, spread = 1e-4 * (0.5 + 0.5 * np.eye(8)), Spread(0.01, 200, np.nan)
    noise = Noise.of(covariance, "covariance", 1000, 0)
    truth = generator.multivariate_normal(np.zeros(8), covariance, 200) + 0.01 * generator.standard_normal((200, 8))
    found = np.array([noise.misfit(design @ (1.0, -0.3) + errors, design, spread) for errors in truth])
    assert np.mean(found) == pytest.approx(0.5, abs=0.05)
    assert np.mean(found < 0.1) == pytest.approx(0.1, abs=0.06)
    assert noise.misfit(design @ (1.0, -0.3) + 0.1 * design[:, 1] ** 2, design, spread) < 0.001
    assert np.isnan(noise.misfit(truth[0], design, UNKNOWN))
    assert np.isnan(noise.take([0, 1]).misfit(truth[0, :2], design[:2], spread))


def test_draws_in_blocks_are_the_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    noise = Noise.of(np.diag(np.linspace(1e-4, 2e-4, 9)), "standard errors", 101, 0).take([7, 2, 5])
    whole = noise.draws(Spread(0.02, 5, np.nan))
    monkeypatch.setattr(noise_module, "MOST_NUMBERS", 30)
    parts = list(noise.blocks_of_draws(Spread(0.02, 5, np.nan)))
    assert {part.shape for part in parts} == {(10, 3), (1, 3)}
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    np.testing.assert_array_equal(noise.draws(Spread(0.02, 5, np.nan), np.array([2, 0])), whole[:, [2, 0]])


def test_a_table_is_fitted_in_the_memory_of_a_few_arrays_of_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs x draws is what grows: fits hold eight arrays of that size at most, where they held twenty."""
    table, _ = simulated_study(CHINCHILLA, budgets=tuple(np.geomspace(1e17, 1e19, 4)), shapes=40)
    monkeypatch.setattr(noise_module, "MOST_NUMBERS", 2**13)
    tracemalloc.start()
    try:
        fit_table(table, samples=1000, conventions=("6nd",))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 8 * 8 * len(table) * 1000


def test_few_degrees_of_freedom_draw_the_spread_widely() -> None:
    uniforms = np.linspace(0.0005, 0.9995, 1000)
    wide, narrow = (drawn_tau(Spread(1.0, dof, 1.0), uniforms) for dof in (2, 200))
    assert np.ptp(np.percentile(wide, [5, 95])) > 5 * np.ptp(np.percentile(narrow, [5, 95]))
    assert np.median(narrow) == pytest.approx(1.0, abs=0.01)
    assert not drawn_tau(Spread(0.0, 3, 1.0), uniforms).any()


def test_both_objectives_share_the_draws_of_a_covariance() -> None:
    table, covariance = simulated_study(VALLEYS, noise=0.001, shared=0.01)
    runs = usable_runs(table)
    noise = noise_of_runs(runs, covariance, 3000, 0)
    arm, llada = (np.flatnonzero(runs["objective"] == name)[0] for name in ("arm", "llada"))
    assert np.corrcoef(noise.errors[:, arm], noise.errors[:, llada])[0, 1] > 0.97
    np.testing.assert_array_equal(noise.take([llada]).errors[:, 0], noise.errors[:, llada])


def test_which_errors_are_known_is_said() -> None:
    table, covariance = simulated_study(VALLEYS)
    assert fit_table(table, samples=100).noise_model == "standard errors"
    assert fit_table(table, samples=100, covariance=covariance).noise_model == "covariance"
    table.loc[3, "val_stderr"] = np.nan
    assert fit_table(table, samples=100).noise_model == "scatter"


def bad_covariances(good: pd.DataFrame) -> dict[str, pd.DataFrame]:
    crooked = good.copy()
    crooked.iloc[0, 1] *= 2
    negative = good.copy()
    negative.iloc[0, 0] = -good.iloc[0, 0]
    return {
        "none of the table's 60 runs is in it": good.add_prefix("x").T.add_prefix("x"),
        "not symmetric": crooked,
        "it is none": negative,
        "is in it twice": pd.concat([good, good.iloc[:1]]),
        "not finite": good * np.nan,
    }


def test_a_run_that_a_covariance_lacks_has_an_error_of_its_own() -> None:
    table, covariance = simulated_study(VALLEYS, noise=0.001, shared=0.01)
    runs, names = usable_runs(table), list(covariance)
    noise = noise_of_runs(runs, covariance.drop(index=names[3], columns=names[3]), 20_000, 0)
    relative = 0.001**2 * np.eye(60) + 0.01**2
    relative[3], relative[:, 3] = 0.0, 0.0
    relative[3, 3] = 0.001**2 + 0.01**2  # val_stderr over the loss
    np.testing.assert_allclose(noise.covariance, relative, rtol=1e-9)
    of_differences = (noise.errors[:, [0, 0]] - noise.errors[:, [1, 3]]).std(axis=0)
    assert of_differences[0] == pytest.approx(0.001 * np.sqrt(2), rel=0.03)  # the shared error cancels
    assert of_differences[1] == pytest.approx(np.sqrt(2 * (0.001**2 + 0.01**2)), rel=0.03)
    assert np.corrcoef(noise.errors[:, [0, 3]].T)[0, 1] == pytest.approx(0.0, abs=0.03)
    whole = noise_of_runs(runs, covariance, 100, 0)
    losses = table["val_nats_per_token"]
    np.testing.assert_array_equal(whole.covariance, covariance.to_numpy() / np.outer(losses, losses))


@given(st.integers(2, 8), st.data())
def test_errors_stay_a_covariance_whatever_runs_are_lacking(rank: int, data: st.DataObject) -> None:
    table, _ = simulated_study(VALLEYS, budgets=(1e17, 1e18), shapes=3)
    runs = usable_runs(table)
    names = [f"{run}@{steps}" for run, steps in zip(runs["run"], runs["steps"], strict=True)]
    factor = np.random.default_rng(data.draw(st.integers(0, 99))).standard_normal((12, rank)) * 0.01
    kept = data.draw(st.lists(st.sampled_from(names), min_size=1, unique=True))
    covariance = pd.DataFrame(factor @ factor.T, names, names).loc[kept, kept]
    noise = noise_of_runs(runs, covariance, 100, 0)
    values = np.linalg.eigvalsh(noise.covariance)
    assert noise.model == "covariance" and values[0] > -1e-12 * values[-1]
    own = (runs["val_stderr"] / runs["val_nats_per_token"]).to_numpy() ** 2
    inside = np.isin(names, kept)
    np.testing.assert_allclose(noise.variances[~inside], own[~inside])
    assert not noise.covariance[np.ix_(inside, ~inside)].any()


def test_a_covariance_that_lacks_runs_serves_the_others_and_a_note_says_so() -> None:
    table, covariance = simulated_study(VALLEYS, shared=0.01)
    lacking = list(covariance)[1::-1]  # in the order of their tokens
    part = covariance.iloc[2:, 2:]
    fits = fit_table(table, samples=100, covariance=part)
    assert fits.noise_model == "covariance"
    note = f"it lacks 2 of 60 runs ({', '.join(lacking)})"
    assert fits.notes[0] == f"covariance: {note}, whose errors are taken as independent"
    table.loc[1, "val_stderr"] = np.nan  # of a run that it lacks
    fits = fit_table(table, samples=100, covariance=part)
    assert fits.noise_model == "scatter"
    assert fits.notes[0] == f"covariance not used: {note}, of which not all have a standard error"
    table.loc[[0, 1, 2], "val_stderr"] = [0.01, 0.01, np.nan]  # of one that it has
    assert fit_table(table, samples=100, covariance=part).noise_model == "covariance"


@pytest.mark.parametrize("words", bad_covariances(pd.DataFrame(np.ones((3, 3)))).keys())
def test_a_covariance_that_does_not_fit_is_refused(words: str) -> None:
    table, covariance = simulated_study(VALLEYS, shared=0.01)
    with pytest.raises(UserError, match=words):
        fit_table(table, samples=100, covariance=bad_covariances(covariance)[words])
