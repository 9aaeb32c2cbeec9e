"""What a fit is worth: its prediction of the largest budget, its lack of fit, and whether the methods agree."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import combinations, groupby
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from llada_lightning.compute.flops import CONVENTION_NAMES, Convention
from llada_lightning.study.fits.envelope import Candidates
from llada_lightning.study.fits.estimate import Array, Estimate, interval
from llada_lightning.study.fits.isoflop import MIN_SHAPES, IsoflopFit
from llada_lightning.study.fits.multiplier import METHODS, LossLine, Method, Multiplier
from llada_lightning.study.fits.noise import UNKNOWN, Noise, Spread, best_known, drawn_tau
from llada_lightning.study.fits.objective import ObjectiveFits, fit_objective
from llada_lightning.study.fits.runs import Unit, budget_members, flops_column, planned_convention

NO_COMMON_LOSS = "no common loss"
"""How the note begins that outweighs all others."""

REJECTED = 0.025
"""A fit whose lack of fit has a smaller p-value is rejected: 5 % over the two objectives of a multiplier."""


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


@dataclass(frozen=True)
class Disagreement:
    """Two methods whose 95 % intervals of one quantity share no number. Both are known; an infinite end is open."""

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
    """What a budget that was held out shows: FLOPs, log loss, and true less observed in every draw (samples,)."""

    flops: float
    log_loss: float
    errors: Array


def hold_out(
    runs: pd.DataFrame, fits: ObjectiveFits, unit: Unit, noise: Noise, seed: int = 0, *, lent: Spread = UNKNOWN
) -> list[HeldOut]:
    """Fits the smaller budgets of one objective and predicts the loss at the largest, by each method and convention.

    Held out is the largest budget of enough shapes for a parabola, if there is one; what is larger is left out too.
    The observation is the optimum of the budget's parabola, or its best shape where there is none (and for the
    envelope). The interval is for the observation: it holds the errors of prediction and observation, drawn jointly,
    so that an error that all runs share does not count, and what the method's law misses its own points by. Methods
    that the smaller budgets do not feed are left out.

    Args:
        runs: usable runs of one objective.
        fits: of all of them.
        unit: of the losses.
        noise: of these runs, in their order.
        seed: as for ``fit_objective``.
        lent: as for ``fit_objective``.
    """
    conventions = tuple(fits.envelope)
    planned = planned_convention(runs, conventions)
    held, rest = _divided(runs, planned)
    if not len(rest):
        return []
    fewer = fit_objective(
        fits.objective, runs.iloc[rest].reset_index(drop=True), conventions, unit, noise.take(rest), seed, lent=lent
    )
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
                observation = best if method == "envelope" else optimum
                missed = drawn_tau(_beyond(fewer, method, convention), uniforms) * normals
                results.append(_held_out(fits.objective, convention, method, line, observation, missed))
    return results


def _divided(runs: pd.DataFrame, planned: Convention) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """Row positions of the budget to be held out, and of all that are smaller."""
    budgets = budget_members(runs[flops_column(planned)])
    sizes = runs["params_nonembedding"].to_numpy(float)
    wide = [number for number, rows in enumerate(budgets) if len(np.unique(sizes[rows])) >= MIN_SHAPES]
    last = wide[-1] if wide else len(budgets) - 1
    return budgets[last], np.sort(np.concatenate([np.empty(0, np.intp), *budgets[:last]]))


def _beyond(fits: ObjectiveFits, method: Method, convention: Convention) -> Spread:
    """What a method's law misses its points by, beyond their own errors and the spread of runs."""
    if method == "envelope":
        law = fits.envelope[convention].law
        return law.scatter if law else UNKNOWN
    if method == "isoflop":
        curve = fits.isoflop[convention].loss_curve
        return curve.scatter if curve else UNKNOWN
    assert fits.parametric
    own, runs = fits.parametric.scatter, fits.spread
    return replace(own, tau=float(np.sqrt(max(0.0, own.tau**2 - runs.tau**2))) if runs.known else own.tau)


