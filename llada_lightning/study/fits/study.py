"""All fits of a results table: every objective, method and convention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from llada_lightning.compute.flops import CONVENTION_NAMES, CONVENTIONS, Convention
from llada_lightning.study.fits.checks import (
    Disagreement,
    HeldOut,
    disagreements,
    hold_out,
    no_common_loss,
    with_doubts,
)
from llada_lightning.study.fits.envelope import EnvelopeFit
from llada_lightning.study.fits.estimate import INTERVAL
from llada_lightning.study.fits.isoflop import parabola_spread
from llada_lightning.study.fits.multiplier import METHODS, Multiplier, compute_multipliers
from llada_lightning.study.fits.noise import NOISE_MODELS, UNKNOWN, NoiseModel, noise_of_runs, runs_without
from llada_lightning.study.fits.objective import ObjectiveFits, fit_objective
from llada_lightning.study.fits.parametric import EXPONENT_GRID, HUBER_DELTA, STARTS
from llada_lightning.study.fits.runs import (
    BUDGET_TOLERANCE,
    OBJECTIVES,
    Unit,
    check_comparable,
    check_complete,
    counted_conventions,
    finished_runs,
    in_canonical_order,
    planned_convention,
    usable_runs,
)
from llada_lightning.support.errors import UserError

CURVE_POINTS = 25
"""Of the multiplier's curve, over the range of ``arm``'s budgets."""


@dataclass(frozen=True)
class StudyFits:
    """All fits of a results table in one unit, with their settings."""

    unit: Unit
    samples: int
    seed: int
    noise_model: NoiseModel
    conventions: tuple[Convention, ...]
    objectives: dict[str, ObjectiveFits]
    compute_multiplier: list[Multiplier]
    """At each of ``arm``'s budgets that is on its envelope, by every convention and method."""
    multiplier_curve: list[Multiplier]
    """The same over a grid between the smallest and the largest of those budgets, for figures."""
    held_out: list[HeldOut]
    disagreements: list[Disagreement]
    notes: list[str]

    def envelopes(self, convention: Convention) -> dict[str, EnvelopeFit]:
        """Each objective's envelope by a convention."""
        return {name: fits.envelope[convention] for name, fits in self.objectives.items()}

    def as_dict(self) -> dict[str, Any]:
        """What ``fits.json`` holds: only what was computed."""
        settings = {
            "unit": self.unit,
            "conventions": list(self.conventions),
            "samples": self.samples,
            "seed": self.seed,
            "interval_percentiles": list(INTERVAL),
            "noise_model": self.noise_model,
            "noise": NOISE_MODELS[self.noise_model],
            "huber_delta": HUBER_DELTA,
            "exponent_grid": EXPONENT_GRID.tolist(),
            "starts": STARTS,
            "budget_tolerance": BUDGET_TOLERANCE,
        }
        return {
            "settings": settings,
            **{name: fits.as_dict() for name, fits in self.objectives.items()},
            "compute_multiplier": [entry.as_dict() for entry in self.compute_multiplier],
            "multiplier_curve": [entry.as_dict() for entry in self.multiplier_curve],
            "held_out": [entry.as_dict() for entry in self.held_out],
            "disagreements": [entry.as_dict() for entry in self.disagreements],
            "notes": self.notes,
        }


