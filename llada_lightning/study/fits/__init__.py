"""Fits of validation loss against training FLOPs, and ratios of compute between objectives.

Five methods, from the one that assumes least: the measured losses joined (``envelope``), the joint law of two
objectives (``joint``), isoFLOP parabolas (``isoflop``), the parametric law of each (``parametric``), and a bent curve
through the best losses. ``fit_table`` runs all of them on every objective of a results table, by every convention;
``uncertainty`` explains the intervals, ``multiplier`` and ``agreement`` say what is relied on.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from llada_lightning.compute.flops import CONVENTION_NAMES, CONVENTIONS, Convention
from llada_lightning.objectives import OBJECTIVES, REFERENCE, ValidationKind, get_objective
from llada_lightning.study.fits.agreement import (
    NO_COMMON_LOSS,
    Disagreement,
    Headline,
    disagreements,
    headline,
    loss_gap,
    no_common_loss,
)
from llada_lightning.study.fits.contrast import CommonLoss, Contrast, common_losses, contrasts
from llada_lightning.study.fits.envelope import EnvelopeFit, EnvelopePoint, fit_envelope
from llada_lightning.study.fits.held_out import HeldOut, hold_out, hold_out_jointly
from llada_lightning.study.fits.isoflop import IsoflopBudget, IsoflopFit, fit_isoflop, parabola_spread
from llada_lightning.study.fits.joint import JointFit, fit_joint
from llada_lightning.study.fits.least_squares import INTERVAL, Estimate, LossCurve, PowerLaw
from llada_lightning.study.fits.lines import LossLine
from llada_lightning.study.fits.multiplier import Multiplier, compute_multipliers, judged
from llada_lightning.study.fits.notes import study_notes
from llada_lightning.study.fits.objective import METHODS, Method, ObjectiveFits, fit_objective
from llada_lightning.study.fits.parametric import EXPONENT_GRID, HUBER_DELTA, STARTS, ParametricFit, fit_parametric
from llada_lightning.study.fits.runs import (
    BUDGET_TOLERANCE,
    UNIT_NAMES,
    UNITS,
    Unit,
    base_objective,
    best_of_budgets,
    budget_groups,
    budget_members,
    check_comparable,
    check_complete,
    counted_conventions,
    finished_runs,
    flops_column,
    in_canonical_order,
    losses,
    named_variants,
    noise_of_runs,
    objective_names,
    planned_convention,
    planned_flops,
    run_names,
    runs_without,
    usable_runs,
)
from llada_lightning.study.fits.uncertainty import NOISE_MODELS, Noise, NoiseModel, Spread, best_known
from llada_lightning.study.yardstick import yardstick_of
from llada_lightning.support.errors import UserError
from llada_lightning.support.printing import shortened

__all__ = [
    "BUDGET_TOLERANCE", "METHODS", "NOISE_MODELS", "NO_COMMON_LOSS", "UNITS", "UNIT_NAMES", "CommonLoss", "Contrast",
    "Disagreement",
    "EnvelopeFit", "EnvelopePoint", "Estimate", "Headline", "HeldOut", "IsoflopBudget", "IsoflopFit", "JointFit",
    "LossCurve", "LossLine", "Method", "Multiplier", "Noise", "ObjectiveFits", "ParametricFit", "PowerLaw", "Spread",
    "StudyFits", "Unit", "best_of_budgets", "budget_groups", "budget_members", "check_comparable",
    "compute_multipliers", "fit_envelope", "fit_isoflop", "fit_joint", "fit_parametric", "fit_table", "flops_column",
    "loss_gap",
    "losses", "named_variants", "noise_of_runs", "objective_names", "planned_flops", "run_names", "usable_runs",
]  # fmt: skip

CURVE_POINTS = 25
"""The number of points of the multiplier's curve, over the range of the reference's budgets."""


@dataclass(frozen=True)
class StudyFits:
    """All fits of a results table in one unit, with their settings."""

    unit: Unit
    samples: int
    seed: int
    noise_model: NoiseModel
    conventions: tuple[Convention, ...]
    objectives: dict[str, ObjectiveFits]
    """The fits by the name of the objective, with its variant where it is not the default recipe."""
    reference: str | None
    """The name of the objective that multipliers divide by; None where the table has no runs of it."""
    compute_multiplier: list[Multiplier]
    """Each other objective's multipliers at each budget of the reference's envelope, by every convention and method."""
    multiplier_curve: list[Multiplier]
    """The same over a grid between the smallest and the largest of those budgets, for figures."""
    multiplier_at_own_budgets: list[Multiplier]
    """The same at the losses that each other objective reaches at the budgets of its own envelope."""
    held_out: list[HeldOut]
    disagreements: list[Disagreement]
    notes: list[str]
    joint: dict[str, JointFit]
    """The joint law with the reference, by the name of the other objective; without those that have too few runs."""
    headlines: list[Headline]
    """One for each other objective and convention."""
    common: list[CommonLoss]
    """Of several other objectives the multipliers at one loss, by each convention that has one."""
    contrasts: list[Contrast]
    """Each other objective but the first against the first, by every convention."""
    yardstick: str | None = None
    """The name of the yardstick of the losses; None: they are validation losses."""

    @property
    def compared(self) -> list[str]:
        """The objectives that have a multiplier against the reference; none where the table has no runs of that."""
        return [name for name in self.objectives if self.reference not in (None, name)]

    def line(self, name: str, method: Method, convention: Convention, beside: str) -> LossLine | None:
        """The best loss of an objective by a method; of a joint law, that with the other objective ``beside`` it."""
        if method != "joint":
            return self.objectives[name].line(method, convention)
        joint = self.joint.get(beside if name == self.reference else name)
        return joint.line(name, convention) if joint and joint.converged else None

    def kind(self, name: str | None) -> ValidationKind:
        """Of what kind the losses of an objective are."""
        assert name is not None
        return "exact" if self.yardstick else get_objective(base_objective(name)).val_kind

    def best_loss(self, name: str | None, convention: Convention, flops: float) -> float:
        """The best loss of an objective, read off at FLOPs within its budgets; NaN where it has no such line."""
        line = self.objectives[name].line("read-off", convention) if name else None
        return float(line.loss([flops])[0]) if line else np.nan

    def misfit(self, name: str, entry: Multiplier) -> float:
        """p-value of the lack of fit of the line of an objective that a multiplier rests on; NaN without a test."""
        beside = entry.reference if entry.objective == self.reference else entry.objective
        line = self.line(name, entry.method, entry.convention, beside)
        return line.misfit if line else np.nan

    def envelopes(self, convention: Convention) -> dict[str, EnvelopeFit]:
        """Each objective's envelope by a convention."""
        return {name: fits.envelope[convention] for name, fits in self.objectives.items()}

    def answers(self, convention: Convention) -> list[str]:
        """The answers in words: what compares several objectives first, then each by itself."""
        found: list[CommonLoss | Contrast | Headline] = [*self.common, *self.contrasts, *self.headlines]
        return [own.words for own in found if own.convention == convention]

    def check_counted(self, convention: Convention) -> None:
        """Raises UserError where the runs lack the FLOPs of a convention, by which a figure is asked for."""
        if convention not in self.conventions:
            raise UserError(
                f"figure: the runs have no FLOPs by {CONVENTION_NAMES[convention]} ({convention}); "
                f"draw by {' or '.join(self.conventions)}"
            )

    def as_dict(self) -> dict[str, Any]:
        """The content of ``fits.json``: only what was computed."""
        settings = {
            "unit": self.unit,
            "conventions": list(self.conventions),
            "samples": self.samples,
            "seed": self.seed,
            "reference": self.reference,
            "interval_percentiles": list(INTERVAL),
            "noise_model": self.noise_model,
            "noise": NOISE_MODELS[self.noise_model],
            "huber_delta": HUBER_DELTA,
            "exponent_grid": EXPONENT_GRID.tolist(),
            "starts": STARTS,
            "budget_tolerance": BUDGET_TOLERANCE,
        }
        if self.yardstick is not None:
            settings |= {"yardstick": self.yardstick, "val_kind": "exact"}
        lists = (
            "headlines",
            "common",
            "contrasts",
            "compute_multiplier",
            "multiplier_curve",
            "multiplier_at_own_budgets",
            "held_out",
            "disagreements",
        )
        return {
            "settings": settings,
            **{name: fits.as_dict() for name, fits in self.objectives.items()},
            "joint": {name: joint.as_dict() for name, joint in self.joint.items()},
            **{name: [entry.as_dict() for entry in getattr(self, name)] for name in lists},
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
    reference: str | None = None,
) -> StudyFits:
    """Fits every objective of a results table by every method, and compares each with the reference.

    Args:
        table: A results table, or one that ``yardstick.with_yardstick`` returned. Runs that are unfinished or diverged
            are left out.
        unit: The unit of the losses.
        samples: The number of bootstrap draws.
        seed: The seed of the draws.
        covariance: The covariance of the losses in nats^2, index and columns ``run@steps``, all objectives in one.
            The error of a run that it lacks (a note names it) is its standard error, taken as independent of the
            others. None, or where such a run has none: the table's standard errors, the same error for all runs.
        conventions: The conventions by which FLOPs are counted. One by which a run's FLOPs are missing is left out
            with a note.
        reference: The name of the objective that multipliers divide by. None: ``objectives.REFERENCE``, as far as
            the table has runs of it.

    Raises:
        UserError: The table has no usable run, or none of the given reference, its losses cannot be compared, or the
            covariance does not fit it.
    """
    yardstick = yardstick_of(table)  # before rows are dropped as results that are there twice
    runs = usable_runs(table)
    if runs.empty:
        raise UserError(f"results: none of {len(table)} rows is a finished run with a finite loss; nothing to fit")
    check_comparable(runs)
    check_complete(runs, unit)
    counted = counted_conventions(runs, conventions)
    if not counted:
        raise UserError(f"results: flops are missing by {' and by '.join(conventions)}; correct the table")
    repeated = len(finished_runs(table)) - len(runs)
    runs = in_canonical_order(runs)
    names = objective_names(runs)
    divisor = _reference(names, reference)
    lacking = runs_without(covariance, runs) if covariance is not None else []
    noise = noise_of_runs(runs, covariance, samples, seed)
    objectives: dict[str, ObjectiveFits] = {}
    held_out: list[HeldOut] = []
    parts = {name: np.flatnonzero((runs["objective"] == name).to_numpy(bool)) for name in names}
    members = {name: (runs.iloc[rows].reset_index(drop=True), noise.take(rows)) for name, rows in parts.items()}
    spreads = {
        name: parabola_spread(own, planned_convention(own, counted), unit, errors)
        for name, (own, errors) in members.items()
    }
    for name, (own, errors) in members.items():
        borrowed = best_known(*(spread for other, spread in spreads.items() if other != name))
        own_seed = seed + _seed_of(name, names)
        objectives[name] = fit_objective(name, own, counted, unit, errors, own_seed, borrowed=borrowed)
        held_out += hold_out(own, objectives[name], unit, errors, own_seed, borrowed=borrowed)
    joints, tests = _joint_fits(members, objectives, divisor, counted, unit, seed)
    held_out += tests
    fits = StudyFits(
        *(unit, samples, seed, noise.model, counted, objectives, divisor),
        compute_multiplier=[],
        multiplier_curve=[],
        multiplier_at_own_budgets=[],
        held_out=held_out,
        disagreements=[],
        notes=[],
        joint=joints,
        headlines=[],
        common=[],
        contrasts=[],
        yardstick=yardstick,
    )
    at_budgets, curve, at_own = (
        [replace(entry, named=yardstick) for entry in judged(found, held_out, fits.misfit)]
        for found in _multipliers(fits)
    )
    missing = [CONVENTION_NAMES[name] for name in conventions if name not in counted]
    notes = [f"not counted by {name}: the table lacks the FLOPs of some runs" for name in missing]
    if repeated:
        notes.append(f"{repeated} rows left out: their results are in the table twice (run, steps, seed)")
    if lacking:
        lacks = f"it lacks {len(lacking)} of {len(runs)} runs ({shortened(', '.join(lacking))})"
        notes.append(
            f"covariance: {lacks}, whose errors are taken as independent"
            if noise.model == "covariance"
            else f"covariance not used: {lacks}, of which not all have a standard error"
        )
    elif covariance is None and noise.model == "standard errors":
        notes.append(
            "covariance: the file that llada collect writes beside a table is not there; the errors of the losses are "
            "taken as one error of all, which shares their validation set"
        )
    fits = replace(
        fits,
        compute_multiplier=at_budgets,
        multiplier_curve=[replace(entry, draws=None) for entry in curve],
        multiplier_at_own_budgets=[entry.inverse() for entry in at_own],
        disagreements=disagreements(objectives.values(), at_budgets),
    )
    notes += study_notes(fits, {name: own for name, (own, _) in members.items()})
    notes.sort(key=lambda note: not note.startswith(NO_COMMON_LOSS))
    return replace(
        fits,
        notes=notes,
        headlines=_headlines(fits),
        common=common_losses(at_budgets, counted),
        contrasts=contrasts(fits.compared, objectives, counted, unit),
    )


