"""The forward process: how much is masked, where, and how long a sequence is."""

from __future__ import annotations

from itertools import combinations
from math import sqrt

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare, kstest

from llada_lightning.compute.flops import MASK_EPS, expected_length, expected_mask_probability
from llada_lightning.objectives.forward_process import (
    TIME_SAMPLINGS,
    TimeSampling,
    fixed_count_mask,
    mask_probability,
    mask_ratio,
    noisy_tokens,
    random_lengths,
    random_mask,
    stratified_mask_counts,
)

ordinals = st.integers(0, 10**12)
seeds = st.integers(0, 2**32)


def fibonacci_blocks(count: int) -> int:
    """Fibonacci numbers that ``count`` is the (greedy) sum of."""
    fibonacci = [1, 2]
    while fibonacci[-1] <= count:
        fibonacci.append(fibonacci[-1] + fibonacci[-2])
    blocks = 0
    for number in reversed(fibonacci):
        if number <= count:
            count, blocks = count - number, blocks + 1
    return blocks


def test_mask_probability_goes_from_eps_to_one() -> None:
    t = np.linspace(0, 1, 101)
    p = mask_probability(t)
    assert (MASK_EPS, p[0], p[-1]) == (1e-3, 1e-3, 1.0)
    np.testing.assert_allclose(p, t + 1e-3 * (1 - t), rtol=1e-14)
    np.testing.assert_array_equal(mask_probability(t, eps=0.0), t)


@pytest.mark.parametrize("eps", [0.0, 1e-3, 0.25])
def test_expected_mask_probability_is_the_mean_over_t(eps: float) -> None:
    midpoints = (np.arange(1000) + 0.5) / 1000
    assert mask_probability(midpoints, eps).mean() == pytest.approx(expected_mask_probability(eps), rel=1e-12)


@pytest.mark.parametrize("sampling", TIME_SAMPLINGS)
def test_mask_ratio_is_uniform_and_a_function_of_seed_and_ordinal(sampling: TimeSampling) -> None:
    t_B = mask_ratio(5, np.arange(4096), sampling)
    assert kstest(t_B, "uniform").pvalue > 0.01
    np.testing.assert_array_equal(mask_ratio(5, np.arange(100, 200), sampling), t_B[100:200])
    assert not np.isin(mask_ratio(6, np.arange(4096), sampling), t_B).any()


def test_independent_ratios_are_independent_and_weyl_ones_are_stratified() -> None:
    # The number of windows of 64 that leave some eighth with fewer than 5 or more than 11 of its 8.
    def uneven(sampling: TimeSampling) -> float:
        eighths = np.floor(mask_ratio(1, np.arange(64 * 200), sampling) * 8).astype(int).reshape(200, 64)
        counts = np.stack([(eighths == k).sum(axis=1) for k in range(8)])
        return float(((counts < 5) | (counts > 11)).any(axis=0).mean())

    assert uneven("weyl") == 0
    assert uneven("iid") > 0.5


@pytest.mark.parametrize("p", [1e-3, 0.05, 0.5, 0.9])
def test_masked_share_is_p_everywhere(p: float) -> None:
    sequences, length = 500, 256
    masked_BL = random_mask(2, np.arange(sequences), np.full(sequences, p), length)
    assert abs(masked_BL.mean() - p) < 4 * sqrt(p * (1 - p) / masked_BL.size)
    # Tokens are independent: counts along either axis vary as binomials do.
    assert masked_BL.sum(axis=0).var() == pytest.approx(sequences * p * (1 - p), rel=0.35)
    assert masked_BL.sum(axis=1).var() == pytest.approx(length * p * (1 - p), rel=0.35)


@given(seeds, ordinals, st.floats(0, 1), st.floats(0, 1))
def test_masks_grow_with_p_from_nothing_to_all(seed: int, n: int, p: float, q: float) -> None:
    none, fewer, more, everything = random_mask(seed, np.full(4, n), np.array([0, min(p, q), max(p, q), 1]), 64)
    assert not none.any()
    assert not (fewer & ~more).any()
    assert everything.all()


def test_no_two_sequences_share_a_mask() -> None:
    masks = np.concatenate([random_mask(seed, np.arange(200), np.full(200, 0.5), 128) for seed in range(5)])
    counts = np.full(200, 64)
    masks = np.concatenate([masks, *(fixed_count_mask(seed, np.arange(200), counts, 128) for seed in range(5))])
    assert len(np.unique(masks, axis=0)) == len(masks)
    assert np.abs(np.corrcoef(masks)[np.triu_indices(len(masks), k=1)]).max() < 6 / sqrt(128)


@given(seeds, ordinals, st.integers(1, 40), st.integers(1, 50))
def test_masks_are_functions_of_seed_and_ordinal(seed: int, n: int, batch: int, length: int) -> None:
    n_B, p_B = n + np.arange(batch), np.linspace(0, 1, batch)
    counts_B = 1 + np.arange(batch) % length
    random, fixed = random_mask(seed, n_B, p_B, length), fixed_count_mask(seed, n_B, counts_B, length)
    for b in range(batch):
        own = slice(b, b + 1)
        np.testing.assert_array_equal(random_mask(seed, n_B[own], p_B[own], length), random[own])
        np.testing.assert_array_equal(fixed_count_mask(seed, n_B[own], counts_B[own], length), fixed[own])
    np.testing.assert_array_equal(fixed.sum(axis=1), counts_B)


