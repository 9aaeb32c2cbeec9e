"""The fit of L(N, D) = E + A / N^alpha + B / D^beta to the runs of one objective (Hoffmann et al. 2022, Approach 3).

Starts come from variable projection: at each node of a grid of (alpha, beta) the linear part (E, A, B >= 0) is solved
exactly. From the best of them the Huber loss of the residuals of log L is minimised to convergence. It is linear from
1.345 standard deviations of the residuals on, and at least from the 0.001 of Hoffmann et al.: a smaller number would
make of it a fit of absolute residuals, which is less efficient and converges slowly.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.optimize import least_squares, nnls

from llada_lightning.compute.flops import Convention
from llada_lightning.study.fits.law import LIMIT_SCALE, Law, below_zero, limit, log_loss_and_jacobian
from llada_lightning.study.fits.least_squares import EFFICIENT, ENOUGH, Curve, fit_many, huber
from llada_lightning.study.fits.runs import TokenCost, Unit, flops_column, losses
from llada_lightning.study.fits.uncertainty import UNKNOWN, Array, Noise, Spread, blocks

HUBER_DELTA = 1e-3
"""The least residual of log loss from which on the Huber loss is linear (Hoffmann et al. 2022)."""

EXPONENT_GRID = np.geomspace(0.03, 2.0, 18)
"""alpha and beta of the starts' grid."""

STARTS = 4
"""How many of the grid's best nodes are optimised."""

MIN_RUNS, MIN_SIZES = 6, 3
"""Five parameters need six runs, of three N and three D: two of each leave the exponents free."""

SANE_EXPONENTS = (0.02, 3.0)
"""A draw whose exponent is outside has run away: its term is a constant, or gone."""

RUNAWAY_SHARE = 0.025
SMALLEST_E = 0.01
"""The share of the smallest loss below which E cannot be told from zero."""


@dataclass(frozen=True)
class ParametricFit(Law):
    """The law of one objective, and how well the runs determine it."""

    rms_residual: float
    """Root mean square of the residuals of log loss."""
    r_squared: float
    """Share of the variance of log loss that the law explains."""
    reduced_chi_square: float | None
    """The reduced chi-square of log loss by the runs' own errors; None where these are not known."""
    scatter: Spread
    """The residual spread of log loss beyond the known errors."""
    misfit: float
    """p-value of the test of lack of fit (``Noise.misfit``); NaN where it cannot be made."""
    gradient: float
    """Largest component of the objective's gradient at the point estimate over the sum of its terms' sizes."""
    delta: float
    """The residual of log loss from which on the Huber loss is linear."""
    note: str | None
    """Which parameters the data do not tell, or why the fit is none; None where all is well."""
    converged: bool
    """Whether the point estimate and the draws are optima, so that losses can be read off the law."""

    @property
    def identified(self) -> bool:
        """Whether the data determine every parameter. What is read off the law can be stable where they do not."""
        return self.note is None

    def as_dict(self) -> dict[str, Any]:
        return {
            **self.estimates(),
            **{name: getattr(self, name) for name in ("rms_residual", "r_squared", "reduced_chi_square")},
            "spread": self.scatter.tau,
            "misfit": self.misfit,
            "huber_delta": self.delta,
            "gradient": self.gradient,
            "identified": self.identified,
            "converged": self.converged,
            "n_exponent": {name: self.n_exponent(name).as_dict() for name in self.costs},
            **({"note": self.note} if self.note else {}),
        }


def too_few(runs: pd.DataFrame) -> str | None:
    """Why these runs of one objective are too few for the law, and what is needed; None if they are enough."""
    sizes, tokens = (  # those within a percent are one
        int(np.sum(np.diff(np.sort(np.log(runs[column].to_numpy(float))), prepend=-np.inf) > 0.01))
        for column in ("params_nonembedding", "tokens")
    )
    if len(runs) >= MIN_RUNS and min(sizes, tokens) >= MIN_SIZES:
        return None
    return (
        f"no fit: {len(runs)} run{'s' * (len(runs) > 1)} of {sizes} N and {tokens} D; "
        f"at least {MIN_RUNS} runs of {MIN_SIZES} N and {MIN_SIZES} D are needed"
    )


