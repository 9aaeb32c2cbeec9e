"""Counter-based noise: purity, independence, the Weyl sequence's stratification, and words that may never change."""

from __future__ import annotations

from itertools import product
from math import sqrt

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import kstest

from llada_lightning.objectives.noise import (
    GOLDEN_RATIO_64,
    Purpose,
    random_words,
    uniform,
    uniform_by_ordinal,
    weyl,
    words_to_uniform,
)

GOLDEN_RATIO = (sqrt(5) - 1) / 2
WINDOW = 64

seeds = st.integers(-(2**63), 2**63 - 1)
purposes = st.sampled_from(list(Purpose))
ordinals = st.integers(0, 10**12)


def star_discrepancy(x_N: npt.NDArray[np.float64]) -> float:
    """Largest error of the share of points in [0, a), over all a."""
    x_N, i_N = np.sort(x_N), np.arange(len(x_N))
    return float(np.maximum((i_N + 1) / len(x_N) - x_N, x_N - i_N / len(x_N)).max())


def arc_discrepancy(x_N: npt.NDArray[np.float64]) -> float:
    """The same over all arcs of the circle [0, 1): rotation leaves it alone, and it bounds the star discrepancy."""
    excess_N = np.arange(len(x_N)) / len(x_N) - np.sort(x_N)
    return float(excess_N.max() - excess_N.min() + 1 / len(x_N))


def test_known_words() -> None:
    """Philox4x64-10; checked once against an implementation that gives Random123's published answers."""
    words = random_words(1234, Purpose.MASK, 10**12, 6, sub_ordinal=7)
    assert words.tolist() == [
        0xBBBD8BD0FDD3DE83, 0x3F944F4101B535F8, 0x06BEF1C9CFF8669A,
        0x12F746440248E0D5, 0xD741F78E2BFCEDF7, 0x8AACEFF75EA51A2B,
    ]  # fmt: skip
    assert uniform_by_ordinal(1234, Purpose.TIME, np.array([5])).tolist() == [
        [0.7581118494404189, 0.8331651896485615, 0.7564372533530681, 0.7808981488797458]
    ]
    assert weyl(1234, Purpose.TIME, np.array([0, 1, 10**12])).tolist() == [
        0.6757393035137459, 0.2937732922636407, 0.5705874565136669,
    ]  # fmt: skip


@given(seeds, purposes, ordinals, st.integers(0, 2**40), st.integers(1, 40))
def test_draws_do_not_depend_on_what_was_drawn_before(
    seed: int, purpose: Purpose, n: int, sub_ordinal: int, count: int
) -> None:
    first = random_words(seed, purpose, n, count, sub_ordinal)
    random_words(seed, purpose, n + 1, 7, sub_ordinal)
    np.random.default_rng(0).random(5)
    np.testing.assert_array_equal(random_words(seed, purpose, n, count, sub_ordinal), first)
    np.testing.assert_array_equal(random_words(seed, purpose, n, 50, sub_ordinal)[:count], first)
    np.testing.assert_array_equal(uniform(seed, purpose, n, count, sub_ordinal), words_to_uniform(first))


@given(seeds, purposes, ordinals, st.lists(st.integers(0, 300), min_size=1, max_size=20))
def test_many_ordinals_are_the_single_ones_in_any_order(
    seed: int, purpose: Purpose, n: int, offsets: list[int]
) -> None:
    n_B = n + np.array(offsets, dtype=np.int64)
    for draw in (uniform_by_ordinal, weyl):
        one_by_one = np.concatenate([draw(seed, purpose, n_B[b : b + 1]) for b in range(len(n_B))])
        np.testing.assert_array_equal(draw(seed, purpose, n_B), one_by_one)