def _best_shape(budget: Candidates, runs: pd.DataFrame, convention: Convention, spread: Spread) -> _Observation:
    everything = np.arange(len(budget.rows))
    best = budget.best(everything)
    flops = float(runs[flops_column(convention)].to_numpy(float)[budget.rows[best]].mean())
    return _Observation(flops, float(budget.log_loss[best]), budget.errors(everything, spread))


def _optimum(fit: IsoflopFit, held: npt.NDArray[np.intp]) -> _Observation | None:
    for budget in fit.budgets:
        if budget.interior and set(budget.rows) == set(held):
            value = float(np.log(budget.loss_opt.value))
            return _Observation(budget.flops, value, budget.drawn_log_loss_opt - value)
    return None


def _held_out(
    objective: str, convention: Convention, method: Method, line: LossLine, observation: _Observation, missed: Array
) -> HeldOut:
    flops = np.array([observation.flops])
    predicted = float(np.log(line.loss(flops)[0]))
    prediction_errors = np.log(line.drawn(flops)[:, 0]) - predicted
    errors = prediction_errors - observation.errors + missed
    low, high = (float(np.exp(end)) for end in interval(predicted + errors))
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


# --- doubt -----------------------------------------------------------------------------------------------------------


def with_doubts(
    multipliers: list[Multiplier], objectives: Iterable[ObjectiveFits], held_out: list[HeldOut]
) -> list[Multiplier]:
    """The same multipliers, each with what speaks against its method, by its convention.

    That is: a largest budget that was held out and lies outside of its predicted interval, a fit that is rejected
    (``REJECTED``), of either objective; and, of a single multiplier, a power law beyond its budgets.
    """
    objectives, found = list(objectives), []
    for entry in multipliers:
        reasons = [
            f"{own.objective}'s largest budget, held out, is outside of its interval"
            for own in held_out
            if (own.method, own.convention) == (entry.method, entry.convention) and own.inside is False
        ]
        misfits = [(fits.objective, fits.misfit(entry.method, entry.convention)) for fits in objectives]
        reasons += [f"{name}'s fit is rejected (p {_p_value(p)})" for name, p in misfits if p < REJECTED]
        if not entry.shown:
            reasons.append("a power law beyond its budgets")
        found.append(replace(entry, doubt="; ".join(reasons) or None))
    return found


def _p_value(value: float) -> str:
    return f"{value:.3f}" if value >= 0.001 else "< 0.001"


def no_common_loss(objectives: dict[str, ObjectiveFits], convention: Convention, found: list[Multiplier]) -> str | None:
    """That the best losses of the two objectives share no value within their budgets, and what is missing.

    Args:
        objectives: both of them.
        convention: by which FLOPs are counted.
        found: the multipliers, from which the missing factor of FLOPs is taken.
    """
    arm, llada = (objectives[name].envelope[convention].points for name in ("arm", "llada"))
    behind = llada[-1].loss > arm[0].loss
    if not behind and llada[0].loss >= arm[-1].loss:
        return None
    least = min(
        (entry for entry in found if behind and entry.convention == convention and entry.shown),
        key=lambda entry: entry.arm_flops,
        default=None,
    )
    factor = least.multiplier * least.arm_flops / llada[-1].flops if least else None
    by = f", by a factor of about {factor:.2g} ({least.method})" if least and factor else ""
    printed = "; what is printed is extrapolated" if any(own.convention == convention for own in found) else ""
    smaller, larger = ("arm", "llada") if behind else ("llada", "arm")
    return (
        f"{NO_COMMON_LOSS} by {CONVENTION_NAMES[convention]}: arm's best losses go from {arm[0].loss:.3f} to "
        f"{arm[-1].loss:.3f}, llada's from {llada[0].loss:.3f} to {llada[-1].loss:.3f}, so no multiplier is measured"
        f"{printed}; add smaller budgets for {smaller} or larger ones for {larger}{by}"
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
        methods = {entry.method: entry.estimate for entry in entries}
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