def fit_parametric(
    runs: pd.DataFrame,
    conventions: tuple[Convention, ...],
    unit: Unit,
    noise: Noise,
    *,
    parabolas: Spread = UNKNOWN,
) -> ParametricFit:
    """The parametric law of one objective's runs, enough of them (``too_few``); arguments as for ``fit_objective``.

    ``parabolas`` is the spread of runs about the parabolas of their budgets, which assume less: it tests the law.
    """
    assert too_few(runs) is None
    log_n, log_d = (np.log(runs[column].to_numpy(float)) for column in ("params_nonembedding", "tokens"))
    log_n0, log_d0 = float(log_n.mean()), float(log_d.mean())
    y = np.log(losses(runs, unit)[0])
    points = (Points(log_n - log_n0, log_d - log_d0, y, noise),)
    fit = fit_laws(points, ALONE)
    theta, draws, (spread,) = fit.theta, fit.draws, fit.scatters
    residuals = y - fit.middle
    unreached = _unreached(fit.converged, fit.gradient)
    note = _note(draws, float(y.min()), unreached)
    return ParametricFit(
        theta=theta,
        draws=draws,
        log_n0=log_n0,
        log_d0=log_d0,
        costs={name: TokenCost.of_runs(runs, name) for name in conventions},
        flops_ranges=flops_ranges(runs, conventions),
        rms_residual=float(np.sqrt(np.mean(residuals**2))),
        r_squared=float(1 - np.sum(residuals**2) / np.sum((y - y.mean()) ** 2)),
        reduced_chi_square=spread.reduced_chi_square if noise.known else None,
        scatter=spread,
        misfit=noise.misfit(y - fit.least_fitted, fit.least_jacobian, parabolas),
        gradient=fit.gradient,
        delta=float(EFFICIENT * np.median(scales(noise, spread))),
        note=note,
        converged=not unreached,
    )


def flops_ranges(runs: pd.DataFrame, conventions: tuple[Convention, ...]) -> dict[Convention, tuple[float, float]]:
    """The smallest and the largest training FLOPs of some runs by each convention."""
    return {
        name: (float(runs[flops_column(name)].min()), float(runs[flops_column(name)].max())) for name in conventions
    }


def _unreached(converged: npt.NDArray[np.bool_], gradient: float) -> list[str]:
    """Why the optimum is not one; nothing where it is."""
    found = []
    if gradient > 1e-4:
        found.append(f"the optimum was not reached (relative gradient {gradient:.1e})")
    if np.mean(converged) < 1 - RUNAWAY_SHARE:
        found.append(f"{1 - np.mean(converged):.0%} of the draws did not converge")
    return found


def _note(draws: Array, lowest: float, unreached: list[str]) -> str | None:
    """Which parameters the data do not determine; None if they determine all."""
    found = []
    for name, column in (("alpha", 2), ("beta", 4)):
        exponents = np.exp(draws[:, column])
        away = float(np.mean((exponents < SANE_EXPONENTS[0]) | (exponents > SANE_EXPONENTS[1])))
        if away > RUNAWAY_SHARE:
            found.append(f"{name} runs away in {away:.0%} of the draws")
    vanished = float(np.mean(limit(draws)[0] < SMALLEST_E * np.exp(lowest)))
    if vanished > RUNAWAY_SHARE:
        found.append(f"E is not told from 0 in {vanished:.0%} of the draws")
    found += unreached
    return f"not identified: {'; '.join(found)}" if found else None


# --- the fit of the laws of one or two objectives ---------------------------------------------------------------------

Places = tuple[tuple[int, ...], ...]
"""Where the five parameters of each law are among those of a fit: laws may share some."""

