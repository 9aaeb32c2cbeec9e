"""The parametric law L(N, D) = E + A / N^alpha + B / D^beta (Hoffmann et al. 2022, Approach 3).

Starts come from variable projection: at each node of a grid of (alpha, beta) the linear part (E, A, B >= 0) is solved
exactly. From the best of them the Huber loss of the residuals of log L is minimised to convergence.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.optimize import least_squares, nnls

from llada_lightning.compute.flops import Convention
from llada_lightning.study.fits.least_squares import (
    PARAMETERS,
    Estimate,
    fit_many,
    huber,
    interval,
    log_loss,
    log_loss_and_jacobian,
)
from llada_lightning.study.fits.runs import TokenCost, Unit, flops_column, losses
from llada_lightning.study.fits.uncertainty import UNKNOWN, Array, Noise, Spread, blocks

HUBER_DELTA = 1e-3
"""The residual of log loss from which on the Huber loss is linear, as in Hoffmann et al. 2022."""

EXPONENT_GRID = np.geomspace(0.03, 2.0, 18)
"""alpha and beta of the starts' grid."""

STARTS = 4
"""How many of the grid's best nodes are optimised."""

MIN_RUNS, MIN_SIZES = 6, 3
"""Five parameters need six runs, of three N and three D: two of each leave the exponents free."""

SANE_EXPONENTS = (0.02, 3.0)
"""A draw whose exponent is outside has run away: its term is a constant, or gone."""

RUNAWAY_SHARE = 0.025
SEARCH_WIDTH, SEARCH_STEPS = 10.0, 40
SMALLEST_E = 0.01
"""The share of the smallest loss below which E cannot be told from zero."""


class Frontier(NamedTuple):
    """The optimal N, D and loss at given training FLOPs: each (3, k), the value and the ends of its 95 % interval."""

    n: Array
    d: Array
    loss: Array


