"""The law L(N, D) = E + A / N^alpha + B / D^beta of one objective (Hoffmann et al. 2022): its loss, and its optimum.

It is fitted as theta = (log L0, log a, log alpha, log b, log beta), with N and D in units of their geometric means:

    L = L0 - a (1 - N^-alpha) / alpha - b (1 - D^-beta) / beta,    E = L0 - a / alpha - b / beta

L0 is the loss in the middle of the runs, a and b are its slopes there. Runs tell these well even where they do not tell
E, A and alpha apart, so that a fit converges and what is read off the law is stable.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from llada_lightning.compute.flops import Convention
from llada_lightning.study.fits.least_squares import Estimate, interval
from llada_lightning.study.fits.runs import TokenCost
from llada_lightning.study.fits.uncertainty import Array, blocks

LIMIT_SCALE = 0.003
"""An E below zero counts as a residual of E / L0 in this unit: a loss has no limit below zero."""

SEARCH_WIDTH, SEARCH_STEPS = 10.0, 40
LEAST = 1e-12
"""The least loss of a law: one that is read off far outside of its runs can fall below zero."""


_RUNAWAYS = np.errstate(over="ignore", divide="ignore", invalid="ignore")
"""A step of a fit may go so far that numbers overflow; it is not taken then."""


@_RUNAWAYS
def log_loss(theta: Array, log_n: Array, log_d: Array) -> Array:
    """log L: theta (..., 5) and log N, log D (..., n) give (..., n)."""
    middle, a, alpha, b, beta = _parameters(theta)[..., None]
    loss = middle - a * _saturation(alpha, log_n) - b * _saturation(beta, log_d)
    return np.log(np.maximum(loss, LEAST))


@_RUNAWAYS
def log_loss_and_jacobian(theta: Array, log_n: Array, log_d: Array) -> tuple[Array, Array]:
    """log L (S, n) and its derivatives by theta (S, n, 5), for theta (S, 5)."""
    middle, a, alpha, b, beta = _parameters(theta)[..., None]
    by_n, by_d = _saturation(alpha, log_n), _saturation(beta, log_d)
    loss = np.maximum(middle - a * by_n - b * by_d, LEAST)
    slopes = (
        middle + 0 * by_n,
        -a * by_n,
        -a * (log_n * np.exp(-alpha * log_n) - by_n),
        -b * by_d,
        -b * (log_d * np.exp(-beta * log_d) - by_d),
    )
    return np.log(loss), np.stack(slopes, axis=-1) / loss[..., None]


def _parameters(theta: Array) -> Array:
    """L0, a, alpha, b and beta (5, ...) of theta (..., 5)."""
    return np.exp(np.moveaxis(theta, -1, 0))


def _saturation(exponent: Array, log_size: Array) -> Array:
    """(1 - size^-exponent) / exponent."""
    return -np.expm1(-exponent * log_size) / exponent


@_RUNAWAYS
def limit(theta: Array) -> tuple[Array, Array]:
    """E (S,) and its derivatives by theta (S, 5)."""
    middle, a, alpha, b, beta = _parameters(theta)
    of_n, of_d = a / alpha, b / beta
    return middle - of_n - of_d, np.stack([middle, -of_n, of_n, -of_d, of_d], axis=-1)


@_RUNAWAYS
def below_zero(theta: Array) -> tuple[Array, Array]:
    """min(E, 0) over L0, (S,) and its derivatives by theta (S, 5)."""
    e, slopes = limit(theta)
    middle = np.exp(theta[:, 0])
    share = np.where(e < 0, e / middle, 0.0)
    derivatives = slopes / middle[:, None]
    derivatives[:, 0] -= e / middle
    return share, np.where((e < 0)[:, None], derivatives, 0.0)


class Frontier(NamedTuple):
    """The optimal N, D and loss at given training FLOPs: each (3, k), the value and the ends of its 95 % interval."""

    n: Array
    d: Array
    loss: Array


@dataclass(frozen=True)
class Law:
    """E + A / N^alpha + B / D^beta, N non-embedding parameters and D training tokens."""

    theta: Array = field(repr=False)
    draws: Array = field(repr=False, compare=False)
    """Bootstrapped theta (samples, 5)."""
    log_n0: float = field(repr=False)
    log_d0: float = field(repr=False)
    costs: dict[Convention, TokenCost] = field(repr=False, compare=False)
    flops_ranges: dict[Convention, tuple[float, float]] = field(repr=False, compare=False)

    @cached_property
    def E(self) -> Estimate:  # noqa: N802 (the letter of the paper)
        return Estimate.of(limit(self.theta[None])[0][0], limit(self.draws)[0])

    @cached_property
    def A(self) -> Estimate:  # noqa: N802
        return self._amplitude(1, 2, self.log_n0)

    @cached_property
    def alpha(self) -> Estimate:
        return self._exponent(2)

    @cached_property
    def B(self) -> Estimate:  # noqa: N802
        return self._amplitude(3, 4, self.log_d0)

    @cached_property
    def beta(self) -> Estimate:
        return self._exponent(4)

    def estimates(self) -> dict[str, dict[str, Any]]:
        """The five parameters with their intervals, as they stand in ``fits.json``."""
        return {name: getattr(self, name).as_dict() for name in ("E", "A", "alpha", "B", "beta")}

    def _exponent(self, column: int) -> Estimate:
        return Estimate.of(np.exp(self.theta[column]), np.exp(self.draws[:, column]))

    def _amplitude(self, slope: int, exponent: int, log_unit: float) -> Estimate:
        with np.errstate(over="ignore"):  # of draws whose exponent ran away
            both = (self.theta, self.draws)
            value, drawn = (
                np.exp(t[..., slope] - t[..., exponent] + np.exp(t[..., exponent]) * log_unit) for t in both
            )
        return Estimate.of(float(value), drawn)

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
        return log_loss(theta, log_n - self.log_n0, log_d - self.log_d0)

    def _closed_form(self, theta: Array, log_c: Array) -> Array:
        """N = G (C / 6)^(beta / (alpha + beta)), G = (alpha A / (beta B))^(1 / (alpha + beta)); Hoffmann et al., Eq. 4.

        Here with N and D in units of their geometric means, where alpha A is a and beta B is b.
        """
        _, a, log_alpha, b, log_beta = theta.T[:, :, None]
        alpha, beta = np.exp(log_alpha), np.exp(log_beta)
        product = log_c - np.log(6.0) - self.log_n0 - self.log_d0
        return self.log_n0 + (a - b + beta * product) / (alpha + beta)

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
