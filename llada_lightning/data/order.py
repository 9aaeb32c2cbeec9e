"""The order of training: ordinal -> source of the mixture, item. Pure functions, so no loader state exists.

Each source is read in epochs; each epoch permutes the source's items by the seed. The permutation is local: shards
are shuffled, grouped into windows, and items are shuffled within a window, so that a remote corpus streams through
a window's worth of disk.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from llada_lightning.objectives.noise import Purpose, random_words
from llada_lightning.support.errors import UserError

WINDOW_SHARDS = 16
_MAX_PERIOD = 10_000


class EpochOrder:
    """Position -> item of one source: each item once an epoch, epoch after epoch.

    Args:
        shard_items: The number of items of each shard, in the order of the data set.
        seed: The seed of the order.
        source: The index of the source; the sources of a mixture are permuted independently.
        window_shards: The number of shards whose items are shuffled together.
        limit: The number of items that are read at all, the same for every seed: the first ones of each shard, by
            :func:`spread`; None: all.
    """

    def __init__(
        self,
        shard_items: Sequence[int],
        seed: int,
        source: int = 0,
        window_shards: int = WINDOW_SHARDS,
        limit: int | None = None,
    ) -> None:
        present = np.asarray(shard_items, dtype=np.int64)
        self._shard_starts = np.cumsum(present) - present
        self._shard_items = present if limit is None else spread(limit, present)
        self._seed, self._source, self._window_shards = seed, source, window_shards
        self.items = int(self._shard_items.sum())
        assert self.items > 0, "a source without items has no order"
        # Neighbouring ordinals share an epoch and a window; two of each also serve the passage to the next.
        self._windows = lru_cache(maxsize=2)(self._windows_of_epoch)
        self._items_of = lru_cache(maxsize=2)(self._items_of_window)

    def item(self, position: int) -> int:
        """Returns the item at a position, which is counted over all epochs."""
        epoch, offset = divmod(position, self.items)
        ends, _ = self._windows(epoch)
        window = int(np.searchsorted(ends, offset, side="right"))
        start = int(ends[window - 1]) if window else 0
        return int(self._items_of(epoch, window)[offset - start])

    def _windows_of_epoch(self, epoch: int) -> tuple[npt.NDArray[np.int64], list[npt.NDArray[np.int64]]]:
        """Cumulative item counts of the epoch's windows, and the shards of each."""
        shards = self._permutation(epoch, 0, len(self._shard_items))
        windows = [shards[i : i + self._window_shards] for i in range(0, len(shards), self._window_shards)]
        return np.cumsum([self._shard_items[window].sum() for window in windows]), windows

    def _items_of_window(self, epoch: int, window: int) -> npt.NDArray[np.int64]:
        shards = self._windows(epoch)[1][window]
        items = np.concatenate([self._shard_starts[s] + np.arange(self._shard_items[s]) for s in shards])
        return items[self._permutation(epoch, 1 + window, len(items))]

    def _permutation(self, epoch: int, part: int, size: int) -> npt.NDArray[np.int64]:
        words = random_words(self._seed, Purpose.ORDER, epoch, size, sub_ordinal=(self._source << 32) + part)
        return np.argsort(words, kind="stable")

    def __getstate__(self) -> dict[str, object]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_windows", "_items_of")}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._windows = lru_cache(maxsize=2)(self._windows_of_epoch)
        self._items_of = lru_cache(maxsize=2)(self._items_of_window)


def spread(total: int, capacities: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Returns ``total`` items spread over parts in proportion to the capacities, which no part exceeds."""
    if total >= capacities.sum():
        return capacities
    return _rounded(capacities * (total / capacities.sum()), total)


def _rounded(exact: npt.NDArray[np.float64], total: int) -> npt.NDArray[np.int64]:
    """Shares as whole numbers of the given sum, by largest remainder."""
    counts = np.floor(exact).astype(np.int64)
    counts[np.argsort(counts - exact, kind="stable")[: total - int(counts.sum())]] += 1
    return counts


class Mixture:
    """Ordinal -> (source, position within the source), by weights.

    A fixed pattern repeats: every period holds each source's exact share, spread as evenly as whole numbers allow
    (the j-th of a source's c items is due at (j + 1/2) / c of the period), so every window of ordinals has the
    weights' shares to within a few items. The position is the number of the source's earlier ordinals, in O(1).
    """

    def __init__(self, weights: Sequence[float]) -> None:
        self.counts = apportion(weights)
        due = np.concatenate([(np.arange(count) + 0.5) / count for count in self.counts])
        sources = np.repeat(np.arange(len(self.counts)), self.counts)
        self._pattern = sources[np.argsort(due, kind="stable")]
        earlier = np.zeros(len(self._pattern), dtype=np.int64)
        for source in range(len(self.counts)):
            own = self._pattern == source
            earlier[own] = np.arange(self.counts[source])
        self._earlier = earlier

    def locate(self, ordinal: int) -> tuple[int, int]:
        """Returns the source of an ordinal, and the position within it."""
        period, offset = divmod(ordinal, len(self._pattern))
        source = int(self._pattern[offset])
        return source, period * int(self.counts[source]) + int(self._earlier[offset])

    def consumed(self, ordinals: int) -> npt.NDArray[np.int64]:
        """Returns the number of items of each source among the first ``ordinals``."""
        periods, rest = divmod(ordinals, len(self._pattern))
        return periods * self.counts + np.bincount(self._pattern[:rest], minlength=len(self.counts))


def apportion(weights: Sequence[float]) -> npt.NDArray[np.int64]:
    """Returns the number of items of each source in a period of the mixture.

    The numbers are the weights themselves where they are whole and small; else the period has 10,000 items, divided by
    largest remainder.

    Args:
        weights: The weight of each source.

    Raises:
        UserError: A weight is not positive, or so small that it would get no item.
    """
    if not weights or any(not math.isfinite(w) or w <= 0 for w in weights):
        raise UserError(f"data.path: mixture weights {list(weights)} must all be positive numbers")
    if all(float(w).is_integer() for w in weights) and sum(weights) <= _MAX_PERIOD:
        whole = np.array([int(w) for w in weights])
        return whole // np.gcd.reduce(whole)
    counts = _rounded(np.asarray(weights, dtype=np.float64) / sum(weights) * _MAX_PERIOD, _MAX_PERIOD)
    if (counts == 0).any():
        raise UserError(
            f"data.path: a mixture weight of {min(weights):g} is below 1/{_MAX_PERIOD} of the whole; raise it"
        )
    return counts // np.gcd.reduce(counts)
