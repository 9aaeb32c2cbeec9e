"""The power law: recovered where it is known, the same in any unit, wide where it does not hold."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llada_lightning.study.fits import PowerLaw
from llada_lightning.study.fits.least_squares import power_law
from llada_lightning.study.fits.uncertainty import Noise
from llada_lightning.support.errors import UserError

BUDGETS = np.geomspace(1e15, 1e18, 7)
C0 = 10**16.5
"""Their geometric mean."""

factors = st.floats(1e-3, 1e3)


def fit_power_law(flops: npt.ArrayLike, loss: npt.ArrayLike, stderr: npt.ArrayLike, samples: int = 4000) -> PowerLaw:
    """Points with independent errors, or, where one of them is missing or zero, with unknown ones."""
    values, errors = np.asarray(loss, float), np.asarray(stderr, float)
    known = bool(np.all(np.isfinite(errors) & (errors > 0)))
    covariance = np.diag((errors / values) ** 2) if known else np.zeros((len(values), len(values)))
    noise = Noise.of(covariance, "covariance" if known else "scatter", samples, 0)
    return power_law(np.log(np.asarray(flops, float)), np.log(values), noise)


def noisy_fit(seed: int, a: float = 3.0, b: float = 0.1, error: float = 0.01) -> PowerLaw:
    generator = np.random.default_rng(seed)
    truth = a * (BUDGETS / C0) ** -b
    loss = truth * (1 + error * generator.standard_normal(len(BUDGETS)))
    return fit_power_law(BUDGETS, loss, error * truth, samples=400)


def test_an_exact_law_is_recovered_exactly() -> None:
    law = fit_power_law(BUDGETS, 3.0 * (BUDGETS / C0) ** -0.1, 0.01 * np.ones(7))
    assert law.a == pytest.approx(3.0)
    assert law.b == pytest.approx(0.1)
    assert law.residual < 1e-12
    assert law.scatter.tau == 0.0


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    fits = [noisy_fit(seed) for seed in range(200)]
    covers_a = np.mean([law.interval_a[0] <= 3.0 <= law.interval_a[1] for law in fits])
    covers_b = np.mean([law.interval_b[0] <= 0.1 <= law.interval_b[1] for law in fits])
    bands = [law.band([1e18]) for law in fits]
    truth = 3.0 * (1e18 / C0) ** -0.1
    covers_loss = np.mean([low[0] <= truth <= high[0] for low, high in bands])
    # 95 %, with a binomial standard error of 1.5 points; the scaled-up errors of scattered points only add.
    assert min(covers_a, covers_b, covers_loss) >= 0.90


@given(flops_factor=factors, loss_factor=factors)
@settings(max_examples=30)
def test_units_do_not_change_the_exponent(flops_factor: float, loss_factor: float) -> None:
    generator = np.random.default_rng(2)
    loss = 3.0 * (BUDGETS / C0) ** -0.1 * np.exp(0.02 * generator.standard_normal(7))
    stderr = loss * generator.uniform(0.01, 0.03, 7)
    one = fit_power_law(BUDGETS, loss, stderr, samples=200)
    other = fit_power_law(BUDGETS * flops_factor, loss * loss_factor, stderr * loss_factor, samples=200)
    assert other.b == pytest.approx(one.b, rel=1e-9)
    assert other.a == pytest.approx(one.a * loss_factor)
    np.testing.assert_allclose(other.interval_b, one.interval_b, rtol=1e-9)


def test_a_point_weighs_by_its_error() -> None:
    loss = 3.0 * (BUDGETS / C0) ** -0.1
    loss[0] *= 1.2
    trusted = fit_power_law(BUDGETS, loss, 0.01 * loss)
    doubted = fit_power_law(BUDGETS, loss, np.where(np.arange(7) == 0, 1.0, 1e-3) * loss)
    assert abs(doubted.b - 0.1) < 1e-3 < abs(trusted.b - 0.1)


def test_errors_grow_where_the_law_does_not_hold() -> None:
    bent = 2.0 + 3.0 * (BUDGETS / C0) ** -0.3
    law = fit_power_law(BUDGETS, bent, 1e-4 * bent)
    assert law.scatter.tau > 100 * 1e-4
    assert law.interval_b[1] - law.interval_b[0] > 0.01


@pytest.mark.parametrize("missing", [np.nan, 0.0])
def test_unknown_errors_are_taken_from_the_scatter(missing: float) -> None:
    generator = np.random.default_rng(3)
    loss = 3.0 * (BUDGETS / C0) ** -0.1 * np.exp(0.01 * generator.standard_normal(7))
    law = fit_power_law(BUDGETS, loss, np.full(7, missing))
    assert law.interval_b[0] < 0.1 < law.interval_b[1]
    assert law.interval_b[1] - law.interval_b[0] < 0.02


def test_too_few_points_say_how_many_are_needed() -> None:
    with pytest.raises(UserError, match="2 budgets, a power law needs at least 3; run 1 more budget"):
        fit_power_law([1.0, 2.0], [2.0, 1.0], [0.1, 0.1])


def test_an_optimum_that_grows_has_a_positive_exponent() -> None:
    log_c = np.log(BUDGETS)
    law = power_law(log_c, 2.0 + 0.5 * log_c, Noise.of(np.zeros((7, 7)), "scatter", 100, 0), sign=1)
    assert law.b == pytest.approx(0.5)
    assert law.value(1e17) == pytest.approx(np.exp(2.0) * 1e17**0.5)


def test_an_error_that_all_points_share_does_not_touch_the_exponent() -> None:
    log_c = np.log(BUDGETS)
    log_loss = 1.0 - 0.1 * log_c
    alone = power_law(log_c, log_loss, Noise.of(0.01**2 * np.eye(7), "standard errors", 2000, 0))
    shared = power_law(log_c, log_loss, Noise.of(np.full((7, 7), 0.97e-4) + 0.03e-4 * np.eye(7), "covariance", 2000, 0))
    width = [law.interval_b[1] - law.interval_b[0] for law in (alone, shared)]
    assert width[1] < 0.25 * width[0]  # the root of 0.03 is 0.17
    height = [np.log(law.interval_a[1] / law.interval_a[0]) for law in (alone, shared)]
    assert height[1] > 2 * height[0]