def test_each_set_of_a_count_is_equally_likely() -> None:
    sets = [sum(1 << i for i in chosen) for chosen in combinations(range(5), 2)]
    masked_BL = fixed_count_mask(0, np.arange(5000), np.full(5000, 2), 5)
    drawn_B = masked_BL @ (1 << np.arange(5))
    assert chisquare([np.count_nonzero(drawn_B == s) for s in sets]).pvalue > 0.01


@given(seeds, ordinals, st.integers(1, 300), st.integers(1, 20))
def test_counts_are_uniform_on_1_to_length(seed: int, n: int, length: int, times: int) -> None:
    """Each l owns an arc of 1/L: by Denjoy and Koksma its count is off by at most 2 for each Fibonacci block."""
    counts_B = stratified_mask_counts(seed, n + np.arange(length * times), length)
    assert counts_B.min() >= 1
    assert counts_B.max() <= length
    occurrences_L = np.bincount(counts_B, minlength=length + 1)[1:]
    assert np.abs(occurrences_L - times).max() <= 2 * fibonacci_blocks(length * times)


@pytest.mark.parametrize("length", [2, 4, 10, 64, 128])
def test_even_counts_have_no_advantage(length: int) -> None:
    counts_B = stratified_mask_counts(0, np.arange(length * 1000), length)
    occurrences_L = np.bincount(counts_B, minlength=length + 1)[1:]
    np.testing.assert_allclose(occurrences_L, 1000, atol=10)
    assert (counts_B % 2 == 0).mean() == pytest.approx(0.5, abs=2e-3)
    assert counts_B.mean() == pytest.approx((length + 1) / 2, rel=2e-3)


def test_every_length_is_full_without_a_share_of_random_ones() -> None:
    assert random_lengths(0, np.arange(100), 64, share=0.0).tolist() == [64] * 100


def test_random_lengths_are_uniform_from_one_to_full() -> None:
    lengths_B = random_lengths(0, np.arange(64_000), 64, share=1.0)
    assert chisquare(np.bincount(lengths_B, minlength=65)[1:]).pvalue > 0.01
    assert (lengths_B.min(), lengths_B.max()) == (1, 64)


@pytest.mark.parametrize("share", [0.01, 0.3])
def test_share_of_random_lengths(share: float) -> None:
    sequences, length = 200_000, 1000
    lengths_B = random_lengths(0, np.arange(sequences), length, share)
    shorter = share * (1 - 1 / length)  # a random length may be the full one
    assert abs((lengths_B < length).mean() - shorter) < 4 * sqrt(shorter * (1 - shorter) / sequences)
    error = lengths_B.std() / sqrt(sequences)
    assert abs(lengths_B.mean() - expected_length(length, share)) < 4 * error
    np.testing.assert_array_equal(random_lengths(0, np.arange(500, 700), length, share), lengths_B[500:700])


@given(st.integers(1, 5000), st.floats(0, 1))
def test_expected_length_is_the_mixtures_mean(length: int, share: float) -> None:
    mean = (1 - share) * length + share * np.arange(1, length + 1).mean()
    assert expected_length(length, share) == pytest.approx(mean, rel=1e-12)


def test_length_does_not_tell_the_mask_ratio() -> None:
    n_B = np.arange(20_000)
    lengths_B = random_lengths(0, n_B, 1000, share=1.0)
    for sampling in TIME_SAMPLINGS:
        assert abs(np.corrcoef(lengths_B, mask_ratio(0, n_B, sampling))[0, 1]) < 4 / sqrt(20_000)


@given(seeds, st.lists(ordinals, min_size=1, max_size=4, unique=True), st.sampled_from([0.0, 0.1, 0.5, 0.99]))
def test_noisy_tokens_are_a_function_of_seed_and_ordinal(seed: int, numbers: list[int], share: float) -> None:
    tokens_BL = np.random.default_rng(0).integers(0, 20, (len(numbers), 33))
    noisy_BL = noisy_tokens(seed, np.array(numbers), tokens_BL, share, 20, (0, 19))
    for row, number in enumerate(numbers):
        alone_1L = noisy_tokens(seed, np.array([number]), tokens_BL[row : row + 1], share, 20, (0, 19))
        np.testing.assert_array_equal(alone_1L[0], noisy_BL[row])
    special_BL = np.isin(tokens_BL, (0, 19))
    np.testing.assert_array_equal(noisy_BL[special_BL], tokens_BL[special_BL])
    assert not np.isin(noisy_BL[~special_BL], (0, 19)).any()
    assert share > 0 or (noisy_BL == tokens_BL).all()


def test_as_many_tokens_are_replaced_as_asked_for_and_by_all_others_alike() -> None:
    count, plain = 40_000, 18
    tokens_BL = np.full((4, count // 4), 7)
    noisy_BL = noisy_tokens(3, np.arange(4), tokens_BL, 0.3, 20, (0, 19))
    changed = int((noisy_BL != tokens_BL).sum())
    expected = count * 0.3 * (plain - 1) / plain  # one in 18 is replaced by itself
    assert abs(changed - expected) < 5 * sqrt(expected * 0.7)
    drawn = np.bincount(noisy_BL[noisy_BL != 7], minlength=20)
    assert drawn[[0, 7, 19]].tolist() == [0, 0, 0]
    assert chisquare(drawn[[i for i in range(1, 19) if i != 7]]).pvalue > 1e-3
