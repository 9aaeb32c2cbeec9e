"""The parametric law: recovered, scipy's optimum reached, open where the data leave it open."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize, minimize_scalar

from helpers.studies import CHINCHILLA, World, simulated_study
from llada_lightning.study.fits import ParametricFit, fit_parametric
from llada_lightning.study.fits.law import log_loss, log_loss_and_jacobian
from llada_lightning.study.fits.least_squares import Curve, fit_many, huber
from llada_lightning.study.fits.parametric import too_few
from llada_lightning.study.fits.runs import in_canonical_order, noise_of_runs

DELTA = 1e-3


def arm_fit(world: World = CHINCHILLA, samples: int = 300, **study: object) -> ParametricFit:
    table, covariance = simulated_study(world, **study)  # type: ignore[arg-type]
    arm = in_canonical_order(table[table["objective"] == "arm"])
    return fit_parametric(arm, ("6nd", "total"), "nats_per_token", noise_of_runs(arm, covariance, samples, 0))


def test_an_exact_law_is_recovered() -> None:
    fit, law = arm_fit(noise=1e-9), CHINCHILLA["arm"]
    for name in ("E", "A", "alpha", "B", "beta"):
        assert getattr(fit, name).value == pytest.approx(getattr(law, name), rel=1e-4), name
    assert fit.r_squared > 1 - 1e-9
    assert fit.identified
    assert fit.loss(1e8, 2e9) == pytest.approx(law.loss(1e8, 2e9), rel=1e-6)
    assert fit.loss([1e8, 2e8], [[2e9], [1e9], [5e8]]).shape == (3, 2)


def test_a_noisy_law_lies_within_its_intervals() -> None:
    fit, law = arm_fit(samples=1000), CHINCHILLA["arm"]
    for name in ("E", "A", "alpha", "B", "beta"):
        assert getattr(fit, name).covers(getattr(law, name)), name
    assert fit.n_exponent("6nd").covers(law.n_exponent)
    assert fit.reduced_chi_square is not None
    assert 0.3 < fit.reduced_chi_square < 2
    assert fit.gradient < 1e-6


def problem(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """A truth, log N, log D and 12 sets of noisy log losses about it."""
    generator = np.random.default_rng(seed)
    log_n, log_d = generator.uniform(-2, 2, (2, 40))
    e, a, alpha, b, beta = 1.9, 0.5, 0.33, 0.6, 0.3
    truth = np.log([e + a + b, alpha * a, alpha, beta * b, beta])
    return truth, log_n, log_d, log_loss(truth, log_n, log_d) + 0.008 * generator.standard_normal((12, 40))


def curve(log_n: np.ndarray, log_d: np.ndarray) -> Curve:
    return lambda theta: log_loss_and_jacobian(theta, log_n, log_d)


@pytest.mark.parametrize("delta", [DELTA, 0.02, np.inf])
def test_the_batched_optimum_is_scipys(delta: float) -> None:
    truth, log_n, log_d, goals = problem()
    found, converged = fit_many(np.repeat(truth[None], 12, axis=0), goals, curve(log_n, log_d), np.ones(40), delta)
    assert converged.all()
    for theta, goal in zip(found, goals, strict=True):

        def value(x: np.ndarray, goal: np.ndarray = goal) -> tuple[float, np.ndarray]:
            fitted, jacobian = log_loss_and_jacobian(x[None], log_n, log_d)
            residuals = fitted[0] - goal
            return 1e4 * huber(residuals, delta).sum(), 1e4 * np.clip(residuals, -delta, delta) @ jacobian[0]

        scipys = minimize(value, truth, jac=True, method="BFGS", options={"gtol": 1e-8, "maxiter": 3000})
        assert value(theta)[0] <= scipys.fun * (1 + 1e-8)
        np.testing.assert_allclose(theta, scipys.x, atol=2e-3)


def test_derivatives_are_those_of_the_law() -> None:
    truth, log_n, log_d, _ = problem()
    _, jacobian = log_loss_and_jacobian(truth[None], log_n, log_d)
    for column, step in enumerate(1e-6 * np.eye(5)):
        slope = (log_loss(truth + step, log_n, log_d) - log_loss(truth - step, log_n, log_d)) / 2e-6
        np.testing.assert_allclose(jacobian[0, :, column], slope, atol=1e-8)


def test_one_wild_run_hardly_moves_a_huber_fit() -> None:
    truth, log_n, log_d, goals = problem()
    wild = goals[:1].copy()
    wild[0, 0] += 0.5
    robust, squares = (
        fit_many(truth[None], wild, curve(log_n, log_d), np.ones(40), delta)[0] for delta in (DELTA, np.inf)
    )
    off = [
        np.abs(log_loss(theta[0], log_n, log_d) - log_loss(truth, log_n, log_d)).max() for theta in (robust, squares)
    ]
    assert off[0] < 0.25 * off[1]


def test_the_frontier_is_the_optimum_under_either_convention() -> None:
    fit = arm_fit(noise=1e-3)
    flops = np.array([2e17, 5e18])
    for convention in ("6nd", "total"):
        frontier = fit.frontier(convention, flops)  # type: ignore[arg-type]
        for number, budget in enumerate(flops):

            def loss(log_n: float, budget: float = budget, name: str = convention) -> float:
                tokens = budget / np.exp(fit.costs[name](log_n))  # type: ignore[index]
                return float(fit.loss(np.exp(log_n), tokens))

            best = minimize_scalar(loss, bounds=(10, 25), method="bounded", options={"xatol": 1e-10})
            assert np.log(frontier.n[0][number]) == pytest.approx(best.x, abs=1e-3)
            assert frontier.loss[0, number] == pytest.approx(best.fun, rel=1e-9)
        cost = np.exp(fit.costs[convention](np.log(frontier.n[0])))  # type: ignore[index]
        np.testing.assert_allclose(cost * frontier.d[0], flops, rtol=1e-9)
        for value, low, high in (
            frontier.n,
            frontier.d,
            frontier.loss,
        ):
            assert np.all((low < value) & (value < high))


def test_too_few_runs_say_what_is_needed() -> None:
    table, _ = simulated_study(CHINCHILLA, budgets=(1e18,), shapes=5)
    arm = table[table["objective"] == "arm"]
    assert too_few(arm) == "no fit: 5 runs of 5 N and 5 D; at least 6 runs of 3 N and 3 D are needed"
    two_sizes = table[:6].assign(params_nonembedding=[1e6, 2e6] * 3)
    assert "6 runs of 2 N" in str(too_few(two_sizes))
    assert too_few(simulated_study(CHINCHILLA)[0]) is None


def test_what_the_data_leave_open_is_said_and_never_crashes() -> None:
    fit = arm_fit(noise=0.05, budgets=(1e18, 1.3e18), shapes=4, width=1.2)
    assert not fit.identified
    assert "not identified" in str(fit.note)
    assert fit.alpha.high / fit.alpha.low > 10
    frontier = fit.frontier("total", [1e18])
    assert np.isfinite(frontier.loss).all()
