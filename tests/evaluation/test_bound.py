"""The estimator of Eq. 6: its masks, and its value and error on predictors that are tables of random numbers."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from scipy.stats import t as student_t

from llada_lightning.evaluation.bound import Bound, all_masks, replicate_masks
from llada_lightning.evaluation.requests import Request, Score

lengths = st.integers(2, 40)


def test_all_masks_are_every_mask_once() -> None:
    masks = all_masks(4)
    assert len({tuple(mask) for mask in masks.tolist()}) == len(masks) == 15
    assert masks.any(axis=1).all()


@given(length=lengths, samples=st.integers(1, 40), seed=st.integers(0, 2**32), replicate=st.integers(0, 1000))
def test_a_replicate_spreads_counts_and_positions_evenly(length: int, samples: int, seed: int, replicate: int) -> None:
    masks = replicate_masks(seed, 7, replicate, samples, length, range(1, length + 1))
    counts = masks.sum(axis=1)
    assert counts.min() >= 1 and counts.max() <= length
    # The grid: the number of samples with a count of at most c differs from its share by less than one.
    below = (counts[:, None] <= np.arange(1, length + 1)).sum(axis=0)
    assert np.abs(below - samples * np.arange(1, length + 1) / length).max() < 1 + 1e-9
    # The windows follow each other: no token is masked more than once more than another.
    assert np.ptp(masks.sum(axis=0)) <= 1


@given(length=lengths, replicate=st.integers(0, 100))
def test_masks_are_a_function_of_their_arguments(length: int, replicate: int) -> None:
    first = replicate_masks(0, 2**64 - 1, replicate, 8, length, range(1, length))
    assert (first == replicate_masks(0, 2**64 - 1, replicate, 8, length, range(1, length))).all()


def test_each_mask_alone_is_uniform_over_counts_and_over_positions() -> None:
    length, draws = 4, 6000
    for place in range(3):  # the first, the middle and the last mask of a replicate of three
        seen = Counter(
            tuple(replicate_masks(1, 5, r, 3, length, range(1, length + 1))[place].tolist()) for r in range(draws)
        )
        expected = {}
        for mask in all_masks(length).tolist():
            count = sum(mask)
            # Given the place, l lies in a third of the grid: that part's share of each l.
            low, high = max(place / 3, (count - 1) / length), min((place + 1) / 3, count / length)
            same_count = [other for other in all_masks(length).tolist() if sum(other) == count]
            expected[tuple(mask)] = max(0.0, high - low) * 3 / len(same_count)
        assert set(seen) == {mask for mask, share in expected.items() if share > 0}
        shares = [expected[mask] * draws for mask in seen]
        assert chisquare(list(seen.values()), shares).pvalue > 1e-4


# --- the estimate -----------------------------------------------------------------------------------------------------

Array = npt.NDArray[np.float64]


def table(length: int, seed: int, interaction: float = 1.0) -> Array:
    """(2^L, L) log p of each token under each set of masked ones: of its own, by how many are masked, by which."""
    rng = np.random.default_rng(seed)
    masked = np.concatenate([np.zeros((1, length), dtype=bool), all_masks(length)])
    token = -rng.exponential(3, size=length)
    by_count = -np.sqrt(masked.sum(axis=1, keepdims=True)) * rng.uniform(0.2, 1.0, size=length)
    return (token + by_count + interaction * rng.normal(size=masked.shape)) * masked


def exact_value(table_SL: Array) -> float:
    length = table_SL.shape[1]
    counts, sums = all_masks(length).sum(axis=1), table_SL[1:].sum(axis=1)
    return float(np.mean([length / c * sums[counts == c].mean() for c in range(1, length + 1)]))


def estimate(table_SL: Array, samples: int, seed: int, rounds: int = 1, enumerate_masks: bool = False) -> Score:
    length = table_SL.shape[1]
    bound = Bound(Request((1, 2), tuple(range(length))), samples, seed, enumerate_masks)
    for r in range(rounds):
        masks = bound.plan(samples * 2**r)
        bound.add(masks, table_SL[masks @ (1 << np.arange(length))])
    return bound.score


def scores(table_SL: Array, samples: int, number: int, rounds: int = 1) -> tuple[Array, Array]:
    drawn = [estimate(table_SL, samples, seed, rounds) for seed in range(number)]
    return np.array([score.mean for score in drawn]), np.array([score.stderr for score in drawn])


@pytest.mark.parametrize("samples", [1, 2, 3, 7, 16, 37])
@pytest.mark.parametrize("length", [3, 6])
def test_unbiased_for_every_number_of_samples(length: int, samples: int) -> None:
    table_SL = table(length, seed=length)
    means, _ = scores(table_SL, samples, 1500)
    assert abs(means.mean() - exact_value(table_SL)) < 4.5 * means.std() / math.sqrt(len(means))
    assert means.std() > 0.01


@settings(max_examples=8, deadline=None)
@given(length=st.integers(3, 7), samples=st.integers(2, 40), seed=st.integers(0, 1000), rounds=st.integers(1, 2))
def test_the_squared_standard_error_is_the_variance_on_the_average(
    length: int, samples: int, seed: int, rounds: int
) -> None:
    means, errors = scores(table(length, seed), samples, 600, rounds)
    ratio = (errors**2).mean() / means.var()
    assert 0.5 < ratio < 2


@pytest.mark.parametrize(("length", "samples"), [(5, 32), (8, 128), (9, 8)])
def test_intervals_cover_the_exact_value(length: int, samples: int) -> None:
    table_SL = table(length, seed=3)
    means, errors = scores(table_SL, samples, 600)
    quantile = student_t.ppf(0.975, min(samples, 16) - 1)
    covered = (np.abs(means - exact_value(table_SL)) <= quantile * errors).mean()
    assert 0.91 < covered < 0.99


def test_much_more_precise_than_independent_masks() -> None:
    table_SL, samples = table(8, seed=1, interaction=0.3), 64
    masks = all_masks(8)
    counts = masks.sum(axis=1)
    values = 8 / counts * table_SL[1:].sum(axis=1)
    second = np.mean([(values[counts == c] ** 2).mean() for c in range(1, 9)])
    independent = (second - exact_value(table_SL) ** 2) / samples
    means, _ = scores(table_SL, samples, 300)
    assert means.var() < independent / 20


def test_nothing_is_left_to_chance_where_the_model_looks_at_counts_linearly() -> None:
    token = np.array([-1.0, -5.0, -2.0, -9.0, -3.0, -4.0])
    masked = np.concatenate([np.zeros((1, 6), dtype=bool), all_masks(6)])
    table_SL = (token - 0.5 * masked.sum(axis=1, keepdims=True) * np.arange(6)) * masked
    for seed in range(3):
        assert estimate(table_SL, 6, seed).mean == pytest.approx(exact_value(table_SL), abs=1e-9)
        assert estimate(table_SL, 6, seed).stderr == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(("length", "samples", "exact"), [(1, 1, True), (4, 15, True), (4, 14, False), (7, 128, True)])
def test_all_masks_are_scored_where_they_are_no_more_than_the_samples(length: int, samples: int, exact: bool) -> None:
    table_SL = table(length, seed=2)
    score = estimate(table_SL, samples, 0, enumerate_masks=True)
    assert score.exact == exact
    assert score.samples == (2**length - 1 if exact else samples)
    if exact:
        assert score.mean == pytest.approx(exact_value(table_SL), abs=1e-9) and score.stderr == 0


def test_growing_turns_to_enumeration_where_that_is_cheaper() -> None:
    table_SL = table(5, seed=2)
    score = estimate(table_SL, 16, 0, rounds=3, enumerate_masks=True)  # 16, then 16 more, then 32 more or all 31
    assert score.exact and score.mean == pytest.approx(exact_value(table_SL), abs=1e-9)


def test_one_sample_tells_no_error_and_samples_are_counted() -> None:
    assert math.isnan(estimate(table(6, 0), 1, 0).stderr)
    assert estimate(table(6, 0), 37, 0).samples == 37
    assert estimate(table(6, 0), 37, 0, rounds=2).samples == 74
