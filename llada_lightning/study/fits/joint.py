"""The joint law of two objectives: L(N, D) with shared exponents, and a free E, A and B for each.

    L_o(N, D) = E_o + A_o / N^alpha + B_o / D^beta

Two objectives on one Transformer and the same data may well approach their limits by the same exponents. If so, the
whole difference is in three numbers: the gap between the limits, and two efficiencies. rho_N = (A_r / A_o)^(1 / alpha)
is how many parameters of the reference r one parameter of the objective o is worth, and rho_D = (B_r / B_o)^(1 / beta)
the same for tokens. Where the limits are equal, the multiplier by 6ND is 1 / (rho_N rho_D) at every budget.

Whether the runs allow that, two tests of nested fits say: the same exponents against free ones, and the same E against
free ones. The fit is that of ``parametric``, over the runs of both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, TypeVar

import numpy as np
import pandas as pd

from llada_lightning.compute.flops import Convention
from llada_lightning.study.fits.law import Law, limit
from llada_lightning.study.fits.least_squares import Curve, Estimate
from llada_lightning.study.fits.lines import LossLine
from llada_lightning.study.fits.parametric import (
    RUNAWAY_SHARE,
    Places,
    Points,
    drawn_errors,
    fit_laws,
    flops_ranges,
    goals_of,
    law_curve,
    minimum,
    scales,
    too_few,
    with_limits,
)
from llada_lightning.study.fits.runs import TokenCost, Unit, losses
from llada_lightning.study.fits.uncertainty import Array, Noise, Spread

T = TypeVar("T")
Pair = tuple[T, T]
"""What belongs to the objective, and the same of the reference."""

SEPARATE: Places = ((0, 1, 2, 3, 4), (5, 6, 7, 8, 9))
SHARED_EXPONENTS: Places = ((0, 1, 6, 2, 7), (3, 4, 6, 5, 7))

ONE_E = 1e-4
"""The unit in which two limits that are to be one may differ, over the loss in the middle of the runs."""


@dataclass(frozen=True)
class JointFit:
    """The laws of an objective and of its reference with shared exponents, fitted together."""

    objective: str
    reference: str
    laws: dict[str, Law]
    """The law by the name of the objective."""
    scatters: dict[str, Spread]
    """The residual spread of log loss of each, beyond the known errors."""
    misfit: float
    """p-value of the test of lack of fit, over the runs of both; NaN where it cannot be made."""
    same_exponents: float
    """p-value of the test of shared exponents against free ones; NaN where it cannot be made."""
    same_e: float
    """p-value of the test of one E against two, the exponents being shared."""
    converged: bool
    spreads: dict[str, Spread] = field(repr=False)
    """The spread of each objective's runs as parabolas tell it, by which the tests are made."""

    @cached_property
    def rho_n(self) -> Estimate:
        """How many parameters of the reference one parameter of the objective is worth."""
        return self._worth(1, 2)

    @cached_property
    def rho_d(self) -> Estimate:
        """How many tokens of the reference one token of the objective is worth."""
        return self._worth(3, 4)

    @cached_property
    def e_difference(self) -> Estimate:
        """E of the objective less E of the reference, in the unit of the losses."""
        own, theirs = self.laws[self.objective], self.laws[self.reference]
        value = limit(own.theta[None])[0] - limit(theirs.theta[None])[0]
        return Estimate.of(float(value[0]), limit(own.draws)[0] - limit(theirs.draws)[0])

    def _worth(self, amplitude: int, exponent: int) -> Estimate:
        own, theirs = self.laws[self.objective], self.laws[self.reference]
        sides = ((own.theta, theirs.theta), (own.draws, theirs.draws))
        with np.errstate(over="ignore"):  # of draws whose exponent ran away
            value, drawn = (
                np.exp((r[..., amplitude] - o[..., amplitude]) / np.exp(o[..., exponent])) for o, r in sides
            )
        return Estimate.of(float(value), drawn)

    @property
    def rejection(self) -> float:
        """The smaller p-value of the tests of lack of fit and of shared exponents; NaN where they cannot be made."""
        return min(self.misfit, self.same_exponents)

    def line(self, name: str, convention: Convention) -> LossLine:
        """The best loss of one of the two against training FLOPs."""
        law, own, runs = self.laws[name], self.scatters[name], self.spreads[name]
        return LossLine(
            law.flops_ranges[convention],
            partial(law.frontier_loss, convention),
            partial(law.drawn_frontier, convention),
            self.rejection,
            own.beyond(runs),
        )

    def as_dict(self) -> dict[str, Any]:
        return {
            "objective": self.objective,
            "reference": self.reference,
            **{name: law.estimates() for name, law in self.laws.items()},
            **{name: getattr(self, name).as_dict() for name in ("rho_n", "rho_d", "e_difference")},
            **{name: getattr(self, name) for name in ("misfit", "same_exponents", "same_e", "converged")},
        }