ALONE: Places = ((0, 1, 2, 3, 4),)


@dataclass(frozen=True)
class Points:
    """The runs of one objective: log N and log D in the units of the fit (n,), log losses (n,), and their noise."""

    x: Array
    z: Array
    y: Array
    noise: Noise


@dataclass(frozen=True)
class LawsFit:
    """The parameters of some laws, fitted together (p,), and their draws (samples, p)."""

    theta: Array
    draws: Array
    converged: npt.NDArray[np.bool_]
    """Which draws are optima (samples,)."""
    gradient: float
    """See ``minimum``."""
    middle: Array
    """The fitted log losses (n,)."""
    least: Array
    """The parameters of least squares by the runs' own errors (p,), by which the spread is defined."""
    least_fitted: Array
    least_jacobian: Array
    scatters: tuple[Spread, ...]
    """The residual spread of each objective's log losses, beyond the known errors."""
    starts: list[Array]
    """The nodes of the grid that the fit began from, the best ones first."""


def fit_laws(points: Sequence[Points], places: Places) -> LawsFit:
    """The laws of some objectives, by the Huber loss of all their residuals.

    Each residual is in units of the standard deviation of its objective's losses about the law.
    """
    y, count = goals_of(points), sum(len(own.y) for own in points)
    curve, starts = law_curve(points, places), nodes(points, places)
    known = with_limits(np.concatenate([1 / np.sqrt(own.noise.weights()) for own in points]), points)
    least, _ = minimum(curve, y, known, starts, np.inf)
    fitted, jacobian = (value[0, :count] for value in curve(least[None]))
    scatters = tuple(
        own.noise.spread(own.y - fitted[rows], jacobian[rows][:, list(place)])
        for own, rows, place in zip(points, rows_of(points), places, strict=True)
    )
    of_runs = [scales(own.noise, spread) for own, spread in zip(points, scatters, strict=True)]
    scale = with_limits(np.concatenate(of_runs), points)
    theta, gradient = minimum(curve, y, scale, [least, *starts])
    middle = curve(theta[None])[0][0]
    fits = [
        fit_many(np.repeat(theta[None], len(errors), axis=0), _drawn(middle, errors), curve, scale, tolerance=ENOUGH)
        for errors in drawn_errors(points, scatters)
    ]
    draws, converged = (np.concatenate(parts) for parts in zip(*fits, strict=True))
    return LawsFit(theta, draws, converged, gradient, middle[:count], least, fitted, jacobian, scatters, starts)


def rows_of(points: Sequence[Points]) -> list[slice]:
    """Where the runs of each objective are among all."""
    ends = np.cumsum([0, *(len(own.y) for own in points)]).tolist()
    return [slice(first, last) for first, last in pairwise(ends)]


def law_curve(points: Sequence[Points], places: Places) -> Curve:
    """The log losses of all objectives by the parameters of a fit, then how far the E of each is below 0."""
    parameters = max(map(max, places)) + 1

    def curve(theta: Array) -> tuple[Array, Array]:
        own = [theta[:, list(place)] for place in places]
        parts = [log_loss_and_jacobian(one, of_one.x, of_one.z) for one, of_one in zip(own, points, strict=True)]
        limits = [below_zero(one) for one in own]
        fitted = np.concatenate([*(values for values, _ in parts), *(below[:, None] for below, _ in limits)], axis=1)
        slopes = [*(slopes for _, slopes in parts), *(slopes[:, None] for _, slopes in limits)]
        jacobian = np.zeros((*fitted.shape, parameters))
        end = 0
        for derivatives, place in zip(slopes, places * 2, strict=True):
            begin, end = end, end + derivatives.shape[1]
            jacobian[:, begin:end, list(place)] = derivatives
        return fitted, jacobian

    return curve


