"""Fits by least squares: numbers with intervals, linear fits, power laws, and many Huber fits at once."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from llada_lightning.study.fits.uncertainty import UNKNOWN, Array, Noise, Spread, best_known
from llada_lightning.support.errors import UserError

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


# --- linear fits -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LinearFit:
    """Weighted least squares: the parameters (p,), their draws (samples, p), and the residual spread."""

    theta: Array
    draws: Array
    spread: Spread
    residual: float
    """Root mean square."""


def linear_spread(design: Array, y: Array, noise: Noise) -> Spread:
    """The residual spread of points y (n,), beyond their errors, about least squares on a design (n, p)."""
    return noise.spread(y - design @ (solver(design, noise.weights()) @ y), design)


def fit_linear(design: Array, y: Array, noise: Noise, *, borrowed: Spread = UNKNOWN) -> LinearFit:
    """Least squares of y (n,) on a design (n, p), each point weighed by its own error and the spread beyond it.

    ``borrowed`` is the spread of other points of the kind, for where this fit has no degrees of freedom.
    """
    spread = best_known(linear_spread(design, y, noise), borrowed)
    solve = solver(design, noise.weights(np.nan_to_num(spread.tau)))
    theta = solve @ y
    residual = float(np.sqrt(np.mean((y - design @ theta) ** 2)))
    draws = np.concatenate([block @ solve.T for block in noise.blocks_of_draws(spread)])
    return LinearFit(theta, theta + draws, spread, residual)


def solver(design: Array, weights: Array) -> Array:
    """Weighted least squares as a matrix (p, n): theta = solver @ y."""
    root = np.sqrt(weights)
    return np.asarray(np.linalg.pinv(root[:, None] * design) * root, np.float64)


# --- power laws -------------------------------------------------------------------------------------------------------

MIN_BUDGETS = 3
"""A line has two parameters: with fewer than three budgets nothing is left to judge it by."""


@dataclass(frozen=True)
class PowerLaw:
    """y = a * (C / c0)^(sign b): a loss falls with training FLOPs C (sign -1), an optimum of N or D grows (+1)."""

    a: float
    b: float
    c0: float
    interval_a: tuple[float, float]
    interval_b: tuple[float, float]
    residual: float
    """Root mean square of the residuals of log y."""
    scatter: Spread
    """The residual spread of log y beyond the known errors."""
    misfit: float
    """p-value of the test of lack of fit (``Noise.misfit``); NaN where it cannot be made."""
    draws: Array = field(repr=False, compare=False)
    """Bootstrapped (log a, b), one row a draw."""
    sign: Literal[-1, 1] = -1

    @property
    def exponent(self) -> Estimate:
        """b with its interval."""
        return Estimate(self.b, *self.interval_b)

    def value(self, flops: npt.ArrayLike) -> Array:
        """y at given training FLOPs."""
        return self.a * (np.asarray(flops, float) / self.c0) ** (self.sign * self.b)

    loss = value

    def drawn(self, flops: npt.ArrayLike) -> Array:
        """y at given FLOPs in every draw: (samples, *flops.shape)."""
        distance = self.sign * np.log(np.atleast_1d(np.asarray(flops, float)) / self.c0)
        with np.errstate(over="ignore"):  # of draws whose exponent ran away
            return np.exp(self.draws[:, :1] + self.draws[:, 1:] * distance)

    def band(self, flops: npt.ArrayLike) -> tuple[Array, Array]:
        """Lower and upper end of the 95 % interval of y at given FLOPs."""
        return interval(self.drawn(flops))

    def as_dict(self) -> dict[str, Any]:
        names = ("sign", "a", "b", "c0", "interval_a", "interval_b", "residual")
        found = {name: getattr(self, name) for name in names}
        return {**found, "spread": self.scatter.tau, "misfit": self.misfit, "interval": self.exponent.interval}


def power_law(log_c: Array, log_y: Array, noise: Noise, *, sign: Literal[-1, 1] = -1) -> PowerLaw:
    """A power law through points whose log y errs by ``noise``.

    Raises:
        UserError: There are fewer than three points.
    """
    if (missing := MIN_BUDGETS - len(log_c)) > 0:
        more = f"{missing} more budget{'s' * (missing > 1)}"
        raise UserError(f"fit: {len(log_c)} budgets, a power law needs at least {MIN_BUDGETS}; run {more}")
    log_c0 = float(log_c.mean())  # where a and b are nearly uncorrelated
    design = np.stack([np.ones_like(log_c), sign * (log_c - log_c0)], axis=1)
    fit = fit_linear(design, log_y, noise)
    low, high = interval(fit.draws)
    return PowerLaw(
        a=float(np.exp(fit.theta[0])),
        b=float(fit.theta[1]),
        c0=float(np.exp(log_c0)),
        interval_a=(float(np.exp(low[0])), float(np.exp(high[0]))),
        interval_b=(float(low[1]), float(high[1])),
        residual=fit.residual,
        scatter=fit.spread,
        misfit=noise.misfit(log_y, design),
        draws=fit.draws,
        sign=sign,
    )


@dataclass(frozen=True)
class LossCurve:
    """The best loss against training FLOPs: log loss = c[0] + c[1] x + c[2] x^2, x = log(C / c0).

    A loss with an irreducible part is no power law; the bend follows it over the budgets of a study. More compute never
    makes the best loss worse: beyond its vertex the curve is flat.
    """

    c0: float
    coefficients: Array
    scatter: Spread
    """The residual spread of the log losses about the curve, beyond their own errors."""
    misfit: float
    """p-value of the test of lack of fit (``Noise.misfit``); NaN where it cannot be made."""
    draws: Array = field(repr=False, compare=False)

    def loss(self, flops: npt.ArrayLike) -> Array:
        """The loss at given FLOPs, of any shape."""
        flops = np.asarray(flops, float)
        return self._bent(self.coefficients[None], flops.ravel())[0].reshape(flops.shape)

    def drawn(self, flops: npt.ArrayLike) -> Array:
        """The loss at given FLOPs (k,) in every draw: (samples, k)."""
        return self._bent(self.draws, np.atleast_1d(np.asarray(flops, float)))

    def _bent(self, coefficients: Array, flops: Array) -> Array:
        first, slope, bend = coefficients.T[:, :, None]
        x = np.log(flops / self.c0)
        with np.errstate(divide="ignore", invalid="ignore"):
            vertex = -slope / (2 * bend)
        x = np.where(bend < 0, np.maximum(x, vertex), np.where(bend > 0, np.minimum(x, vertex), x))
        with np.errstate(over="ignore"):  # of draws that bend upwards far beyond the points
            return np.exp(first + slope * x + bend * x * x)

    def as_dict(self) -> dict[str, Any]:
        coefficients = self.coefficients.tolist()
        return {"c0": self.c0, "coefficients": coefficients, "spread": self.scatter.tau, "misfit": self.misfit}


def loss_curve(log_c: Array, log_losses: Array, noise: Noise, law: PowerLaw) -> LossCurve:
    """The bent curve through three or more points; ``law`` is the power law through them."""
    x = log_c - log_c.mean()
    design = np.stack([np.ones_like(x), x, x * x], axis=1)
    # Through three points the curve only interpolates: their own errors are all, or, not known, the line's scatter.
    through = Spread(0.0, 0, np.nan) if noise.known else law.scatter
    fit = fit_linear(design, log_losses, noise, borrowed=through if len(x) == design.shape[1] else UNKNOWN)
    misfit = noise.misfit(log_losses, design)
    return LossCurve(float(np.exp(log_c.mean())), fit.theta, fit.spread, misfit, fit.draws)


# --- many Huber fits ------------------------------------------------------------------------------------------------

Curve = Callable[[Array], tuple[Array, Array]]
"""Parameters (S, p) -> fitted values (S, n) and their derivatives (S, n, p)."""

EFFICIENT = 1.345
"""The residual, in standard deviations, from which on the Huber loss is linear: of Gaussian noise it costs 5 % of the
efficiency of least squares (Huber 1981)."""

MOST_STEPS = 300
_LONGEST_STEP = 1.0
PRECISE, ENOUGH = 1e-10, 1e-4
"""The gain of a step, as half a sum of squares in standard deviations, below which a fit has converged: for the last
digit of a value, and for a draw, where the sum itself is of the order of the number of points."""

_MOST_DAMPING = 1e10


def huber(residuals: Array, delta: float) -> Array:
    """r^2 / 2 within delta, delta (|r| - delta / 2) beyond."""
    size = np.abs(residuals)
    return np.where(size < delta, size**2 / 2, delta * (size - delta / 2))


def fit_many(
    start: Array, goals: Array, curve: Curve, scale: Array, delta: float = EFFICIENT, *, tolerance: float = PRECISE
) -> tuple[Array, npt.NDArray[np.bool_]]:
    """Levenberg-Marquardt on the sum of Huber losses, vectorised over the fits.

    The damped matrix is H + lambda M: H is the Hessian of the points within delta (Gauss-Newton), M that of the
    quadratic which lies above the Huber loss everywhere (iteratively reweighted least squares). Large lambda gives the
    safe step of the latter, small lambda Newton's.

    Args:
        start: The parameters to begin with (S, p), all of order one.
        goals: The values that each fit is of (S, n).
        curve: The function that is fitted.
        scale: The standard deviation of each value (n,), in whose units the residuals are.
        delta: The residual from which on the Huber loss is linear; infinite for least squares.
        tolerance: The gain of a step below which a fit has converged, ``PRECISE`` or ``ENOUGH``.

    Returns:
        The parameters (S, p), and which fits converged (S,) within ``MOST_STEPS``.
    """
    with np.errstate(over="ignore", invalid="ignore"):  # of a draw that runs away: its step is not taken
        return _levenberg_marquardt(start, goals, curve, scale, delta, tolerance)


def _levenberg_marquardt(
    start: Array, goals: Array, curve: Curve, scale: Array, delta: float, tolerance: float
) -> tuple[Array, npt.NDArray[np.bool_]]:
    theta = np.array(start, float)
    converged = np.zeros(len(theta), bool)
    damping = np.ones(len(theta))
    active = np.arange(len(theta))
    fitted, jacobian = curve(theta)
    for _ in range(MOST_STEPS):
        goal = goals[active]
        residuals = (fitted - goal) / scale
        value = huber(residuals, delta).sum(axis=1)
        step, gain = _step(residuals, jacobian / scale[:, None], damping[active], delta)
        moved = theta[active] + step
        new_fitted, new_jacobian = curve(moved)
        drop = value - huber((new_fitted - goal) / scale, delta).sum(axis=1)
        better = drop > 0
        theta[active[better]] = moved[better]
        fitted[better], jacobian[better] = new_fitted[better], new_jacobian[better]
        damping[active] = np.clip(damping[active] * np.where(better, 0.25, 6.0), 1e-9, 2 * _MOST_DAMPING)
        small = np.maximum(np.abs(drop), gain) <= tolerance
        done = small | (damping[active] > _MOST_DAMPING)
        converged[active[done]] = True
        if done.all():
            break
        active, fitted, jacobian = active[~done], fitted[~done], jacobian[~done]
    return theta, converged


def _step(residuals: Array, jacobian: Array, damping: Array, delta: float) -> tuple[Array, Array]:
    """The damped step (S, p), and the gain by the quadratic model (S,)."""
    size = np.abs(residuals)
    within = (size < delta).astype(float)
    above = np.minimum(1.0, delta / np.maximum(size, 1e-300)) if np.isfinite(delta) else np.ones_like(size)
    pull = np.clip(residuals, -delta, delta)
    weights = within + damping[:, None] * above
    transposed = np.swapaxes(jacobian, 1, 2)
    gradient = (transposed @ pull[:, :, None])[:, :, 0]
    matrix = transposed @ (weights[:, :, None] * jacobian)
    parameters = np.arange(matrix.shape[1])
    floor = 1e-12 * (1 + damping)[:, None] * (1 + np.trace(matrix, axis1=1, axis2=2)[:, None])
    matrix[:, parameters, parameters] += floor
    step = -np.asarray(np.linalg.solve(matrix, gradient[:, :, None])[:, :, 0], np.float64)
    step *= np.minimum(1.0, _LONGEST_STEP / np.maximum(np.abs(step).max(axis=1), 1e-300))[:, None]
    gain = np.asarray(-np.sum(gradient * step, axis=1) / 2, np.float64)
    return step, gain
