"""What the methods say together: a common loss, their disagreements, and the headline of a study."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from llada_lightning.compute.flops import CONVENTION_NAMES, Convention
from llada_lightning.objectives import get_objective
from llada_lightning.study.fits.contrast import estimate_text
from llada_lightning.study.fits.joint import JointFit
from llada_lightning.study.fits.least_squares import Estimate, interval
from llada_lightning.study.fits.multiplier import Multiplier
from llada_lightning.study.fits.objective import ObjectiveFits
from llada_lightning.study.fits.runs import base_objective

NO_COMMON_LOSS = "no common loss"
"""How the note begins that outweighs all others."""


@dataclass(frozen=True)
class LossGap:
    """What closes the gap between the best losses of two objectives that share no value.

    Args:
        smaller: The objective that needs smaller budgets.
        larger: The other one, for which larger budgets would do as well.
        factor: The factor of FLOPs that is missing; None where no method tells it.
        method: The method that tells it.
    """

    smaller: str
    larger: str
    factor: float | None = None
    method: str = ""


def loss_gap(
    objective: str,
    reference: str,
    convention: Convention,
    fits: Mapping[str, ObjectiveFits],
    multipliers: list[Multiplier],
) -> LossGap | None:
    """The gap between the best losses of two objectives; None where they share a value."""
    theirs, own = (fits[name].envelope[convention].points for name in (reference, objective))
    behind = own[-1].loss > theirs[0].loss
    if not behind and own[0].loss >= theirs[-1].loss:
        return None
    if not behind:
        return LossGap(objective, reference)
    found = [entry for entry in multipliers if entry.point[:3] == (objective, reference, convention)]
    least = min((entry for entry in found if entry.shown), key=lambda entry: entry.reference_flops, default=None)
    if least is None:
        return LossGap(reference, objective)
    factor = least.multiplier * least.reference_flops / own[-1].flops
    return LossGap(reference, objective, factor or None, least.method)


def no_common_loss(
    objective: str,
    reference: str,
    convention: Convention,
    fits: Mapping[str, ObjectiveFits],
    multipliers: list[Multiplier],
) -> str | None:
    """That the best losses of two objectives share no value within their budgets, and what is missing.

    The missing factor of FLOPs is taken from the multipliers, which are those of all pairs.
    """
    found = [entry for entry in multipliers if entry.point[:3] == (objective, reference, convention)]
    gap = loss_gap(objective, reference, convention, fits, multipliers)
    if gap is None:
        return None
    theirs, own = (fits[name].envelope[convention].points for name in (reference, objective))
    by = f", by a factor of about {gap.factor:.2g} ({gap.method})" if gap.factor else ""
    printed = "; what is printed is extrapolated" if any(entry.shown for entry in found) else ""
    if len(theirs) == len(own) == 1:
        reached = f"{reference}'s loss is {theirs[0].loss:.3f}, {objective}'s {own[0].loss:.3f}"
    else:
        reached = (
            f"{reference}'s best losses go from {theirs[0].loss:.3f} to {theirs[-1].loss:.3f}, {objective}'s from "
            f"{own[0].loss:.3f} to {own[-1].loss:.3f}"
        )
    return (
        f"{NO_COMMON_LOSS} by {CONVENTION_NAMES[convention]}: {reached}, so no multiplier is measured{printed}; add "
        f"smaller budgets for {gap.smaller} or larger ones for {gap.larger}{by}"
    )


# --- disagreement ----------------------------------------------------------------------------------------------------

MATERIAL = 1.05
"""Methods whose multipliers differ by a smaller factor agree, however well the difference is known."""


@dataclass(frozen=True)
class Disagreement:
    """Two methods that differ by more than their errors, drawn together, make likely (95 %)."""

    quantity: str
    objective: str
    reference: str | None
    """None where the quantity is none of a pair."""
    convention: Convention
    flops: float | None
    methods: tuple[str, str]
    values: tuple[float, float]
    intervals: tuple[tuple[float, float], tuple[float, float]]

    def as_dict(self) -> dict[str, Any]:
        return dict(vars(self))


def disagreements(objectives: Iterable[ObjectiveFits], multipliers: Sequence[Multiplier]) -> list[Disagreement]:
    """Where two methods differ: the exponent of N_opt, and the multiplier at the same budget.

    Multipliers are compared draw by draw, since both methods see the same errors: they differ where their ratio is
    more than ``MATERIAL`` and its 95 % interval excludes 1. Exponents differ where their intervals share no number.
    """
    found = []
    for fits in objectives:
        for convention, isoflop in fits.isoflop.items():
            if isoflop.n_law and fits.parametric and fits.parametric.identified:
                own, its = isoflop.n_law.exponent, fits.parametric.n_exponent(convention)
                if not own.overlaps(its):
                    quantity = f"exponent of N_opt, {fits.objective}"
                    what = (quantity, fits.objective, None, convention, None, ("isoflop", "parametric"))
                    found.append(Disagreement(*what, *_both(own, its)))
    measured = [entry for entry in multipliers if entry.shown and not entry.extrapolated]
    for one, other in combinations(sorted(measured, key=lambda entry: entry.point), 2):
        if one.point == other.point and _apart(one, other):
            methods = (one.method, other.method)
            numbers = _both(one.estimate, other.estimate)
            found.append(Disagreement("compute multiplier", *one.point, methods, *numbers))
    return found


def _both(own: Estimate, its: Estimate) -> tuple[tuple[float, float], tuple[tuple[float, float], tuple[float, float]]]:
    return (own.value, its.value), ((own.low, own.high), (its.low, its.high))


def _apart(one: Multiplier, other: Multiplier) -> bool:
    assert one.draws is not None
    assert other.draws is not None
    with np.errstate(divide="ignore", invalid="ignore"):
        low, high = interval(np.log(one.draws / other.draws))
    ratio = abs(np.log(one.multiplier / other.multiplier))
    return bool((low > 0 or high < 0) and ratio > np.log(MATERIAL))


# --- headline --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Headline:
    """The one number of a study for a pair of objectives and a convention, or why there is none."""

    objective: str
    reference: str
    convention: Convention
    words: str
    reference_flops: float | None = None
    """The reference's FLOPs for the loss that is held equal.

    They are the largest of its budgets at which a multiplier is measured. If there is none, they are what it needs for
    the loss that the objective reaches with the largest budget of its own at which one is.
    """
    read_off: Estimate | None = None
    joint: Estimate | None = None
    """That by the joint law at the same budget; None where it has none that is relied on."""
    spread: tuple[float, float] | None = None
    """The least and the largest value of all methods that are relied on there."""

    def as_dict(self) -> dict[str, Any]:
        estimates = {
            name: found.as_dict() if (found := getattr(self, name)) else None for name in ("read_off", "joint")
        }
        return {**vars(self), **estimates}


def headline(
    objective: str,
    reference: str,
    convention: Convention,
    multipliers: Sequence[Multiplier],
    at_own_budgets: Sequence[Multiplier],
    joint: JointFit | None,
    missing: str | None,
) -> Headline:
    """The read-off of a pair with the joint law and the spread of the methods.

    It is that at the reference's largest budget that has one, and else that at the objective's, alone.

    Args:
        objective, reference, convention: The pair, and how FLOPs are counted.
        multipliers: The multipliers at the budgets of the reference.
        at_own_budgets: Those at the budgets of the objectives.
        joint: The joint law of the pair, if it has one.
        missing: The note that the pair has no common loss, if it has none.
    """
    names = (objective, reference, convention)
    own = [entry for entry in multipliers if entry.point[:3] == names and entry.shown]
    measured = [entry for entry in own if entry.method == "read-off"]
    counted = CONVENTION_NAMES[convention]
    if not measured:
        shown = [entry for entry in at_own_budgets if entry.point[:3] == names and entry.shown]
        if at_own := [entry for entry in shown if entry.method == "read-off"]:
            last = max(at_own, key=lambda entry: entry.objective_flops)
            words = (
                f"At the loss that {objective} reaches with {last.objective_flops:.3g} FLOPs ({counted}), it needs "
                f"{estimate_text(last.estimate)} times the compute of {reference}, read off the measured losses "
                f"({_kinds(last)}); at the budgets of {reference} nothing is measured."
            )
            return Headline(
                *names, words, last.reference_flops, last.estimate, None, (last.multiplier, last.multiplier)
            )
        why = _why(names, multipliers, missing)
        return Headline(*names, f"The compute multiplier of {objective} over {reference} is not measured: {why}.")
    best = max(measured, key=lambda entry: entry.reference_flops)
    beside = [entry for entry in own if entry.point == best.point and entry.trusted]
    law = next((entry for entry in beside if entry.method == "joint"), None)
    spread = (min(entry.multiplier for entry in beside), max(entry.multiplier for entry in beside))
    words = (
        f"At the loss that {reference} reaches with {best.reference_flops:.3g} FLOPs ({counted}), {objective} needs "
        f"{estimate_text(best.estimate)} times the compute, read off the measured losses ({_kinds(best)})"
    )
    words += f"; {estimate_text(law.estimate)} by the joint law" if law else ""
    if len(beside) > 1:
        names_of = ", ".join(entry.method for entry in beside)
        words += f"; the methods that are relied on ({names_of}) give {spread[0]:.3g} to {spread[1]:.3g}"
    elif any(entry.point == best.point for entry in own if not entry.trusted):
        words += "; no other method is relied on there"
    elif joint is None:
        words += "; the runs are too few for a law"
    return Headline(*names, f"{words}.", best.reference_flops, best.estimate, law.estimate if law else None, spread)


def _kinds(entry: Multiplier) -> str:
    """What the losses are that are held equal."""
    if entry.named is not None:
        return f"exact, by {entry.named}"
    own, theirs = (get_objective(base_objective(name)).val_kind for name in (entry.objective, entry.reference))
    return f"{own} against {theirs}"


def _why(names: tuple[str, str, Convention], multipliers: Sequence[Multiplier], missing: str | None) -> str:
    if missing:
        return "their best losses have no value in common"
    by_reading = [entry for entry in multipliers if entry.point[:3] == names and entry.method == "read-off"]
    if by_reading:
        last = by_reading[-1]
        return f"read off at {last.reference_flops:.3g} FLOPs it is about {last.multiplier:.2g}, but {last.withheld}"
    return f"no budget of {names[1]} has a loss that the measured losses of {names[0]} enclose"