@dataclass(frozen=True)
class ParametricFit:
    """E + A / N^alpha + B / D^beta, N non-embedding parameters and D training tokens."""

    E: Estimate
    A: Estimate
    alpha: Estimate
    B: Estimate
    beta: Estimate
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
    identified: bool
    note: str | None
    theta: Array = field(repr=False)
    """(log E, log A', log alpha, log B', log beta) with N and D in units of their geometric means."""
    draws: Array = field(repr=False, compare=False)
    """Bootstrapped theta (samples, 5)."""
    log_n0: float = field(repr=False)
    log_d0: float = field(repr=False)
    costs: dict[Convention, TokenCost] = field(repr=False, compare=False)
    flops_ranges: dict[Convention, tuple[float, float]] = field(repr=False, compare=False)

    def loss(self, n: npt.ArrayLike, d: npt.ArrayLike) -> Array:
        """Loss of N non-embedding parameters after D training tokens, broadcast."""
        log_n, log_d = np.broadcast_arrays(np.log(np.asarray(n, float)), np.log(np.asarray(d, float)))
        fitted = log_loss(self.theta, log_n.ravel() - self.log_n0, log_d.ravel() - self.log_d0)
        return np.exp(fitted).reshape(log_n.shape)

    def frontier(self, convention: Convention, flops: npt.ArrayLike) -> Frontier:
        """The optimum at given training FLOPs (k,)."""
        log_c = np.log(np.atleast_1d(np.asarray(flops, float)))
        point, drawn = (self._optimum(theta, convention, log_c) for theta in (self.theta[None], self.draws))
        with np.errstate(over="ignore"):  # of draws whose exponent ran away
            return Frontier(*(np.exp([value[0], *interval(draws)]) for value, draws in zip(point, drawn, strict=True)))

    def frontier_loss(self, convention: Convention, flops: npt.ArrayLike) -> Array:
        """The optimal loss at given training FLOPs (k,)."""
        log_c = np.log(np.atleast_1d(np.asarray(flops, float)))
        return np.exp(self._optimum(self.theta[None], convention, log_c)[2][0])

    def drawn_frontier(self, convention: Convention, flops: npt.ArrayLike) -> Array:
        """The optimal loss at given training FLOPs in every draw: (samples, k)."""
        log_c = np.log(np.atleast_1d(np.asarray(flops, float)))
        parts = blocks(len(self.draws), len(log_c))
        return np.exp(np.concatenate([self._optimum(self.draws[part], convention, log_c)[2] for part in parts]))

    def n_exponent(self, convention: Convention) -> Estimate:
        """a of N_opt ~ C^a; by the total the mean slope over the runs' own range of FLOPs."""
        if convention == "6nd":
            alpha, beta = np.exp(self.draws[:, [2, 4]]).T
            return Estimate.of(self.beta.value / (self.alpha.value + self.beta.value), beta / (alpha + beta))
        ends = np.log(self.flops_ranges[convention])
        point, drawn = (
            np.diff(self._optimum(theta, convention, ends)[0], axis=1)[:, 0] / np.diff(ends)
            for theta in (self.theta[None], self.draws)
        )
        return Estimate.of(point[0], drawn)

    def _optimum(self, theta: Array, convention: Convention, log_c: Array) -> tuple[Array, Array, Array]:
        """log N_opt, log D_opt and log loss (S, k) for theta (S, 5) and log FLOPs (k,)."""
        if convention == "6nd":
            log_n = self._closed_form(theta, log_c)
            log_d = log_c - np.log(6.0) - log_n
        else:
            log_n = self._searched(theta, self.costs[convention], log_c)
            log_d = log_c - self.costs[convention](log_n)
        return log_n, log_d, self._log_loss_of(theta, log_n, log_d)

    def _log_loss_of(self, theta: Array, log_n: Array, log_d: Array) -> Array:
        e, a, log_alpha, b, log_beta = theta.T[:, :, None]
        n_term = a - np.exp(log_alpha) * (log_n - self.log_n0)
        d_term = b - np.exp(log_beta) * (log_d - self.log_d0)
        return np.logaddexp(e, np.logaddexp(n_term, d_term))

    def _closed_form(self, theta: Array, log_c: Array) -> Array:
        """N = G (C / 6)^(beta / (alpha + beta)), G = (alpha A / (beta B))^(1 / (alpha + beta)); Hoffmann et al., Eq. 4.

        Here with N and D in units of their geometric means.
        """
        _, a, log_alpha, b, log_beta = theta.T[:, :, None]
        alpha, beta = np.exp(log_alpha), np.exp(log_beta)
        product = log_c - np.log(6.0) - self.log_n0 - self.log_d0
        return self.log_n0 + (log_alpha + a - log_beta - b + beta * product) / (alpha + beta)

    def _searched(self, theta: Array, cost: TokenCost, log_c: Array) -> Array:
        """Golden-section search for log N, ten e-foldings beyond the runs' own on either side."""
        low = np.full((len(theta), len(log_c)), cost.log_n[0] - SEARCH_WIDTH)
        high = np.full_like(low, cost.log_n[-1] + SEARCH_WIDTH)
        ratio = (5**0.5 - 1) / 2

        def value(log_n: Array) -> Array:
            return self._log_loss_of(theta, log_n, log_c - cost(log_n))

        left, right = high - ratio * (high - low), low + ratio * (high - low)
        at_left, at_right = value(left), value(right)
        for _ in range(SEARCH_STEPS):
            lower = at_left < at_right
            low, high = np.where(lower, low, left), np.where(lower, right, high)
            new = np.where(lower, high - ratio * (high - low), low + ratio * (high - low))
            at_new = value(new)
            left, right = np.where(lower, new, right), np.where(lower, left, new)
            at_left, at_right = np.where(lower, at_new, at_right), np.where(lower, at_left, at_new)
        return (low + high) / 2

    def as_dict(self) -> dict[str, Any]:
        estimates = ("E", "A", "alpha", "B", "beta")
        return {
            **{name: getattr(self, name).as_dict() for name in estimates},
            **{name: getattr(self, name) for name in ("rms_residual", "r_squared", "reduced_chi_square")},
            "spread": self.scatter.tau,
            "misfit": self.misfit,
            "huber_delta": HUBER_DELTA,
            "gradient": self.gradient,
            "identified": self.identified,
            "n_exponent": {name: self.n_exponent(name).as_dict() for name in self.costs},
            **({"note": self.note} if self.note else {}),
        }


