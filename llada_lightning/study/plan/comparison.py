"""What the comparison of a plan's objectives stands on: losses that both reach, tuned rates, runs of enough steps.

A compute multiplier m of an objective says that it needs m times the FLOPs of the reference for the reference's loss.
So the reference's budget C / m and the objective's budget C give about the same loss.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from llada_lightning.compute.flops import Convention
from llada_lightning.compute.rules import RANGES, Outside, Range, significant
from llada_lightning.objectives import REFERENCE, get_objective
from llada_lightning.support.errors import UserError

if TYPE_CHECKING:
    from llada_lightning.study.plan import Plan

ENOUGH_STEPS = 500
"""Results of fewer steps lie on the steep start of their loss curves, where multipliers grow with every improvement of
the reference's tuning (docs/study.md, "`arm`'s short runs, tuned anew")."""

_FAR = 10.0
"""A multiplier that was measured at budgets so many times as large, or as small, is told where it is used."""

_TOLERANCE = 1.1
"""Budgets that differ by less than this factor count as equal, as in ``study.fits``."""


def measured_multiplier(name: str, convention: Convention, flops: float) -> tuple[float, str] | None:
    """The multiplier of an objective that was measured nearest to so many FLOPs of its own, and its source, if any."""
    measured = get_objective(name).multipliers.get(convention, ())
    if not measured:
        return None
    _, multiplier, source = min(measured, key=lambda own: abs(math.log(own[0] / flops)))
    return multiplier, source


def overlap_factor(
    budgets: Sequence[float], objectives: Sequence[str], convention: Convention, multiplier: float | None
) -> float:
    """The factor by which the reference's budgets are lowered, to where its losses are those of the others.

    Args:
        budgets: The budgets of the objectives beside the reference.
        objectives: The names of the objectives.
        convention: Which FLOPs a budget counts.
        multiplier: The FLOPs of the others over the reference's at equal loss. None: the largest that was measured.

    Raises:
        UserError: The reference or another objective is missing, or no multiplier is known.
    """
    others = [name for name in objectives if name != REFERENCE]
    if REFERENCE not in objectives or not others:
        raise UserError(
            f"plan: --overlap places {REFERENCE}'s budgets where it has the losses of other objectives; --objectives "
            f"names {' '.join(objectives)}: give {REFERENCE} and another one"
        )
    found = [measured_multiplier(name, convention, max(budgets)) for name in others]
    if multiplier is None:
        known = [own[0] for own in found if own is not None]
        if not known:
            raise UserError(f"plan: no multiplier of {', '.join(others)} was measured; give one by --multiplier")
        multiplier = max(known)
    return multiplier


@contextmanager
def naming_what_was_lowered(objective: str, lowered_by: float) -> Iterator[None]:
    """A refusal within the block says, too, that the reference's budgets were lowered, which the user has not typed."""
    try:
        yield
    except UserError as error:
        if objective != REFERENCE or lowered_by == 1:
            raise
        raise UserError(f"{error}; --overlap divided {REFERENCE}'s budgets by {lowered_by:.3g}") from error


def budgets_of(objective: str, budgets: Sequence[float], lowered_by: float) -> tuple[float, ...]:
    """The budgets of an objective in a study whose reference has lower ones: its own are the given ones by a factor.

    Args:
        objective: The name of the objective.
        budgets: The budgets of the study.
        lowered_by: The factor; 1: all objectives have the same budgets.
    """
    if objective != REFERENCE or lowered_by == 1:
        return tuple(budgets)
    return tuple(significant(budget / lowered_by) for budget in budgets)


# --- notes of a plan -------------------------------------------------------------------------------------------------


def comparison_notes(plan: Plan) -> list[str]:
    """What a reader of a plan should know before its objectives are compared, one line each."""
    notes = [*rules_outside(plan), *overlap_from_afar(plan)]
    for name in plan.objectives:
        notes += [*tuned_rate(plan, name), *no_common_loss(plan, name), *short_results(plan, name)]
    return notes


def rules_outside(plan: Plan) -> Iterator[str]:
    """One line on the rules that are used outside of the sizes that they were fitted on, by how much at most."""
    furthest: dict[str, Outside] = {}
    for trunk in plan.trunks:
        for rule, fitted_on in _rules_of(plan, trunk.objective).items():
            outside = fitted_on.outside(trunk.size)
            if outside is not None and (rule not in furthest or outside.factor > furthest[rule].factor):
                furthest[rule] = outside
    if furthest:
        listed = "; ".join(f"{rule} at {outside}" for rule, outside in furthest.items())
        yield f"outside of the sizes that the rules were fitted on: {listed}. --tune measures rules of your own"


def _rules_of(plan: Plan, objective: str) -> Mapping[str, Range]:
    """The rules that give an objective's rate and batch, with their ranges."""
    recipe, used = plan.recipe, dict[str, Range]()
    fitted = recipe.fitted.get(objective)
    own = {} if fitted is None else {f"the rule file's {objective}": fitted.budgets}
    if recipe.lr is None:
        used |= own or _range(recipe.lr_rule)
    if recipe.batch is None:
        used |= own if fitted is not None and fitted.batch is not None else _range(recipe.batch_rule)
    return used


