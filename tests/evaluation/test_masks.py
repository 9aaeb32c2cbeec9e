"""The masks of Eq. 6: each as it should be alone, all of a replicate even together."""

from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from llada_lightning.evaluation.bound import all_masks, replicate_masks

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
