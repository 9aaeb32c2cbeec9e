"""A number with its interval.

Many Huber fits of log L = log(E + A / N^alpha + B / D^beta) at once, each to its own losses.

Parameters are theta = (log E, log A, log alpha, log B, log beta) with N and D in units of their geometric means: all
of order one, and no sign to watch over.
"""

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


PARAMETERS = 5
_LONGEST_STEP = 1.0
_TOLERANCE = 1e-10
_MOST_DAMPING = 1e10


def log_loss(theta: Array, log_n: Array, log_d: Array) -> Array:
    """log L: theta (..., 5) and log N, log D (..., n) give (..., n)."""
    return np.log(np.sum(_terms(theta, log_n, log_d), axis=0))


def _terms(theta: Array, log_n: Array, log_d: Array) -> Array:
    e, a, log_alpha, b, log_beta = np.moveaxis(theta, -1, 0)[..., None]
    with np.errstate(over="ignore"):
        return np.exp(np.stack(np.broadcast_arrays(e, a - np.exp(log_alpha) * log_n, b - np.exp(log_beta) * log_d)))


def log_loss_and_jacobian(theta: Array, log_n: Array, log_d: Array) -> tuple[Array, Array]:
    """log L (S, n) and its derivatives by theta (S, n, 5), for theta (S, 5)."""
    terms = _terms(theta, log_n, log_d)
    total = terms.sum(axis=0)
    share = terms / total
    alpha_n, beta_d = (np.exp(theta[:, [i]]) * size for i, size in ((2, log_n), (4, log_d)))
    jacobian = np.stack([share[0], share[1], -alpha_n * share[1], share[2], -beta_d * share[2]], axis=-1)
    return np.log(total), jacobian


def huber(residuals: Array, delta: float) -> Array:
    """r^2 / 2 within delta, delta (|r| - delta / 2) beyond."""
    size = np.abs(residuals)
    return np.where(size < delta, size**2 / 2, delta * (size - delta / 2))


def fit_many(
    start: Array,
    log_losses: Array,
    log_n: Array,
    log_d: Array,
    delta: float,
    *,
    weights: Array | None = None,
    most_steps: int = 300,
) -> tuple[Array, npt.NDArray[np.bool_]]:
    """Levenberg-Marquardt on the sum of Huber losses, vectorised over the fits.

    The damped matrix is H + lambda M: H is the Hessian of the points within delta (Gauss-Newton), M that of the
    quadratic which lies above the Huber loss everywhere (iteratively reweighted least squares). Large lambda gives the
    safe step of the latter, small lambda Newton's.

    Args:
        start: parameters to begin with (S, 5).
        log_losses: what each fit is of (S, n).
        log_n: log N over its geometric mean (n,); ``log_d`` likewise.
        delta: of the Huber loss; infinite for least squares.
        weights: of the squares (n,), for least squares; equal by default.
        most_steps: after which a fit is given up as not converged.

    Returns:
        Parameters (S, 5), and which fits converged (S,).
    """
    root = np.ones(len(log_n)) if weights is None else np.sqrt(weights / weights.mean())
    theta = np.array(start, float)
    converged = np.zeros(len(theta), bool)
    damping = np.ones(len(theta))
    active = np.arange(len(theta))
    for _ in range(most_steps):
        now, goal = theta[active], log_losses[active]
        fitted, jacobian = log_loss_and_jacobian(now, log_n, log_d)
        residuals = root * (fitted - goal)
        value = huber(residuals, delta).sum(axis=1)
        step, gain = _step(residuals, root[:, None] * jacobian, damping[active], delta)
        moved = now + step
        drop = value - huber(root * (log_loss(moved, log_n, log_d) - goal), delta).sum(axis=1)
        better = drop > 0
        theta[active[better]] = moved[better]
        damping[active] = np.clip(damping[active] * np.where(better, 0.25, 6.0), 1e-9, 2 * _MOST_DAMPING)
        small = np.maximum(np.abs(drop), gain) <= _TOLERANCE * (value + 1e-300)
        done = small | (damping[active] > _MOST_DAMPING) | (value < 1e-26)
        converged[active[done]] = True
        active = active[~done]
        if not len(active):
            break
    return theta, converged


def _step(residuals: Array, jacobian: Array, damping: Array, delta: float) -> tuple[Array, Array]:
    """The damped step (S, 5), and what the quadratic model says that it gains (S,)."""
    size = np.abs(residuals)
    within = (size < delta).astype(float)
    above = np.minimum(1.0, delta / np.maximum(size, 1e-300)) if np.isfinite(delta) else np.ones_like(size)
    pull = np.clip(residuals, -delta, delta)
    weights = within + damping[:, None] * above
    transposed = np.swapaxes(jacobian, 1, 2)
    gradient = (transposed @ pull[:, :, None])[:, :, 0]
    matrix = transposed @ (weights[:, :, None] * jacobian)
    floor = 1e-12 * (1 + damping)[:, None] * (1 + np.trace(matrix, axis1=1, axis2=2)[:, None])
    matrix[:, np.arange(PARAMETERS), np.arange(PARAMETERS)] += floor
    step = -np.asarray(np.linalg.solve(matrix, gradient[:, :, None])[:, :, 0], np.float64)
    step *= np.minimum(1.0, _LONGEST_STEP / np.maximum(np.abs(step).max(axis=1), 1e-300))[:, None]
    gain = np.asarray(-np.sum(gradient * step, axis=1) / 2, np.float64)
    return step, gain
