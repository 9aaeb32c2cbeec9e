"""What a reader of fits has to know, in words: what is missing, what was not decided and why, and what to do."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from llada_lightning.compute.flops import CONVENTION_NAMES, Convention
from llada_lightning.objectives import REFERENCE
from llada_lightning.study.fits.agreement import no_common_loss
from llada_lightning.study.fits.least_squares import interval
from llada_lightning.study.fits.objective import ObjectiveFits
from llada_lightning.study.fits.runs import budget_members, flops_column, is_budget, planned_convention
from llada_lightning.study.fits.seeds import seed_scales, tokens_by_steps

if TYPE_CHECKING:
    from llada_lightning.study.fits import StudyFits

SHOWN_CHANGE = 1.5
"""A spread between runs that changes by a smaller factor is one number to a reader."""

LARGE_CHI_SQUARE = 4.0
"""Residuals of twice the runs' own errors: most of the scatter is between runs."""


def study_notes(fits: StudyFits, tables: Mapping[str, pd.DataFrame]) -> list[str]:
    """The notes on the multipliers of a study that matter most, those on each objective, and the others.

    ``tables`` are the usable runs of each objective.
    """
    first, last = _of_pairs(fits)
    own = [
        note
        for name, runs in tables.items()
        for note in _of_objective(name, runs, fits.objectives[name], fits.conventions)
    ]
    return [*first, *own, *last]


def _of_objective(name: str, runs: pd.DataFrame, fits: ObjectiveFits, conventions: tuple[Convention, ...]) -> list[str]:
    planned = planned_convention(runs, conventions)
    notes = []
    curve = fits.envelope[planned].curve
    if curve and interval(curve.draws[:, 2])[1] < 0:
        notes.append(
            f"{name} is leaving a plateau at these budgets: its loss falls faster and faster, so a law that is fitted "
            "there does not hold beyond; add larger budgets"
        )
    notes += [f"{name}: {missing}" for missing in _incomplete(runs, planned)]
    points = runs.assign(tokens=tokens_by_steps(runs))
    if not points.duplicated(["params_nonembedding", "tokens"]).any() and fits.spread.known:
        notes.append(
            f"{name}: every loss is of one seed; the spread between runs, {fits.spread.tau:.2%} of the loss, is taken "
            "from their scatter about the fits (llada plan --append FILE --seeds adds seeds)"
        )
    scales = seed_scales(runs)
    if fits.spread.known and scales.max() > SHOWN_CHANGE * scales.min():
        least, most = (fits.spread.tau * end for end in (scales.min(), scales.max()))
        notes.append(f"{name}: seeds tell a spread between runs of {least:.2%} to {most:.2%} of the loss")
    law = fits.parametric
    if law and law.reduced_chi_square is not None and law.reduced_chi_square > LARGE_CHI_SQUARE:
        notes.append(
            f"{name}, parametric: residuals are {np.sqrt(law.reduced_chi_square):.2g} times the runs' own errors; the "
            f"intervals hold a spread of {law.scatter.tau:.2%} between runs"
        )
    return notes + fits.notes()


def _incomplete(runs: pd.DataFrame, planned: Convention) -> list[str]:
    """The budgets that have fewer sizes than most."""
    flops = runs[flops_column(planned)].to_numpy(float)
    sizes = runs["params_nonembedding"].to_numpy(float)
    counts = {
        float(np.exp(np.log(flops[rows]).mean())): len(np.unique(sizes[rows]))
        for rows in budget_members(flops)
        if is_budget(flops[rows])
    }
    if not counts:
        return []
    most, times = Counter(counts.values()).most_common(1)[0]
    if 2 * times <= len(counts):
        return []
    return [
        f"budget {budget:.2g} has {count} {'size' if count == 1 else 'sizes'}, most have {most}"
        for budget, count in counts.items()
        if count < most
    ]


def _of_pairs(fits: StudyFits) -> tuple[list[str], list[str]]:
    """The notes on multipliers that outweigh all others, and the rest of them."""
    first, last = [], []
    if fits.reference is None and len(fits.objectives) > 1:
        last.append(f"no compute multiplier: the results hold no runs of {REFERENCE}; name another --reference")
    found = {(entry.objective, entry.convention) for entry in fits.compute_multiplier}
    for name, convention in itertools.product(fits.compared, fits.conventions):
        assert fits.reference is not None
        apart = no_common_loss(name, fits.reference, convention, fits.objectives, fits.compute_multiplier)
        if apart:
            first.append(apart)
        elif (name, convention) not in found:
            counted = CONVENTION_NAMES[convention]
            last.append(f"compute multiplier of {name} over {fits.reference}: none by {counted}, fits are missing")
    for name, joint in fits.joint.items():
        if joint.same_exponents < 0.05:
            last.append(
                f"joint law of {name} and {joint.reference}: the runs reject shared exponents (p "
                f"{joint.same_exponents:.2g}); their separate laws assume less"
            )
        if not joint.converged:
            last.append(
                f"joint law of {name} and {joint.reference}: not told, its optimum was not reached; add budgets or "
                "shapes"
            )
    return first, last
