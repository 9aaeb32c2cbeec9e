"""What a fit is worth: its prediction of the largest budget, and whether the methods agree."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llada_lightning.scaling.fits.multiplier import Method
from llada_lightning.scaling.flops import Convention


@dataclass(frozen=True)
class HeldOut:
    """The loss at the largest budget as a fit without that budget predicts it; 95 % interval for the observation."""

    objective: str
    convention: Convention
    method: Method
    flops: float
    observed: float
    predicted: float
    low: float
    high: float
    relative_error: float
    inside: bool

    def as_dict(self) -> dict[str, Any]:
        return dict(vars(self))


@dataclass(frozen=True)
class Disagreement:
    """Two methods whose 95 % intervals of one quantity share no number."""

    quantity: str
    convention: Convention
    flops: float | None
    methods: tuple[str, str]
    values: tuple[float, float]
    intervals: tuple[tuple[float, float], tuple[float, float]]

    def as_dict(self) -> dict[str, Any]:
        return dict(vars(self))