def _joint_fits(
    members: Mapping[str, tuple[pd.DataFrame, Noise]],
    objectives: Mapping[str, ObjectiveFits],
    reference: str | None,
    conventions: tuple[Convention, ...],
    unit: Unit,
    seed: int,
) -> tuple[dict[str, JointFit], list[HeldOut]]:
    """The joint law of each other objective and the reference, and its held-out tests."""
    joints: dict[str, JointFit] = {}
    held_out: list[HeldOut] = []
    for name in objectives:
        if reference is None or name == reference:
            continue
        (own, errors), (theirs, their_errors) = members[name], members[reference]
        pair = objectives[name], objectives[reference]
        tables, noises, spreads = (own, theirs), (errors, their_errors), (pair[0].spread, pair[1].spread)
        if joint := fit_joint((name, reference), tables, noises, spreads, conventions, unit):
            joints[name] = joint
            held_out += hold_out_jointly(tables, pair, unit, noises, spreads, seed)
    return joints, held_out


def _reference(names: Sequence[str], wanted: str | None) -> str | None:
    """The name in a table of the objective that multipliers divide by.

    Raises:
        UserError: The table has no runs of the reference that the user wants, or several variants of it.
    """
    name = REFERENCE if wanted is None else wanted
    if name in names:
        return name
    variants = [own for own in names if base_objective(own) == name]
    if len(variants) > 1:
        raise UserError(f"reference: the results hold several variants of '{name}'; name one of {', '.join(variants)}")
    if variants or wanted is None:
        return variants[0] if variants else None
    raise UserError(f"reference: the results hold no runs of '{name}'; choose from {', '.join(names)}")