def fit_joint(
    names: Pair[str],
    tables: Pair[pd.DataFrame],
    noises: Pair[Noise],
    parabolas: Pair[Spread],
    conventions: tuple[Convention, ...],
    unit: Unit,
) -> JointFit | None:
    """The joint law of an objective and its reference; None where one of them has too few runs (``too_few``).

    Args:
        names: The names of the objective and of the reference.
        tables: The usable runs of each.
        noises: The noise of each, which share their draws.
        parabolas: The spread of each objective's runs about the parabolas of their budgets.
        conventions: The conventions by which FLOPs are counted.
        unit: The unit of the losses.
    """
    if any(too_few(runs) for runs in tables):
        return None
    logs = [np.log(runs[["params_nonembedding", "tokens"]].to_numpy(float)) for runs in tables]
    log_n0, log_d0 = np.concatenate(logs).mean(axis=0)
    both = [
        Points(own[:, 0] - log_n0, own[:, 1] - log_d0, np.log(losses(runs, unit)[0]), noise)
        for own, runs, noise in zip(logs, tables, noises, strict=True)
    ]
    fit = fit_laws(both, SHARED_EXPONENTS)
    laws = {
        name: Law(
            fit.theta[list(places)],
            fit.draws[:, list(places)],
            float(log_n0),
            float(log_d0),
            {one: TokenCost.of_runs(runs, one) for one in conventions},
            flops_ranges(runs, conventions),
        )
        for name, places, runs in zip(names, SHARED_EXPONENTS, tables, strict=True)
    }
    misfit, same_exponents, same_e = _tests(both, parabolas, [fit.least, *fit.starts])
    return JointFit(
        *names,
        laws,
        dict(zip(names, fit.scatters, strict=True)),
        misfit,
        same_exponents,
        same_e,
        bool(fit.gradient <= 1e-4 and np.mean(fit.converged) >= 1 - RUNAWAY_SHARE),
        dict(zip(names, parabolas, strict=True)),
    )


# --- tests ------------------------------------------------------------------------------------------------------------


def _tests(both: Sequence[Points], parabolas: Pair[Spread], begin: list[Array]) -> tuple[float, float, float]:
    """p-values of the lack of fit, of shared exponents, and of one E, each by draws of the errors alone.

    The errors are the known ones and the spread of runs about the parabolas of their budgets, which assume less than
    any law of N and D. A draw changes the weighted sum of squares of a fit as it does that of the fit's linear part.
    The fits begin from parameters of the laws with shared exponents, ``begin``.
    """
    if not all(
        spread.known and (own.noise.known or spread.tau > 0) for own, spread in zip(both, parabolas, strict=True)
    ):
        return np.nan, np.nan, np.nan
    y = goals_of(both)
    scale = np.concatenate([scales(own.noise, spread) for own, spread in zip(both, parabolas, strict=True)])
    unit, shared = with_limits(scale, both), law_curve(both, SHARED_EXPONENTS)
    separately = [np.concatenate([theta[list(own)] for own in SHARED_EXPONENTS]) for theta in begin]
    fits = (
        (shared, begin, y, unit),
        (law_curve(both, SEPARATE), separately, y, unit),
        (_with_one_e(shared), begin, np.append(y, 0.0), np.append(unit, ONE_E)),
    )
    squares, bases = [], []
    for curve, starts, goal, own_unit in fits:
        theta, _ = minimum(curve, goal, own_unit, starts, np.inf)
        fitted, jacobian = (value[0] for value in curve(theta[None]))
        squares.append(float(np.sum(((goal - fitted) / own_unit) ** 2)))
        bases.append(np.linalg.qr(jacobian / own_unit[:, None])[0][: len(scale)])
    blocks_left = []
    for errors in drawn_errors(both, parabolas):
        scaled = errors / scale
        total = np.sum(scaled**2, axis=1)
        blocks_left.append([total - np.sum((scaled @ basis) ** 2, axis=1) for basis in bases])
    shared_left, separate_left, one_left = np.concatenate(blocks_left, axis=1)
    return (
        float(np.mean(shared_left >= squares[0])),
        float(np.mean(shared_left - separate_left >= squares[0] - squares[1])),
        float(np.mean(one_left - shared_left >= squares[2] - squares[0])),
    )


def _with_one_e(curve: Curve) -> Curve:
    """The same with one more value: how far the two limits are apart, over L0 of the reference."""

    def with_one(theta: Array) -> tuple[Array, Array]:
        fitted, jacobian = curve(theta)
        apart, slopes = np.zeros(len(theta)), np.zeros_like(theta)
        middle = np.exp(theta[:, SHARED_EXPONENTS[1][0]])
        for sign, places in zip((1, -1), SHARED_EXPONENTS, strict=True):
            value, derivatives = limit(theta[:, list(places)])
            apart += sign * value / middle
            slopes[:, list(places)] += sign * derivatives / middle[:, None]
        slopes[:, SHARED_EXPONENTS[1][0]] -= apart
        return np.append(fitted, apart[:, None], axis=1), np.append(jacobian, slopes[:, None], axis=1)

    return with_one