def fit_table(
    table: pd.DataFrame,
    *,
    unit: Unit = "nats_per_token",
    samples: int = 4000,
    seed: int = 0,
    covariance: pd.DataFrame | None = None,
    conventions: tuple[Convention, ...] = CONVENTIONS,
) -> StudyFits:
    """Fits every objective of a results table by every method.

    Args:
        table: a results table; runs that are unfinished or diverged are left out.
        unit: of the losses.
        samples: bootstrap draws.
        seed: of the draws.
        covariance: of the losses in nats^2, index and columns ``run@steps``, both objectives in one; None, or where
            it lacks a run (a note says so): the table's standard errors, taken as independent.
        conventions: by which FLOPs are counted; one by which a run's are missing is left out with a note.

    Raises:
        UserError: the table has no usable run, its losses cannot be compared, or the covariance does not fit it.
    """
    runs = usable_runs(table)
    if runs.empty:
        raise UserError(f"results: none of {len(table)} rows is a finished run with a finite loss; nothing to fit")
    check_comparable(runs)
    check_complete(runs, unit)
    counted = counted_conventions(runs, conventions)
    if not counted:
        raise UserError(f"results: flops are missing by {' and by '.join(conventions)}; mend the table")
    twice = len(finished_runs(table)) - len(runs)
    runs = in_canonical_order(runs)
    lacking = runs_without(covariance, runs) if covariance is not None else []
    noise = noise_of_runs(runs, None if lacking else covariance, samples, seed)
    objectives: dict[str, ObjectiveFits] = {}
    held_out: list[HeldOut] = []
    parts = {name: np.flatnonzero((runs["objective"] == name).to_numpy(bool)) for name in OBJECTIVES}
    members = {name: (runs.iloc[rows].reset_index(drop=True), noise.take(rows)) for name, rows in parts.items()}
    scatter = {
        name: parabola_spread(own, planned_convention(own, counted), unit, errors) if len(own) else UNKNOWN
        for name, (own, errors) in members.items()
    }
    for number, (objective, (own, errors)) in enumerate(members.items()):
        if len(own):
            (lent,) = (spread for name, spread in scatter.items() if name != objective)
            own_seed = seed + 10 * number
            fits = fit_objective(objective, own, counted, unit, errors, own_seed, lent=lent)
            objectives[objective] = fits
            held_out += hold_out(own, fits, unit, errors, own_seed, lent=lent)
    at_budgets, curve = (
        with_doubts(found, objectives.values(), held_out) for found in _multipliers(objectives, counted)
    )
    missing = [CONVENTION_NAMES[name] for name in conventions if name not in counted]
    notes = [f"not counted by {name}: the table lacks the FLOPs of some runs" for name in missing]
    if twice:
        notes.append(f"{twice} rows left out: their results stand in the table twice (run, steps, seed)")
    if lacking:
        notes.append(f"covariance not used: it lacks {len(lacking)} of {len(runs)} runs ({lacking[0]} …)")
    notes += [note for fits in objectives.values() for note in fits.notes()]
    if len(objectives) == len(OBJECTIVES):
        apart = {name: no_common_loss(objectives, name, at_budgets) for name in counted}
        notes = [*filter(None, apart.values()), *notes]
        for name in counted:
            if not apart[name] and name not in {entry.convention for entry in at_budgets}:
                notes.append(f"compute multiplier: none by {CONVENTION_NAMES[name]}, fits are missing")
    return StudyFits(
        unit,
        samples,
        seed,
        noise.model,
        counted,
        objectives,
        at_budgets,
        curve,
        held_out,
        disagreements(objectives.values(), at_budgets),
        notes,
    )


def _multipliers(
    objectives: dict[str, ObjectiveFits], conventions: tuple[Convention, ...]
) -> tuple[list[Multiplier], list[Multiplier]]:
    """At ``arm``'s budgets, and over a grid between them."""
    if len(objectives) < len(OBJECTIVES):
        return [], []
    at_budgets, curve = [], []
    for convention in conventions:
        flops = np.array([point.flops for point in objectives["arm"].envelope[convention].points])
        grid = np.geomspace(flops.min(), flops.max(), CURVE_POINTS)
        for method in METHODS:
            arm, llada = (objectives[name].line(method, convention) for name in OBJECTIVES)
            if arm and llada:
                at_budgets += compute_multipliers(convention, method, arm, llada, flops)
                curve += compute_multipliers(convention, method, arm, llada, grid)
    return at_budgets, curve