def with_limits(scale: Array, points: Sequence[Points]) -> Array:
    """The units of residuals (n,) and behind them that of each E below zero."""
    return np.append(scale, np.full(len(points), LIMIT_SCALE))


def goals_of(points: Sequence[Points]) -> Array:
    """The goals of a fit: the log losses, and no E below zero."""
    return np.concatenate([*(own.y for own in points), np.zeros(len(points))])


def _drawn(middle: Array, errors: Array) -> Array:
    """The goals of draws: the fitted log losses with errors (samples, n), and no E below zero."""
    goals = np.zeros((len(errors), len(middle)))
    goals[:, : errors.shape[1]] = middle[: errors.shape[1]] + errors
    return goals


def drawn_errors(points: Sequence[Points], spreads: Sequence[Spread]) -> Iterator[Array]:
    """Blocks of draws of the errors of all log losses (samples of the block, n)."""
    own = [of_one.noise.draws(spread) for of_one, spread in zip(points, spreads, strict=True)]
    errors = np.concatenate(own, axis=1)
    return (errors[block] for block in blocks(*errors.shape))


def nodes(points: Sequence[Points], places: Places) -> list[Array]:
    """The best nodes of a grid of exponents, the linear parts solved by non-negative least squares.

    The residuals are relative to the losses.
    """
    found = []
    for alpha in EXPONENT_GRID:
        for beta in EXPONENT_GRID:
            total, theta = 0.0, np.zeros(max(map(max, places)) + 1)
            for own, place in zip(points, places, strict=True):
                loss = np.exp(own.y)
                terms = np.ones_like(own.x), np.exp(-alpha * own.x), np.exp(-beta * own.z)
                linear, error = nnls(np.stack(terms, axis=1) / loss[:, None], np.ones_like(loss))
                e, a, b = np.maximum(linear, 1e-3 * loss.min())
                theta[list(place)] = np.log([e + a + b, alpha * a, alpha, beta * b, beta])
                total += error**2
            found.append((total, theta))
    return [theta for _, theta in sorted(found, key=lambda node: node[0])[:STARTS]]


def scales(noise: Noise, spread: Spread) -> Array:
    """(n,) the standard deviation of each log loss; no less than what ``HUBER_DELTA`` belongs to."""
    weights = noise.weights(spread.tau) if spread.known else noise.weights()
    if not noise.known:
        weights = weights / spread.tau**2 if spread.known and spread.tau > 0 else np.full_like(weights, np.inf)
    return np.maximum(1 / np.sqrt(weights), HUBER_DELTA / EFFICIENT)


def minimum(curve: Curve, y: Array, scale: Array, starts: list[Array], delta: float = EFFICIENT) -> tuple[Array, float]:
    """The parameters of the least Huber loss of log losses y (n,), and the largest component of its gradient.

    The component is relative to the sum of the sizes of the gradient's terms. It begins from every start.
    """
    best, lowest = starts[0], np.inf
    for start in starts:

        def residuals(theta: Array) -> Array:
            return (curve(theta[None])[0][0] - y) / scale

        def jacobian(theta: Array) -> Array:
            return curve(theta[None])[1][0] / scale[:, None]

        goal = {"loss": "linear"} if np.isinf(delta) else {"loss": "huber", "f_scale": delta}
        exact = {"xtol": 1e-14, "ftol": 1e-14, "gtol": 1e-14, "max_nfev": 2000}
        with np.errstate(over="ignore"):  # of steps that go too far, which are not taken
            found = least_squares(residuals, start, jacobian, **goal, **exact)
        (theta,), _ = fit_many(found.x[None], y[None], curve, scale, delta)  # to the last digit
        value = float(huber(residuals(theta), delta).sum())
        if value < lowest:
            best, lowest = theta, value
    pull = np.clip(residuals(best), -delta, delta)[:, None] * jacobian(best)
    size = np.abs(pull).sum(axis=0).max()
    return best, float(np.abs(pull.sum(axis=0)).max() / size) if size > 1e-10 else 0.0
