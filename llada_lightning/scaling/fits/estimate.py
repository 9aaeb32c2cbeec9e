"""A number with its interval."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

INTERVAL = (2.5, 97.5)
"""Percentiles of a 95 % interval."""

Interval = Literal["known", "open", "unknown"]
"""Open: an end is infinite, or zero where only zero bounds it."""


def interval(draws: npt.ArrayLike) -> tuple[Array, Array]:
    """Lower and upper end of the 95 % interval over the first axis; NaN where a draw is NaN.

    An end is a draw, not a mean of two: draws may be infinite where the data put no bound.
    """
    low, high = np.percentile(np.asarray(draws, float), INTERVAL, axis=0, method="nearest")
    return low, high


@dataclass(frozen=True)
class Estimate:
    """A fitted value and the ends of its 95 % interval: infinite where open, NaN where nothing is known of it."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, value: float, draws: npt.ArrayLike) -> Estimate:
        low, high = interval(draws)
        return cls(float(value), float(low), float(high))

    def overlaps(self, other: Estimate) -> bool:
        """Whether the intervals share a number; true where one of them is not known."""
        return not (self.low > other.high or other.low > self.high)

    def covers(self, value: float) -> bool:
        return self.low <= value <= self.high

    @property
    def interval(self) -> Interval:
        """What JSON's null does not tell: whether an end is open, or not known."""
        if math.isnan(self.low) or math.isnan(self.high):
            return "unknown"
        return "open" if math.isinf(self.low) or math.isinf(self.high) or self.low == 0 else "known"

    def as_dict(self) -> dict[str, Any]:
        return {"value": self.value, "low": self.low, "high": self.high, "interval": self.interval}
