"""What a fit is worth: its prediction of the largest budget, and whether the methods agree."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations, groupby
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from llada_lightning.scaling.fits.estimate import Array, Estimate, interval
from llada_lightning.scaling.fits.isoflop import IsoflopFit
from llada_lightning.scaling.fits.multiplier import METHODS, LossLine, Method, Multiplier
from llada_lightning.scaling.fits.noise import Noise
from llada_lightning.scaling.fits.objective import ObjectiveFits, fit_objective
from llada_lightning.scaling.fits.runs import Unit, budget_members, flops_column, losses, planned_convention
from llada_lightning.scaling.flops import Convention


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
        return dict(vars(self))


@dataclass(frozen=True)
class Disagreement:
    """Two methods whose 95 % intervals of one quantity share no number."""

    quantity: str
    convention: Convention
    flops: float | None
    methods: tuple[str, str]
    values: tuple[float, float]
    intervals: tuple[tuple[float, float], tuple[float, float]]

    def as_dict(self) -> dict[str, Any]:
        return dict(vars(self))


# --- held-out --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Observation:
    """What a budget that was held out shows: FLOPs, log loss, and its error in every draw (samples,)."""

    flops: float
    log_loss: float
    errors: Array


def hold_out(runs: pd.DataFrame, fits: ObjectiveFits, unit: Unit, noise: Noise, seed: int = 0) -> list[HeldOut]:
    """Fits one objective without its largest budget and predicts the loss there, by each method and convention.

    The observation is the optimum of the budget's parabola, or its best run where there is none (and for the
    envelope). The interval is for the observation: it holds the prediction's errors and the observation's own, drawn
    jointly, so that an error that all runs share does not count. Methods that the smaller budgets do not feed are
    left out.

    Args:
        runs: usable runs of one objective.
        fits: of all of them.
        unit: of the losses.
        noise: of these runs, in their order.
        seed: as for ``fit_objective``.
    """
    conventions = tuple(fits.envelope)
    held = budget_members(runs[flops_column(planned_convention(runs, conventions))])[-1]
    rest = np.setdiff1d(np.arange(len(runs)), held)
    if not len(rest):
        return []
    fewer = fit_objective(
        fits.objective, runs.iloc[rest].reset_index(drop=True), conventions, unit, noise.take(rest), seed
    )
    results = []
    for convention in conventions:
        best = _best_run(runs, held, convention, unit, noise, _spread(fits, convention))
        optimum = _optimum(fits.isoflop[convention], runs, held) or best
        for method in METHODS:
            line = fewer.line(method, convention)
            if line:
                observation = best if method == "envelope" else optimum
                results.append(_held_out(fits.objective, convention, method, line, observation))
    return results


def _spread(fits: ObjectiveFits, convention: Convention) -> float:
    law = fits.envelope[convention].law
    return fits.parametric.spread if fits.parametric else law.spread if law else float("nan")


def _best_run(
    runs: pd.DataFrame, held: npt.NDArray[np.intp], convention: Convention, unit: Unit, noise: Noise, tau: float
) -> _Observation:
    loss, _ = losses(runs, unit)
    row = held[np.argmin(loss[held])]
    flops = float(runs[flops_column(convention)].iloc[row])
    return _Observation(flops, float(np.log(loss[row])), noise.errors[:, row] + tau * noise.normals[:, row])


def _optimum(fit: IsoflopFit, runs: pd.DataFrame, held: npt.NDArray[np.intp]) -> _Observation | None:
    names = set(runs["run"].iloc[held].astype(str))
    for budget in fit.budgets:
        if budget.interior and set(budget.runs) == names:
            value = float(np.log(budget.loss_opt.value))
            return _Observation(budget.flops, value, budget.drawn_log_loss_opt - value)
    return None


def _held_out(
    objective: str, convention: Convention, method: Method, line: LossLine, observation: _Observation
) -> HeldOut:
    flops = np.array([observation.flops])
    predicted = float(np.log(line.loss(flops)[0]))
    prediction_errors = np.log(line.drawn(flops)[:, 0]) - predicted
    low, high = (float(np.exp(end)) for end in interval(predicted + observation.errors - prediction_errors))
    observed = float(np.exp(observation.log_loss))
    return HeldOut(
        objective,
        convention,
        method,
        observation.flops,
        observed,
        float(np.exp(predicted)),
        low,
        high,
        relative_error=float(np.expm1(predicted - observation.log_loss)),
        inside=low <= observed <= high if np.isfinite(low + high) else None,
    )


# --- agreement -------------------------------------------------------------------------------------------------------


def disagreements(objectives: Iterable[ObjectiveFits], multipliers: list[Multiplier]) -> list[Disagreement]:
    """Where two methods' intervals do not overlap: the exponent of N_opt, and the multiplier at the same budget."""
    found = []
    for fits in objectives:
        for convention, isoflop in fits.isoflop.items():
            if isoflop.n_law and fits.parametric:
                pair = {"isoflop": isoflop.n_law.exponent, "parametric": fits.parametric.n_exponent(convention)}
                found += _apart(f"exponent of N_opt, {fits.objective}", convention, None, pair)
    ordered = sorted(multipliers, key=lambda entry: (entry.convention, entry.arm_flops))
    for (convention, flops), entries in groupby(ordered, key=lambda entry: (entry.convention, entry.arm_flops)):
        methods = {entry.method: Estimate(entry.multiplier, entry.low, entry.high) for entry in entries}
        found += _apart("compute multiplier", convention, flops, methods)
    return found


def _apart(
    quantity: str, convention: Convention, flops: float | None, estimates: dict[Any, Estimate]
) -> list[Disagreement]:
    return [
        Disagreement(
            quantity,
            convention,
            flops,
            (one, other),
            (estimates[one].value, estimates[other].value),
            ((estimates[one].low, estimates[one].high), (estimates[other].low, estimates[other].high)),
        )
        for one, other in combinations(estimates, 2)
        if not estimates[one].overlaps(estimates[other])
    ]