def _seed_of(name: str, names: Sequence[str]) -> int:
    """What an objective adds to the seed: 10 for each row above its own in the table of objectives.

    A variant adds 1,000 for each variant before it.
    """
    base = base_objective(name)
    own = [other for other in names if base_objective(other) == base]
    return 10 * list(OBJECTIVES).index(base) + 1000 * own.index(name)


def _multipliers(fits: StudyFits) -> tuple[list[Multiplier], list[Multiplier], list[Multiplier]]:
    """Each objective against the reference at the reference's budgets, and over a grid between them.

    Then the reference against each objective, at the budgets of the objective.
    """
    at_budgets: list[Multiplier] = []
    curve: list[Multiplier] = []
    at_own: list[Multiplier] = []
    reference = fits.reference
    for name, convention, method in itertools.product(fits.compared, fits.conventions, METHODS):
        assert reference is not None
        own, theirs = (fits.line(one, method, convention, name) for one in (name, reference))
        if own and theirs:
            own_flops, flops = (
                np.array([point.flops for point in fits.objectives[one].envelope[convention].points])
                for one in (name, reference)
            )
            grid = np.geomspace(flops.min(), flops.max(), CURVE_POINTS)
            for found, at in ((at_budgets, flops), (curve, grid)):
                found += compute_multipliers(name, reference, convention, method, (own, theirs), at)
            at_own += compute_multipliers(reference, name, convention, method, (theirs, own), own_flops)
    return at_budgets, curve, at_own


def _headlines(fits: StudyFits) -> list[Headline]:
    found = []
    for name, convention in itertools.product(fits.compared, fits.conventions):
        assert fits.reference is not None
        missing = no_common_loss(name, fits.reference, convention, fits.objectives, fits.compute_multiplier)
        pair = (name, fits.reference, convention)
        both = (fits.compute_multiplier, fits.multiplier_at_own_budgets)
        found.append(headline(*pair, *both, fits.joint.get(name), missing))
    return found