def test_no_two_draws_share_words() -> None:
    keys = list(product((0, 1, 2**40), Purpose, range(4), range(3)))
    words = [random_words(seed, purpose, n, 16, sub_ordinal) for seed, purpose, n, sub_ordinal in keys]
    words += [
        (uniform_by_ordinal(seed, purpose, np.arange(20)) * 2**53).astype(np.uint64) << np.uint64(11)
        for seed, purpose in product((0, 1, 2**40), Purpose)
    ]
    upper = np.concatenate([w.ravel() for w in words]) >> np.uint64(11)
    assert len(np.unique(upper)) == len(upper)


def test_neighbouring_seeds_streams_and_ordinals_are_uncorrelated() -> None:
    keys = list(product((0, 1), Purpose, (0, 1, 2)))
    correlation = np.corrcoef([uniform(seed, purpose, n, 4096) for seed, purpose, n in keys])
    pairs = correlation[np.triu_indices(len(keys), k=1)]
    assert np.abs(pairs).max() < 4.5 / sqrt(4096)  # 630 pairs: 4.5 standard errors
    assert pairs.std() == pytest.approx(1 / sqrt(4096), rel=0.15)


def test_uniform_numbers_are_uniform() -> None:
    assert kstest(uniform(0, Purpose.MASK, 5, 20_000), "uniform").pvalue > 0.01
    for column in uniform_by_ordinal(0, Purpose.TIME, np.arange(5000)).T:
        assert kstest(column, "uniform").pvalue > 0.01


def test_uniform_numbers_are_below_one() -> None:
    assert words_to_uniform(np.array([0, 2**64 - 1], dtype=np.uint64)).tolist() == [0.0, 1 - 2.0**-53]


@given(seeds, st.sampled_from([Purpose.TIME, Purpose.VALIDATION_TIME]), ordinals)
def test_weyl_is_stratified_in_every_window(seed: int, purpose: Purpose, n: int) -> None:
    """Three-gap theorem and Denjoy-Koksma inequality.

    The gaps between neighbours on the circle are three powers of the golden ratio: none is wider than 1.37/64. A
    window is the points {0, ..., 63} times the ratio, rotated, and the arc discrepancy of these is 2.69/64; the
    inequality proves 6/64 (2 for each of the blocks 55 + 8 + 1 of Fibonacci length). Independent points come to
    about 7/64.
    """
    t_B = weyl(seed, purpose, n + np.arange(WINDOW))
    gaps = np.diff(np.sort(t_B), append=t_B.min() + 1)
    powers = GOLDEN_RATIO ** np.arange(10, 7, -1)
    assert np.abs(gaps[:, None] - powers).min(axis=1).max() < 1e-12
    assert gaps.max() < 1.37 / WINDOW
    assert arc_discrepancy(t_B) == pytest.approx(2.68737 / WINDOW, rel=1e-5)
    assert star_discrepancy(t_B) < 2.69 / WINDOW


def test_weyl_stays_stratified_in_longer_windows() -> None:
    for count in (256, 1280, 4224, 100_000):  # logarithmic, where independent points need the root
        assert star_discrepancy(weyl(3, Purpose.TIME, 10**9 + np.arange(count))) < 2 * np.log(count) / count


@pytest.mark.parametrize("n", [0, 1, 63, 10**12])
def test_weyl_is_uniform_over_seeds(n: int) -> None:
    t = [weyl(seed, Purpose.TIME, np.array([n]))[0] for seed in range(3000)]
    assert kstest(t, "uniform").pvalue > 0.01


@given(seeds, ordinals)
def test_weyl_is_exact_at_large_ordinals(seed: int, n: int) -> None:
    start = int(random_words(seed, Purpose.TIME, 0, 1)[0])
    exact = ((start + n * GOLDEN_RATIO_64) % 2**64 >> 11) / 2**53
    assert weyl(seed, Purpose.TIME, np.array([n])).item() == exact
    step = np.diff(weyl(seed, Purpose.TIME, np.array([n, n + 1]))).item() % 1
    assert step == pytest.approx(GOLDEN_RATIO, abs=2.0**-52)
