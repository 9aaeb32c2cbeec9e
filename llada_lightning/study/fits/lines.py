"""The best loss against training FLOPs, as every method gives it to multipliers, forecasts and held-out predictions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy.typing as npt

from llada_lightning.study.fits.uncertainty import Array, Spread

DRAWN_DECADES = 3.0
"""How far beyond its budgets a law is followed."""


@dataclass(frozen=True)
class LossLine:
    """The best loss at given training FLOPs by some method, at its point estimate and in every draw."""

    flops_range: tuple[float, float]
    """The smallest and the largest training FLOPs of the budgets that it goes through."""
    loss: Callable[[npt.ArrayLike], Array]
    """FLOPs (k,) -> losses (k,)."""
    drawn: Callable[[npt.ArrayLike], Array]
    """FLOPs (k,) -> losses (samples, k)."""
    misfit: float
    """p-value of the lack of fit; NaN where there is no test of it."""
    scatter: Spread
    """The residual spread of log loss, beyond the errors of its points and the spread of runs."""
    decades: float = DRAWN_DECADES
    """How many decades of FLOPs beyond its budgets it is followed; 0: it is no law, and tells nothing there."""
