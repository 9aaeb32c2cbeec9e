"""Densities of the mask ratio: quantiles and values that belong together, and curricula."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from scipy import stats

from llada_lightning.compute.flops import expected_mask_probability
from llada_lightning.objectives import densities
from llada_lightning.objectives.densities import (
    DENSITIES,
    Beta,
    Between,
    Curriculum,
    Density,
    LogitNormal,
    Range,
    Uniform,
    covers_all_ratios,
    end_without_mass,
)
from llada_lightning.objectives.forward_process import SMALLEST_QUANTILE, drawn_ratio, mask_ratio
from llada_lightning.support.errors import UserError

exponents = st.floats(0.3, 6)
betas = st.builds(Beta, exponents, exponents)
logit_normals = st.builds(LogitNormal, st.floats(-3, 3), st.floats(0.2, 3))
ranges = st.tuples(st.floats(0, 0.9), st.floats(0.05, 1)).map(
    lambda ends: Range(ends[0], ends[0] + ends[1] * (1 - ends[0]))
)
steady = st.one_of(st.just(Uniform()), betas, logit_normals, ranges)
curricula = st.builds(Curriculum, steady, steady, st.integers(1, 50))
Floats = densities.Floats


def cdf(density: Density, t: Floats) -> Floats:
    """The cumulative distribution by scipy, which knows nothing of our quantiles."""
    if isinstance(density, Uniform):
        return np.asarray(stats.uniform.cdf(t))
    if isinstance(density, Beta):
        return np.asarray(stats.beta.cdf(t, density.a, density.b))
    if isinstance(density, Range):
        return np.asarray(stats.uniform.cdf(t, density.low, density.high - density.low))
    assert isinstance(density, LogitNormal)
    return np.asarray(stats.norm.cdf(np.log(t / (1 - t)), density.mean, density.deviation))


@given(steady, st.lists(st.floats(1e-4, 1 - 1e-4), min_size=1, max_size=8))
def test_draw_is_the_inverse_of_the_cumulative_distribution(density: Density, points: list[float]) -> None:
    u_B = np.array(points)
    t_B, _ = density.draw(u_B)
    low, high = density.support
    assert ((low <= t_B) & (t_B <= high)).all()
    inside_B = (t_B > 0) & (t_B < 1 - 1e-9)
    np.testing.assert_allclose(cdf(density, t_B[inside_B]), u_B[inside_B], rtol=1e-6, atol=1e-9)


@given(st.one_of(steady, st.builds(Between, steady, steady, st.floats(0.01, 0.99))))
def test_the_density_integrates_to_one_between_any_two_quantiles(density: Density) -> None:
    """Over t, by the trapezoid rule on a fine grid of quantiles."""
    u_N = np.linspace(0.01, 0.99, 20_001)
    t_N, q_N = density.draw(u_N)
    mass_N = (q_N[1:] + q_N[:-1]) / 2 * np.diff(t_N)
    np.testing.assert_allclose(mass_N.sum(), 0.98, rtol=1e-5)
    np.testing.assert_allclose(mass_N[:10_000].sum(), 0.49, rtol=1e-5)


@given(st.one_of(steady, st.builds(Between, steady, steady, st.floats(0, 1))))
def test_the_mean_is_that_of_the_quantiles(density: Density) -> None:
    t_N, _ = density.draw((np.arange(10_000) + 0.5) / 10_000)
    assert density.mean_ratio == pytest.approx(t_N.mean(), abs=5e-4)


@given(curricula, st.integers(1, 120))
def test_a_curriculum_goes_from_its_start_to_its_end_and_stays(curriculum: Curriculum, steps: int) -> None:
    assert curriculum.at(0) == curriculum.start
    assert curriculum.at(curriculum.steps) == curriculum.at(10**9) == curriculum.end
    mean = float(np.mean([curriculum.at(step).mean_ratio for step in range(steps)]))
    assert curriculum.mean_until(steps) == pytest.approx(mean, rel=1e-9)
    assert curriculum.mean_until(None) == curriculum.end.mean_ratio


def test_a_range_that_grows_moves_its_end() -> None:
    curriculum = Curriculum(Range(0.0, 0.2), Range(0.0, 1.0), steps=4)
    assert [curriculum.at(step).support for step in range(5)] == [
        (0, 0.2),
        (0, 0.4),
        (0, 0.6),
        (0, pytest.approx(0.8)),
        (0, 1),
    ]
    t_B, q_B = curriculum.at(2).draw(np.array([0.25, 0.75]))
    np.testing.assert_allclose(t_B, [0.15, 0.45])
    np.testing.assert_allclose(q_B, 1 / 0.6)


@pytest.mark.parametrize("sampling", ["weyl", "iid"])
def test_a_density_is_drawn_at_the_points_of_the_uniform_one(sampling: Any) -> None:
    n_B, density = np.arange(5000, 5064), Beta(1.5, 0.7)
    u_B = mask_ratio(3, n_B, sampling)
    t_B, q_B = drawn_ratio(3, n_B, sampling, density, global_batch=8)
    assert q_B is not None
    np.testing.assert_array_equal(t_B, density.draw(u_B)[0])
    np.testing.assert_array_equal(q_B, density.draw(u_B)[1])
    again, none = drawn_ratio(3, n_B, sampling, None, global_batch=8)
    np.testing.assert_array_equal(again, u_B)
    assert none is None


@given(st.integers(0, 2**32), st.integers(0, 10**9), st.integers(1, 9))
def test_the_step_of_a_curriculum_follows_from_the_ordinal(seed: int, first: int, batch: int) -> None:
    """Whatever the micro-batch: each ordinal alone has the t that it has in a window of several steps."""
    curriculum = Curriculum(Range(0, 0.1), Beta(2, 2), steps=max(1, first // batch + 2))
    n_B = np.arange(first, first + 20)
    t_B, q_B = drawn_ratio(seed, n_B, "weyl", curriculum, batch)
    assert q_B is not None
    for b in range(len(n_B)):
        alone_t, alone_q = drawn_ratio(seed, n_B[b : b + 1], "weyl", curriculum, batch)
        assert alone_q is not None
        assert (float(alone_t[0]), float(alone_q[0])) == (t_B[b], q_B[b])
        u_B = np.maximum(mask_ratio(seed, n_B[b : b + 1]), SMALLEST_QUANTILE)
        assert t_B[b] == curriculum.at(int(n_B[b]) // batch).draw(u_B)[0][0]


@given(st.one_of(steady, curricula))
@example(Beta(1.041, 0.5835))  # whose inverse in scipy 1.17 is NaN at 2^-54
def test_the_points_at_the_ends_give_numbers(density: Density) -> None:
    for step in (0, 1, 100):
        t_B, q_B = density.at(step).draw(np.array([SMALLEST_QUANTILE, 1 - 2.0**-53]))
        assert ((t_B >= 0) & (t_B <= 1)).all() and (q_B >= 0).all()


def test_only_densities_with_mass_everywhere_keep_the_bound() -> None:
    assert covers_all_ratios(None)
    assert all(map(covers_all_ratios, [Uniform(), Beta(2, 0.5), LogitNormal(), Range(0, 1)]))
    assert not covers_all_ratios(Range(0.001, 1)) and not covers_all_ratios(Range(0, 0.999))
    assert not covers_all_ratios(Curriculum(Range(0, 0.5), Uniform(), 10))
    assert covers_all_ratios(Curriculum(Beta(0.5, 1), Uniform(), 10))


@given(exponents, exponents)
def test_the_ends_of_a_beta_density_have_enough_mass_up_to_2(a: float, b: float) -> None:
    """1/q is about t^(1-a) at 0, whose square under q, the integral of t^(1-a), diverges as a power of t for a > 2."""
    if min(abs(a - 2), abs(b - 2)) < 0.02:
        return
    assert end_without_mass(Beta(a, b)) == (0.0 if a > 2 else 1.0 if b > 2 else None)


def test_which_ends_have_too_little_mass() -> None:
    assert end_without_mass(Beta(2, 2)) is None
    assert end_without_mass(LogitNormal()) == 0.0
    assert end_without_mass(LogitNormal(0, 4)) is None  # wide enough to have mass at both ends
    assert end_without_mass(Uniform()) is end_without_mass(Range(0.2, 0.3)) is None
    assert end_without_mass(Curriculum(Uniform(), Beta(1, 3), 5)) == 1.0


@pytest.mark.parametrize("mean", [0.5, 0.325, 0.9])
def test_the_expected_mask_probability_is_linear_in_the_mean_ratio(mean: float) -> None:
    assert expected_mask_probability(0.01, mean) == pytest.approx(0.99 * mean + 0.01, rel=1e-12)
    assert expected_mask_probability(0.01, 0.5) == expected_mask_probability(0.01)


def test_a_name_that_the_table_has_is_refused() -> None:
    densities.register("beta", Beta)  # the same again is no other one
    with pytest.raises(UserError, match="density: there is another one 'beta'; choose another name"):
        densities.register("beta", Range)
    assert DENSITIES["beta"] is Beta
