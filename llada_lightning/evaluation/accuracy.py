"""A share of independent cases, with its error."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Accuracy:
    """Cases answered rightly, of so many."""

    correct: int
    count: int

    @property
    def value(self) -> float:
        return self.correct / self.count

    @property
    def stderr(self) -> float:
        """Of a share of independent cases."""
        return math.sqrt(self.value * (1 - self.value) / self.count)

    def record(self) -> dict[str, float]:
        """In plain values, for JSON."""
        return {"correct": self.correct, "count": self.count, "accuracy": self.value, "stderr": self.stderr}
