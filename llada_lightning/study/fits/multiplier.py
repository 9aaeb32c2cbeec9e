"""The compute multiplier: training FLOPs that ``llada`` needs over those that ``arm`` needs for equal loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import numpy as np
import numpy.typing as npt

from llada_lightning.compute.flops import Convention
from llada_lightning.study.fits.estimate import Array, Estimate
from llada_lightning.study.fits.isoflop import LossCurve
from llada_lightning.study.fits.parametric import ParametricFit
from llada_lightning.study.fits.power_law import PowerLaw

Method = Literal["envelope", "isoflop", "parametric"]
METHODS: tuple[Method, ...] = get_args(Method)

EXTRAPOLATION = 10.0
"""How far beyond its budgets an objective may reach a loss for the multiplier to be told."""

DRAWN_DECADES = 3.0
"""How far beyond its budgets a draw is followed."""

POINTS_A_DECADE = 12
ROUNDING = 1 + 1e-6


@dataclass(frozen=True)
class Multiplier:
    """FLOPs of ``llada`` over FLOPs of ``arm`` at the loss that ``arm`` reaches at ``arm_flops``; 95 % interval."""

    convention: Convention
    method: Method
    arm_flops: float
    multiplier: float
    low: float
    high: float
    extrapolated: bool
    """Whether one of them reaches that loss only outside of the budgets that its fit goes through (within a decade)."""
    doubt: str | None = None
    """Why the number is not to be relied on, as ``checks.doubts`` found it; None where nothing was found."""

    @property
    def trusted(self) -> bool:
        return self.doubt is None

    @property
    def shown(self) -> bool:
        """Whether tables and figures show it: not where a power law would have to hold beyond its budgets.

        Over synthetic studies with irreducible losses such 95 % intervals held the truth in four of ten.
        """
        return not (self.extrapolated and self.method == "envelope")

    @property
    def estimate(self) -> Estimate:
        return Estimate(self.multiplier, self.low, self.high)

    def as_dict(self) -> dict[str, Any]:
        return {**vars(self), "trusted": self.trusted, "interval": self.estimate.interval}


# --- fitting ---------------------------------------------------------------------------------------------------------


class LossLine(Protocol):
    """The best loss at given training FLOPs by some method, at its point estimate and in every draw."""

    @property
    def flops_range(self) -> tuple[float, float]: ...
    def loss(self, flops: npt.ArrayLike) -> Array: ...
    def drawn(self, flops: npt.ArrayLike) -> Array: ...


@dataclass(frozen=True)
class Line:
    """A law or curve with the FLOPs of the budgets that it goes through."""

    curve: PowerLaw | LossCurve
    flops_range: tuple[float, float]

    def loss(self, flops: npt.ArrayLike) -> Array:
        return self.curve.loss(flops)

    def drawn(self, flops: npt.ArrayLike) -> Array:
        return self.curve.drawn(flops)


@dataclass(frozen=True)
class FrontierLine:
    """The parametric law's frontier by one convention."""

    fit: ParametricFit
    convention: Convention

    @property
    def flops_range(self) -> tuple[float, float]:
        return self.fit.flops_ranges[self.convention]

    def loss(self, flops: npt.ArrayLike) -> Array:
        return self.fit.frontier_loss(self.convention, flops)

    def drawn(self, flops: npt.ArrayLike) -> Array:
        return self.fit.drawn_frontier(self.convention, flops)


def compute_multipliers(
    convention: Convention, method: Method, arm: LossLine, llada: LossLine, arm_flops: npt.ArrayLike
) -> list[Multiplier]:
    """The compute multiplier at given FLOPs of ``arm``, joint over the draws of both objectives.

    Left out is what either objective reaches only more than a decade beyond the budgets of its fit, or never. An
    interval's end that lies more than ``DRAWN_DECADES`` beyond them is open (infinite, or zero).
    """
    flops = np.asarray(arm_flops, float)
    low, high = llada.flops_range
    decades = np.log10(high / low) + 2 * DRAWN_DECADES
    log_grid = np.linspace(
        np.log(low) - DRAWN_DECADES * np.log(10),
        np.log(high) + DRAWN_DECADES * np.log(10),
        int(np.ceil(POINTS_A_DECADE * decades)) + 1,
    )
    grid = np.exp(log_grid)
    needed = np.exp(_first_reached(log_grid, llada.loss(grid)[None], arm.loss(flops)[None]))[0]
    drawn = np.exp(_first_reached(log_grid, llada.drawn(grid), arm.drawn(flops))) / flops
    found = []
    for number, (given, value) in enumerate(zip(flops, needed, strict=True)):
        sides = ((arm, given), (llada, value))
        if all(_within(line, reached, EXTRAPOLATION) for line, reached in sides):
            estimate = Estimate.of(value / given, drawn[:, number])
            outside = not all(_within(line, reached, ROUNDING) for line, reached in sides)
            found.append(
                Multiplier(convention, method, float(given), estimate.value, estimate.low, estimate.high, outside)
            )
    return found


def _within(line: LossLine, flops: float, factor: float) -> bool:
    """Whether FLOPs are no further beyond a line's own than by a factor."""
    low, high = line.flops_range
    return bool(low / factor <= flops <= high * factor)


def _first_reached(log_grid: Array, losses: Array, goals: Array) -> Array:
    """log FLOPs at which a loss is first reached, per draw: losses (S, g) on the grid and goals (S, k) give (S, k).

    Minus infinity where the grid begins below the goal, infinity where it is never reached, NaN where unknown.
    Between two points of the grid the logarithm of the loss is a straight line.
    """
    best = np.log(np.minimum.accumulate(losses, axis=1))
    wanted = np.log(goals)
    reached = np.empty_like(wanted)
    rows = np.arange(len(best))
    for column in range(wanted.shape[1]):
        goal = wanted[:, column]
        right = np.sum(best > goal[:, None], axis=1)
        inner = np.clip(right, 1, len(log_grid) - 1)
        before, after = best[rows, inner - 1], best[rows, inner]
        with np.errstate(invalid="ignore", divide="ignore"):
            share = (before - goal) / (before - after)
        value = log_grid[inner - 1] + share * (log_grid[inner] - log_grid[inner - 1])
        value = np.where(right == 0, -np.inf, np.where(right == len(log_grid), np.inf, value))
        reached[:, column] = np.where(np.isnan(goal) | np.isnan(best[:, 0]), np.nan, value)
    return reached
