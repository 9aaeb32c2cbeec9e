"""The order of training: every item once an epoch, shares right in every window, purely by ordinal."""

from __future__ import annotations

import pickle
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llada_lightning.data.order import EpochOrder, Mixture, apportion, spread
from llada_lightning.support.errors import UserError

shard_sizes = st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(lambda sizes: sum(sizes) > 0)


@given(shard_sizes, st.integers(0, 2**63), st.integers(1, 5))
def test_every_item_is_seen_once_an_epoch(shards: list[int], seed: int, window: int) -> None:
    order = EpochOrder(shards, seed, window_shards=window)
    for epoch in range(3):
        items = [order.item(epoch * order.items + i) for i in range(order.items)]
        assert sorted(items) == list(range(sum(shards)))


def test_epochs_seeds_and_sources_have_different_orders() -> None:
    def items(seed: int, source: int, epoch: int) -> list[int]:
        order = EpochOrder([50, 50], seed, source)
        return [order.item(epoch * 100 + i) for i in range(100)]

    orders = [items(0, 0, 0), items(0, 0, 1), items(1, 0, 0), items(0, 1, 0)]
    assert all(a != b for i, a in enumerate(orders) for b in orders[i + 1 :])


@given(shard_sizes, st.lists(st.integers(0, 200), min_size=1, max_size=30))
def test_an_item_depends_on_the_position_alone(shards: list[int], positions: list[int]) -> None:
    order = EpochOrder(shards, seed=7, window_shards=2)
    first = [order.item(p) for p in positions]
    again = pickle.loads(pickle.dumps(order))
    assert [again.item(p) for p in reversed(positions)] == first[::-1]


@given(shard_sizes, st.integers(1, 120), st.integers(0, 2**63))
def test_a_limit_repeats_the_beginnings_of_all_shards(shards: list[int], limit: int, seed: int) -> None:
    order = EpochOrder(shards, seed, window_shards=2, limit=limit)
    kept = spread(limit, np.array(shards))
    assert order.items == kept.sum() == min(limit, sum(shards))
    starts = np.cumsum(shards) - shards
    beginnings = [start + i for start, count in zip(starts, kept, strict=True) for i in range(count)]
    for epoch in range(2):
        assert sorted(order.item(epoch * order.items + i) for i in range(order.items)) == beginnings


@given(shard_sizes, st.integers(1, 120))
def test_a_limit_is_spread_in_proportion(shards: list[int], limit: int) -> None:
    kept, total = spread(limit, np.array(shards)), min(limit, sum(shards))
    assert (kept <= shards).all()
    assert (np.abs(kept - np.array(shards) * total / sum(shards)) < 1).all()


def test_items_of_a_window_come_from_its_shards_only() -> None:
    shards, window = [10] * 12, 3
    order = EpochOrder(shards, seed=0, window_shards=window)
    for first in range(0, 120, 30):
        assert len({order.item(first + i) // 10 for i in range(30)}) == window


@pytest.mark.parametrize("weights", [[11, 61, 28], [1, 1], [0.5, 0.3, 0.2], [3.0], [1, 99], [2, 3, 5, 7, 11]])
def test_shares_are_right_in_every_window(weights: list[float]) -> None:
    mixture = Mixture(weights)
    sources = np.array([mixture.locate(n)[0] for n in range(3000)])
    share = np.array(weights) / sum(weights)
    for length in (7, 64, 100, 1000):
        for source in range(len(weights)):
            counts = np.convolve(sources == source, np.ones(length), mode="valid")
            assert np.abs(counts - length * share[source]).max() <= 2


@given(st.lists(st.integers(1, 60), min_size=1, max_size=5))
@settings(max_examples=30)
def test_positions_count_each_sources_ordinals(weights: list[int]) -> None:
    mixture = Mixture(weights)
    seen: Counter[int] = Counter()
    for n in range(300):
        source, position = mixture.locate(n)
        assert position == seen[source]
        seen[source] += 1
        assert mixture.consumed(n + 1).tolist() == [seen[s] for s in range(len(weights))]


@pytest.mark.parametrize("weights", [[0, 1], [-1, 2], [float("nan"), 1], [1e-9, 1], []])
def test_weights_that_make_no_mixture_are_refused(weights: list[float]) -> None:
    with pytest.raises(UserError, match=r"data\.path"):
        apportion(weights)


def test_fractional_weights_are_exact_to_one_in_ten_thousand() -> None:
    counts = apportion([1 / 3, 2 / 3])
    assert abs(counts[0] / counts.sum() - 1 / 3) < 1e-4