# --- fitting ---------------------------------------------------------------------------------------------------------


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
    x, z = log_n - log_n0, log_d - log_d0
    y = np.log(losses(runs, unit)[0])
    theta, gradient = _point(x, z, y)
    # The spread is defined for least squares by the runs' own errors.
    least, _ = fit_many(theta[None], y[None], x, z, np.inf, weights=noise.weights())
    fitted, jacobian = log_loss_and_jacobian(least, x, z)
    spread = noise.spread(y - fitted[0], jacobian[0])
    residuals = y - log_loss(theta, x, z)
    drawn_fits = [
        fit_many(np.repeat(theta[None], len(errors), axis=0), y - residuals + errors, x, z, HUBER_DELTA)
        for errors in noise.blocks_of_draws(spread)
    ]
    draws, converged = (np.concatenate(parts) for parts in zip(*drawn_fits, strict=True))
    note = _unidentified(draws, converged, float(y.min()), gradient)
    values, drawn = (np.exp(t) for t in (theta, draws))
    scales = ((1, 2, log_n0), (3, 4, log_d0))
    with np.errstate(over="ignore"):  # of draws whose exponent ran away
        amplitudes = [
            Estimate.of(np.exp(theta[i] + values[j] * mean), np.exp(draws[:, i] + drawn[:, j] * mean))
            for i, j, mean in scales
        ]
    return ParametricFit(
        E=Estimate.of(values[0], drawn[:, 0]),
        A=amplitudes[0],
        alpha=Estimate.of(values[2], drawn[:, 2]),
        B=amplitudes[1],
        beta=Estimate.of(values[4], drawn[:, 4]),
        rms_residual=float(np.sqrt(np.mean(residuals**2))),
        r_squared=float(1 - np.sum(residuals**2) / np.sum((y - y.mean()) ** 2)),
        reduced_chi_square=spread.reduced_chi_square if noise.known else None,
        scatter=spread,
        misfit=noise.misfit(y - fitted[0], jacobian[0], parabolas),
        gradient=gradient,
        identified=note is None,
        note=note,
        theta=theta,
        draws=draws,
        log_n0=log_n0,
        log_d0=log_d0,
        costs={name: TokenCost.of_runs(runs, name) for name in conventions},
        flops_ranges={
            name: (float(runs[flops_column(name)].min()), float(runs[flops_column(name)].max())) for name in conventions
        },
    )


def _point(x: Array, z: Array, y: Array) -> tuple[Array, float]:
    """The minimum of the Huber loss, and the largest component of its gradient relative to the terms' sizes."""

    def residuals(theta: Array) -> Array:
        return log_loss(theta, x, z) - y

    def jacobian(theta: Array) -> Array:
        return log_loss_and_jacobian(theta[None], x, z)[1][0]

    best, lowest = np.zeros(PARAMETERS), np.inf
    for start in _starts(x, z, y):
        goal = {"loss": "huber", "f_scale": HUBER_DELTA}
        found = least_squares(residuals, start, jacobian, **goal, xtol=1e-14, ftol=1e-14, gtol=1e-14, max_nfev=2000)
        (theta,), _ = fit_many(found.x[None], y[None], x, z, HUBER_DELTA)  # to the last digit
        value = float(huber(residuals(theta), HUBER_DELTA).sum())
        if value < lowest:
            best, lowest = theta, value
    pull = np.clip(residuals(best), -HUBER_DELTA, HUBER_DELTA)[:, None] * jacobian(best)
    size = np.abs(pull).sum(axis=0).max()
    return best, float(np.abs(pull.sum(axis=0)).max() / size) if size > 1e-14 else 0.0


def _starts(x: Array, z: Array, y: Array) -> list[Array]:
    """The best nodes of the grid, the linear part solved by non-negative least squares of relative residuals."""
    nodes = []
    loss = np.exp(y)
    for alpha in EXPONENT_GRID:
        for beta in EXPONENT_GRID:
            design = np.stack([np.ones_like(x), np.exp(-alpha * x), np.exp(-beta * z)], axis=1)
            linear, error = nnls(design / loss[:, None], np.ones_like(loss))
            e, a, b = np.log(np.maximum(linear, 1e-3 * loss.min()))
            nodes.append((error, np.array([e, a, np.log(alpha), b, np.log(beta)])))
    return [theta for _, theta in sorted(nodes, key=lambda node: node[0])[:STARTS]]


def _unidentified(draws: Array, converged: npt.NDArray[np.bool_], lowest: float, gradient: float) -> str | None:
    """Which parameters the data do not determine, as a note; None if they determine all."""
    found = []
    for name, column in (("alpha", 2), ("beta", 4)):
        exponents = np.exp(draws[:, column])
        away = float(np.mean((exponents < SANE_EXPONENTS[0]) | (exponents > SANE_EXPONENTS[1])))
        if away > RUNAWAY_SHARE:
            found.append(f"{name} runs away in {away:.0%} of the draws")
    vanished = float(np.mean(draws[:, 0] < lowest + np.log(SMALLEST_E)))
    if vanished > RUNAWAY_SHARE:
        found.append(f"E vanishes in {vanished:.0%} of the draws")
    if gradient > 1e-4:
        found.append(f"the optimum was not reached (relative gradient {gradient:.1e})")
    if np.mean(converged) < 1 - RUNAWAY_SHARE:
        found.append(f"{1 - np.mean(converged):.0%} of the draws did not converge")
    return f"not identified: {'; '.join(found)}" if found else None
