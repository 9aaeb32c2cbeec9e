"""The quadratic of one budget of a tuning study, in log rate and log batch, and where it is lowest.

With x = log rate and y = log batch, log loss = c0 + c1 x + c2 y + c3 x^2 + c4 x y + c5 y^2. The curvature (c3, c4, c5)
is the same for all budgets of an objective (``rules``).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from llada_lightning.study.fits.least_squares import Estimate
from llada_lightning.study.fits.uncertainty import Array

FAR = 0.1
"""Losses further above the best of their budget than this share are left out: a quadratic holds near its minimum."""

MIN_VALUES = 3
"""Of a rate or a batch, so that a parabola is determined."""


@dataclass(frozen=True)
class TuningOptimum:
    """The lowest loss of one budget and shape over rates and batches.

    The rate and the batch have 95 % intervals whose ends are infinite where they are beyond the grid by its own width.
    """

    shape: str
    params_nonembedding: float
    flops: float
    """C, 6ND: the geometric mean of the runs."""
    tokens: float
    """D, likewise."""
    lr: Estimate
    batch: Estimate
    """In tokens."""
    loss: Estimate
    """In nats per token."""
    continue_with: tuple[str, ...]
    """Where the optimum is not inside of the grid, what to add to it, such as `rates below 0.001`."""
    left_out: int
    """The number of runs whose loss is too high for the quadratic."""
    log_rates: Array = field(repr=False)
    log_batches: Array = field(repr=False)
    log_losses: Array = field(repr=False)
    coefficients: Array = field(repr=False)
    """Of 1, x, y, x^2, x y, y^2 with x and y from the means of ``log_rates`` and ``log_batches``."""
    drawn_log_lr: Array = field(repr=False, compare=False)
    drawn_log_batch: Array = field(repr=False, compare=False)

    @property
    def inside(self) -> bool:
        """Whether the optimum lies within the rates and batches of the grid."""
        return not self.continue_with

    @property
    def batch_varied(self) -> bool:
        return bool(np.ptp(self.log_batches) > 0)

    def curve(self, rates: Array, batch: float) -> Array:
        """The fitted loss at some rates and one batch of so many tokens."""
        x = np.log(rates) - self.log_rates.mean()
        y = np.full_like(x, np.log(batch) - self.log_batches.mean())
        return np.exp(_terms(x, y) @ self.coefficients)

    def as_dict(self) -> dict[str, Any]:
        names = ("shape", "params_nonembedding", "flops", "tokens")
        estimates = {name: getattr(self, name).as_dict() for name in ("lr", "batch", "loss")}
        grid = {
            "rates": np.unique(np.exp(self.log_rates).round(12)).tolist(),
            "batches": np.unique(np.exp(self.log_batches).round(6)).tolist(),
        }
        found = {name: getattr(self, name) for name in names}
        return {**found, **estimates, **grid, "inside": self.inside, "continue_with": list(self.continue_with)}


@dataclass(frozen=True)
class Grid:
    """The runs of one budget and shape that are near enough to its lowest loss."""

    rows: npt.NDArray[np.intp]
    first: pd.Series
    flops: float
    tokens: float
    log_rates: Array
    log_batches: Array
    log_losses: Array
    ends: tuple[tuple[float, float], tuple[float, float]]
    """The least and the largest log rate and log batch of all runs, those left out included."""
    left_out: int

    @property
    def design(self) -> Array:
        """The terms of the quadratic (n, 6); zeros for those of a batch that was not varied."""
        x, y = self.log_rates - self.log_rates.mean(), self.log_batches - self.log_batches.mean()
        return _terms(x, y if np.ptp(self.log_batches) > 0 else np.zeros_like(y))


def _terms(x: Array, y: Array) -> Array:
    return np.stack([np.ones_like(x), x, y, x * x, x * y, y * y], axis=-1)


def grid_of(runs: pd.DataFrame, rows: npt.NDArray[np.intp]) -> Grid | str:
    """The grid of these runs; where they determine no quadratic, the reason why not."""
    here = runs.iloc[rows]
    rates, batches, losses = (
        np.log(here[column].to_numpy(float)) for column in ("lr", "global_batch_tokens", "val_nats_per_token")
    )
    flops, tokens = (float(np.exp(np.log(here[column].to_numpy(float)).mean())) for column in ("flops_6nd", "tokens"))
    near = losses <= losses.min() + np.log1p(FAR)
    for kept in (near, np.ones_like(near)):
        ends = ((rates.min(), rates.max()), (batches.min(), batches.max()))
        chosen = rates[kept], batches[kept], losses[kept]
        grid = Grid(rows[kept], here.iloc[0], flops, tokens, *chosen, ends, int(np.sum(~kept)))
        counts = [len(np.unique(values.round(9))) for values in chosen[:2]]
        enough = counts[0] >= MIN_VALUES and (counts[1] >= MIN_VALUES or np.ptp(batches) == 0)
        if enough and np.linalg.matrix_rank(grid.design) == np.count_nonzero(grid.design.any(axis=0)):
            return grid
    return (
        f"{here['objective'].iloc[0]} at {flops:.2g} FLOPs, {here['shape'].iloc[0]}: {counts[0]} rates and {counts[1]} "
        f"batches; a quadratic needs {MIN_VALUES} rates, and {MIN_VALUES} batches or one"
    )


def optimum(grid: Grid, coefficients: Array, drawn: Array) -> TuningOptimum:
    """Where the quadratic of a grid is lowest.

    Args:
        grid: The runs.
        coefficients: Of 1, x, y, x^2, x y, y^2 with x and y from the means of the grid (6,).
        drawn: The same in every draw (samples, 6). NaN: nothing is known of their errors.
    """
    centre = np.array([grid.log_rates.mean(), grid.log_batches.mean()])
    ends = np.array(grid.ends) - centre[:, None]
    width = np.ptp(ends, axis=1)
    bounds = np.stack([ends[:, 0] - width, ends[:, 1] + width], axis=1)
    best, lowest = _minimum(coefficients[None], bounds)
    drawn_best, drawn_lowest = _minimum(drawn, bounds)
    found = best[0] + centre
    inf = np.where(drawn_best <= bounds[:, 0], -np.inf, np.where(drawn_best >= bounds[:, 1], np.inf, drawn_best))
    opened = np.where(width > 0, inf, drawn_best) + centre
    unknown = np.isnan(drawn).any(axis=1)
    opened[unknown] = np.nan
    drawn_best[unknown] = np.nan
    rate, batch = (Estimate.of(float(np.exp(found[k])), np.exp(opened[:, k])) for k in (0, 1))
    sides = {"rates": (grid.ends[0], 1.0), "batches": (grid.ends[1], float(grid.first["sequence_length"]))}
    ways = []
    for k, (what, ((low, high), unit)) in enumerate(sides.items()):
        if width[k] > 0 and not low < found[k] < high:
            side, end = ("below", low) if found[k] <= low else ("above", high)
            ways.append(f"{what} {side} {np.exp(end) / unit:.3g}{'' if k == 0 else ' sequences'}")
    return TuningOptimum(
        shape=str(grid.first["shape"]),
        params_nonembedding=float(grid.first["params_nonembedding"]),
        flops=grid.flops,
        tokens=grid.tokens,
        lr=rate,
        batch=batch,
        loss=Estimate.of(float(np.exp(lowest[0])), np.exp(np.where(unknown, np.nan, drawn_lowest))),
        continue_with=tuple(ways),
        left_out=grid.left_out,
        log_rates=grid.log_rates,
        log_batches=grid.log_batches,
        log_losses=grid.log_losses,
        coefficients=coefficients,
        drawn_log_lr=drawn_best[:, 0] + centre[0],
        drawn_log_batch=drawn_best[:, 1] + centre[1],
    )


def _minimum(coefficients: Array, bounds: Array) -> tuple[Array, Array]:
    """Where quadratics (n, 6) are lowest within a rectangle, (n, 2), and their values there, (n,).

    The lowest point is the stationary one, if it is a minimum inside, or else lies on an edge.

    Args:
        coefficients: Of 1, x, y, x^2, x y, y^2.
        bounds: The least and the largest x, and y (2, 2).
    """
    _, c1, c2, c3, c4, c5 = coefficients.T
    (x_low, x_high), (y_low, y_high) = bounds
    count = len(coefficients)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        determinant = 4 * c3 * c5 - c4**2
        x = (c2 * c4 - 2 * c1 * c5) / determinant
        y = (c1 * c4 - 2 * c2 * c3) / determinant
    is_minimum = (determinant > 0) & (c3 > 0) & (x > x_low) & (x < x_high) & (y > y_low) & (y < y_high)
    points = [np.where(is_minimum[:, None], np.stack([x, y], axis=1), [x_low, y_low])]
    for fixed in (y_low, y_high):  # along x
        along = _lowest_of_parabola(c1 + c4 * fixed, c3, x_low, x_high)
        points.append(np.stack([along, np.full(count, fixed)], axis=1))
    for fixed in (x_low, x_high):  # along y
        along = _lowest_of_parabola(c2 + c4 * fixed, c5, y_low, y_high)
        points.append(np.stack([np.full(count, fixed), along], axis=1))
    candidates = np.stack(points)
    values = np.sum(_terms(candidates[..., 0], candidates[..., 1]) * coefficients, axis=-1)
    best = np.argmin(values, axis=0)
    return candidates[best, np.arange(count)], values[best, np.arange(count)]


def _lowest_of_parabola(slope: Array, curvature: Array, low: float, high: float) -> Array:
    """Where slope x + curvature x^2 is lowest between two ends."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        vertex = np.clip(-slope / (2 * curvature), low, high)
    end = np.where(slope * (high - low) + curvature * (high**2 - low**2) < 0, high, low)
    return np.where(curvature > 0, vertex, end)