def _range(rule: str) -> dict[str, Range]:
    return {rule: RANGES.get(rule, Range())}


def tuned_rate(plan: Plan, name: str) -> Iterator[str]:
    """Where the rule's rate is used as it is: the factor on it that tuning found best."""
    recipe, objective = plan.recipe, get_objective(name)
    by_number = recipe.lr is not None or recipe.lr_scale.get(name, 1.0) != 1.0 or name in recipe.fitted
    if objective.lr_scale != 1.0 and recipe.lr_rule == "deepseek" and not by_number:
        yield (
            f"{name}'s best learning rate was about {objective.lr_scale:g} times the rule's "
            f"{objective.lr_scale_source}: --lr-scale-{name} {objective.lr_scale:g}"
        )


def overlap_from_afar(plan: Plan) -> Iterator[str]:
    """Where the reference's budgets were lowered by a multiplier that was measured at quite other budgets."""
    if plan.lowered_by == 1 or plan.multiplier is not None:
        return
    for name in plan.objectives:
        measured = get_objective(name).multipliers.get(plan.convention, ())
        at = next((flops for flops, multiplier, _ in measured if multiplier == plan.lowered_by), None)
        largest = plan.budgets_of(name)[-1]
        if at is not None and name != REFERENCE and max(at / largest, largest / at) > _FAR:
            yield (
                f"{REFERENCE}'s budgets are lowered by {plan.lowered_by:g}, which was measured at {at:.2g} FLOPs of "
                f"{name}; here {name} has {largest:.2g} at most, where the multiplier may be another one and the "
                "losses may not meet. --multiplier gives your own; --append adds budgets later"
            )


def _multiplier(plan: Plan, name: str) -> tuple[float, str] | None:
    """The multiplier of an objective at the plan's size, and its source."""
    if plan.multiplier is not None:
        return plan.multiplier, "--multiplier"
    return measured_multiplier(name, plan.convention, plan.budgets_of(name)[-1])


def no_common_loss(plan: Plan, name: str) -> Iterator[str]:
    """Where the losses of an objective and of the reference may not meet, by what factor their budgets miss."""
    known = _multiplier(plan, name) if name != REFERENCE and REFERENCE in plan.objectives else None
    if known is None:
        return
    multiplier, source = known
    theirs, own = plan.budgets_of(REFERENCE), plan.budgets_of(name)
    too_high = multiplier * theirs[0] / own[-1]
    too_low = own[0] / multiplier / theirs[-1]
    needs = f"{name} needs about {multiplier:g} times {REFERENCE}'s FLOPs for {REFERENCE}'s loss ({source})"
    if too_high > 1:
        yield (
            f"these budgets may share no loss: they span a factor of {own[-1] / theirs[0]:.3g}, and {needs}. A factor "
            f"of {too_high:.2g} is missing: plan {REFERENCE} from {theirs[0] / too_high:.2g} or {name} up to "
            f"{own[-1] * too_high:.2g} FLOPs (--objectives), or {REFERENCE} at lower budgets (--overlap)"
        )
    elif too_low > _TOLERANCE:
        yield (
            f"these budgets may share no loss: {REFERENCE}'s end at {theirs[-1]:.2g} FLOPs, {name}'s begin at "
            f"{own[0]:.2g}, and {needs}. A factor of {too_low:.2g} is missing: give a smaller --multiplier, or more "
            "budgets"
        )


def short_results(plan: Plan, name: str) -> Iterator[str]:
    """Where results that decide a multiplier are short: those whose losses an objective and the reference may share."""
    if name == REFERENCE or REFERENCE not in plan.objectives:
        return
    multiplier, _ = _multiplier(plan, name) or (1.0, "")
    over = {REFERENCE: 1.0, name: multiplier}
    reached = {own: [budget / factor for budget in plan.budgets_of(own)] for own, factor in over.items()}
    low = max(map(min, reached.values())) / _TOLERANCE
    high = min(map(max, reached.values())) * _TOLERANCE
    deciding = [
        (branch.steps, trunk.objective, branch.budget, trunk.global_batch)
        for trunk in plan.trunks
        for branch in trunk.branches
        if trunk.objective in over and low <= branch.budget / over[trunk.objective] <= high
    ]
    short = [result for result in deciding if result[0] < ENOUGH_STEPS]
    if short:
        steps, objective, budget, _ = min(short)
        smaller = "" if all(batch == 1 for *_, batch in short) else "a smaller --batch or "
        yield (
            f"{len(short)} of {len(deciding)} results whose losses {REFERENCE} and {name} may share have fewer than "
            f"{ENOUGH_STEPS} steps (the fewest: {steps} of {objective} at {budget:.3g} FLOPs). They decide the "
            f"multiplier, and lie on the steep start of the curve; {smaller}larger budgets lengthen them"
        )
