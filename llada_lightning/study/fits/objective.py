"""All fits of one objective's runs, and its largest budget as fits without that budget predict it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import pandas as pd

from llada_lightning.compute.flops import Convention
from llada_lightning.study.fits.envelope import Candidates, EnvelopeFit, fit_envelope
from llada_lightning.study.fits.isoflop import MIN_SHAPES, IsoflopFit, LossCurve, fit_isoflop, parabola_spread
from llada_lightning.study.fits.least_squares import Estimate, PowerLaw, interval
from llada_lightning.study.fits.parametric import ParametricFit, fit_parametric, too_few
from llada_lightning.study.fits.runs import Unit, budget_members, flops_column, planned_convention
from llada_lightning.study.fits.uncertainty import UNKNOWN, Array, Noise, Spread, best_known, drawn_tau

Method = Literal["envelope", "isoflop", "parametric"]
METHODS: tuple[Method, ...] = get_args(Method)


@dataclass(frozen=True)
class LossLine:
    """The best loss at given training FLOPs by some method, at its point estimate and in every draw.

    Multipliers and held-out predictions use the fit of a method through this class alone.
    """

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

    @classmethod
    def of(cls, law: PowerLaw | LossCurve, flops_range: tuple[float, float]) -> LossLine:
        return cls(flops_range, law.loss, law.drawn, law.misfit, law.scatter)


@dataclass(frozen=True)
class ObjectiveFits:
    """One objective by all methods; ``parametric`` is None where there are too few runs, as its note explains."""

    objective: str
    """The name of the objective, with the variant in brackets where it is not the default recipe."""
    envelope: dict[Convention, EnvelopeFit]
    isoflop: dict[Convention, IsoflopFit]
    parametric: ParametricFit | None
    parametric_note: str | None
    spread: Spread
    """The spread of log loss between runs beyond their known errors, which the envelope and the isoFLOP fit use."""

    def line(self, method: Method, convention: Convention) -> LossLine | None:
        """The best loss against FLOPs by a method; None where it has no fit, or one that the data leave open."""
        envelope, isoflop, parametric = self.envelope[convention], self.isoflop[convention], self.parametric
        if method == "envelope" and envelope.law:
            return LossLine.of(envelope.law, envelope.flops_range)
        if method == "isoflop" and isoflop.loss_curve:
            return LossLine.of(isoflop.loss_curve, isoflop.flops_range)
        if method == "parametric" and parametric and parametric.identified:
            own, runs = parametric.scatter, self.spread
            tau = float(np.sqrt(max(0.0, own.tau**2 - runs.tau**2))) if runs.known else own.tau
            return LossLine(
                parametric.flops_ranges[convention],
                partial(parametric.frontier_loss, convention),
                partial(parametric.drawn_frontier, convention),
                parametric.misfit,
                replace(own, tau=tau),
            )
        return None

    def notes(self) -> list[str]:
        """The notes of the fits, each with the name of its fit."""
        found = [
            f"{self.objective}, {method}, {convention}: {fit.note}"
            for method, fits in (("envelope", self.envelope), ("isoflop", self.isoflop))
            for convention, fit in fits.items()
            if fit.note
        ]
        biased = [
            f"{self.objective}, isoflop, {convention}: N_opt at {budget.flops:.2g} FLOPs moves by "
            f"{budget.bias:.0%} with a cubic term or without the outermost shapes, beyond its interval"
            for convention, fit in self.isoflop.items()
            for budget in fit.budgets
            if budget.bias is not None
        ]
        parametric = self.parametric.note if self.parametric else self.parametric_note
        return [*found, *biased, *([f"{self.objective}, parametric: {parametric}"] if parametric else [])]

    def as_dict(self) -> dict[str, Any]:
        return {
            "parametric": self.parametric.as_dict() if self.parametric else {"note": self.parametric_note},
            "isoflop": {name: fit.as_dict() for name, fit in self.isoflop.items()},
            "envelope": {name: fit.as_dict() for name, fit in self.envelope.items()},
        }


def fit_objective(
    objective: str,
    runs: pd.DataFrame,
    conventions: tuple[Convention, ...],
    unit: Unit,
    noise: Noise,
    seed: int = 0,
    *,
    borrowed: Spread = UNKNOWN,
) -> ObjectiveFits:
    """Every method on one objective's runs.

    Args:
        objective: The name of the objective, with its variant.
        runs: The usable runs of the objective.
        conventions: The conventions by which the FLOPs are counted.
        unit: The unit of the losses.
        noise: The noise of these runs, in their order.
        seed: The seed of the draws of the laws' own spread.
        borrowed: The residual spread of the parabolas of another objective, for where the parabolas of this one have
            no degrees of freedom.
    """
    lacking = too_few(runs)
    planned = planned_convention(runs, conventions)
    own = parabola_spread(runs, planned, unit, noise)
    by_parabolas = best_known(own, borrowed)
    parametric = None if lacking else fit_parametric(runs, conventions, unit, noise, parabolas=by_parabolas)
    borrowed = best_known(borrowed, parametric.scatter if parametric else UNKNOWN)
    spread = best_known(own, borrowed)
    return ObjectiveFits(
        objective,
        {name: fit_envelope(runs, name, planned, unit, noise, seed, spread=spread) for name in conventions},
        {name: fit_isoflop(runs, name, unit, noise, seed, borrowed=borrowed) for name in conventions},
        parametric,
        lacking,
        spread,
    )


# --- held-out --------------------------------------------------------------------------------------------------------


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

    def as_dict(self) -> dict[str, Any]:
        return {**vars(self), "interval": Estimate(self.predicted, self.low, self.high).interval}


def hold_out(
    runs: pd.DataFrame, fits: ObjectiveFits, unit: Unit, noise: Noise, seed: int = 0, *, borrowed: Spread = UNKNOWN
) -> list[HeldOut]:
    """Fits the smaller budgets of one objective and predicts the loss at the largest, by each method and convention.

    Held out is the largest budget of enough shapes for a parabola, if there is one; what is larger is left out too.
    The observation is the optimum of the budget's parabola, or its best shape where there is none (and for the
    envelope). The interval is for the observation: it holds the errors of prediction and observation, drawn jointly,
    so that an error that all runs share does not count, and the residuals of the method's law. Methods that have no
    fit of the smaller budgets are left out. ``fits`` are those of all ``runs``; the other arguments are as for
    ``fit_objective``.
    """
    conventions = tuple(fits.envelope)
    planned = planned_convention(runs, conventions)
    held, rest = _divided(runs, planned)
    if not len(rest):
        return []
    smaller = runs.iloc[rest].reset_index(drop=True)
    fewer = fit_objective(fits.objective, smaller, conventions, unit, noise.take(rest), seed, borrowed=borrowed)
    budget = Candidates.of(runs.iloc[held].reset_index(drop=True), planned, unit, noise.take(held))
    generator = np.random.default_rng(seed)
    normals, uniforms = generator.standard_normal(noise.samples), generator.uniform(size=noise.samples)
    results = []
    for convention in conventions:
        spread = best_known(fewer.spread, fewer.envelope[convention].spread)
        best = _best_shape(budget, runs.iloc[held], convention, spread)
        optimum = _optimum(fits.isoflop[convention], held) or best
        for method in METHODS:
            line = fewer.line(method, convention)
            if line:
                flops, observed, errors = best if method == "envelope" else optimum
                predicted = float(np.log(line.loss([flops])[0]))
                missed = np.log(line.drawn([flops])[:, 0]) - predicted - errors
                missed += drawn_tau(line.scatter, uniforms) * normals
                low, high = (float(np.exp(end)) for end in interval(predicted + missed))
                loss = float(np.exp(observed))
                inside = low <= loss <= high if np.isfinite(low + high) else None
                relative = float(np.expm1(predicted - observed))
                numbers = (flops, loss, float(np.exp(predicted)), low, high, relative)
                results.append(HeldOut(fits.objective, convention, method, *numbers, inside))
    return results


def _divided(runs: pd.DataFrame, planned: Convention) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """Row positions of the budget to be held out, and of all that are smaller."""
    budgets = budget_members(runs[flops_column(planned)])
    sizes = runs["params_nonembedding"].to_numpy(float)
    wide = [number for number, rows in enumerate(budgets) if len(np.unique(sizes[rows])) >= MIN_SHAPES]
    last = wide[-1] if wide else len(budgets) - 1
    return budgets[last], np.sort(np.concatenate([np.empty(0, np.intp), *budgets[:last]]))


Observation = tuple[float, float, Array]
"""A held-out budget: its FLOPs, its log loss, and the true less the observed log loss in every draw (samples,)."""


def _best_shape(budget: Candidates, runs: pd.DataFrame, convention: Convention, spread: Spread) -> Observation:
    everything = np.arange(len(budget.rows))
    best = budget.best(everything)
    flops = float(runs[flops_column(convention)].to_numpy(float)[budget.rows[best]].mean())
    return flops, float(budget.log_loss[best]), budget.errors(everything, spread)


def _optimum(fit: IsoflopFit, held: npt.NDArray[np.intp]) -> Observation | None:
    for budget in fit.budgets:
        if budget.interior and set(budget.rows) == set(held):
            value = float(np.log(budget.loss_opt.value))
            return budget.flops, value, budget.drawn_log_loss_opt - value
    return None
