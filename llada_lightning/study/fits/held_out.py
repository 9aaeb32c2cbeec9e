"""The loss at the largest budget, as fits without that budget predict it: whether a method extrapolates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from llada_lightning.compute.flops import Convention
from llada_lightning.study.fits.envelope import Candidates
from llada_lightning.study.fits.isoflop import MIN_SHAPES, IsoflopFit
from llada_lightning.study.fits.joint import Pair, fit_joint
from llada_lightning.study.fits.least_squares import Estimate, interval
from llada_lightning.study.fits.lines import LossLine
from llada_lightning.study.fits.objective import METHODS, Method, ObjectiveFits, fit_objective
from llada_lightning.study.fits.runs import Unit, budget_members, flops_column, planned_convention
from llada_lightning.study.fits.uncertainty import UNKNOWN, Array, Noise, Spread, best_known, drawn_tau

TELLS_NOTHING = 4.0
"""A prediction whose interval spans more than this factor of the loss is no test: any loss lies in it."""


def is_inside(loss: float, predicted: Estimate) -> bool | None:
    """Whether a loss lies within the interval of its prediction; None: the interval is too wide to tell anything."""
    told = np.isfinite(predicted.low + predicted.high) and predicted.high < TELLS_NOTHING * predicted.low
    return predicted.covers(loss) if told else None


Rows = npt.NDArray[np.intp]


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
    """Predicted over observed, less one."""
    inside: bool | None
    """Whether the observation is in the interval; None where there is none."""
    beside: str | None = None
    """The other objective of a joint fit, whose largest budget was left out, too."""

    def of_pair(self, objective: str, reference: str) -> bool:
        """Whether it tests a fit that a multiplier of this pair rests on."""
        pair = {objective, reference}
        return self.objective in pair and (self.beside is None or self.beside in pair)

    def as_dict(self) -> dict[str, Any]:
        found = {name: value for name, value in vars(self).items() if name != "beside" or value is not None}
        return {**found, "interval": Estimate(self.predicted, self.low, self.high).interval}


def hold_out(
    runs: pd.DataFrame, fits: ObjectiveFits, unit: Unit, noise: Noise, seed: int = 0, *, borrowed: Spread = UNKNOWN
) -> list[HeldOut]:
    """Fits the smaller budgets of one objective and predicts the loss at the largest, by each method and convention.

    Held out is the largest budget of enough shapes for a parabola, if there is one; what is larger is left out too.
    The observation is the optimum of the budget's parabola, or its best shape where there is none (and for the
    envelope). The interval is for the observation: it holds the errors of prediction and observation, drawn jointly,
    so that an error that all runs share does not count, and the residuals of the method's law. Methods that have no
    law of the smaller budgets are left out. ``fits`` are those of all ``runs``; the other arguments are as for
    ``fit_objective``.
    """
    conventions = tuple(fits.envelope)
    held, rest = _divided(runs, conventions)
    if not len(rest):
        return []
    smaller = runs.iloc[rest].reset_index(drop=True)
    fewer = fit_objective(fits.objective, smaller, conventions, unit, noise.take(rest), seed, borrowed=borrowed)
    lines = {
        (method, convention): line
        for convention in conventions
        for method in METHODS
        if (line := fewer.line(method, convention)) and line.decades
    }
    return _predictions(fits, lines, _observed(runs, held, fits, unit, noise), noise.samples, seed)


def hold_out_jointly(
    tables: Pair[pd.DataFrame],
    pair: Pair[ObjectiveFits],
    unit: Unit,
    noises: Pair[Noise],
    parabolas: Pair[Spread],
    seed: int = 0,
) -> list[HeldOut]:
    """The same by the joint law of two objectives, fitted without the largest budget of either."""
    conventions = tuple(pair[0].envelope)
    divided = [_divided(runs, conventions) for runs in tables]
    if not all(len(rest) for _, rest in divided):
        return []
    first, second = (runs.iloc[rest].reset_index(drop=True) for runs, (_, rest) in zip(tables, divided, strict=True))
    own, theirs = (noise.take(rest) for noise, (_, rest) in zip(noises, divided, strict=True))
    names = (pair[0].objective, pair[1].objective)
    joint = fit_joint(names, (first, second), (own, theirs), parabolas, conventions, unit)
    if joint is None or not joint.converged:
        return []
    found = []
    for fits, runs, noise, (held, _), other in zip(pair, tables, noises, divided, reversed(names), strict=True):
        lines: dict[tuple[Method, Convention], LossLine] = {
            ("joint", convention): joint.line(fits.objective, convention) for convention in conventions
        }
        observed = _observed(runs, held, fits, unit, noise)
        found += _predictions(fits, lines, observed, noise.samples, seed, beside=other)
    return found


def _divided(runs: pd.DataFrame, conventions: tuple[Convention, ...]) -> tuple[Rows, Rows]:
    """Row positions of the budget to be held out, and of all that are smaller."""
    budgets = budget_members(runs[flops_column(planned_convention(runs, conventions))])
    sizes = runs["params_nonembedding"].to_numpy(float)
    wide = [number for number, rows in enumerate(budgets) if len(np.unique(sizes[rows])) >= MIN_SHAPES]
    last = wide[-1] if wide else len(budgets) - 1
    return budgets[last], np.sort(np.concatenate([np.empty(0, np.intp), *budgets[:last]]))


Observation = tuple[float, float, Array]
"""A held-out budget: its FLOPs, its log loss, and the true less the observed log loss in every draw (samples,)."""


def _observed(
    runs: pd.DataFrame, held: Rows, fits: ObjectiveFits, unit: Unit, noise: Noise
) -> dict[Convention, tuple[Observation, Observation]]:
    """The best shape of a held-out budget, and the optimum of its parabola, or again the best shape."""
    conventions = tuple(fits.envelope)
    planned = planned_convention(runs, conventions)
    budget = Candidates.of(runs.iloc[held].reset_index(drop=True), planned, unit, noise.take(held))
    found = {}
    for convention in conventions:
        spread = best_known(fits.spread, fits.envelope[convention].spread)
        best = _best_shape(budget, runs.iloc[held], convention, spread)
        found[convention] = best, _optimum(fits.isoflop[convention], held) or best
    return found


def _predictions(
    fits: ObjectiveFits,
    lines: Mapping[tuple[Method, Convention], LossLine],
    observed: Mapping[Convention, tuple[Observation, Observation]],
    samples: int,
    seed: int,
    beside: str | None = None,
) -> list[HeldOut]:
    generator = np.random.default_rng(seed)
    normals, uniforms = generator.standard_normal(samples), generator.uniform(size=samples)
    results = []
    for (method, convention), line in lines.items():
        best, optimum = observed[convention]
        flops, seen, errors = best if method == "envelope" else optimum
        predicted = float(np.log(line.loss([flops])[0]))
        with np.errstate(divide="ignore"):  # of a draw of a law that falls to 0
            missed = np.log(line.drawn([flops])[:, 0]) - predicted - errors
        missed += drawn_tau(line.scatter, uniforms) * normals
        low, high = (float(np.exp(end)) for end in interval(predicted + missed))
        loss = float(np.exp(seen))
        inside = is_inside(loss, Estimate(float(np.exp(predicted)), low, high))
        numbers = (flops, loss, float(np.exp(predicted)), low, high, float(np.expm1(predicted - seen)))
        results.append(HeldOut(fits.objective, convention, method, *numbers, inside, beside))
    return results


def _best_shape(budget: Candidates, runs: pd.DataFrame, convention: Convention, spread: Spread) -> Observation:
    everything = np.arange(len(budget.rows))
    best = budget.best(everything)
    flops = float(runs[flops_column(convention)].to_numpy(float)[budget.rows[best]].mean())
    return flops, float(budget.log_loss[best]), budget.errors(everything, spread)


def _optimum(fit: IsoflopFit, held: Rows) -> Observation | None:
    for budget in fit.budgets:
        if budget.interior and set(budget.rows) == set(held):
            value = float(np.log(budget.loss_opt.value))
            return budget.flops, value, budget.drawn_log_loss_opt - value
    return None
