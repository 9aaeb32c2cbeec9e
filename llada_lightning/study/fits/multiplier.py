"""The compute multiplier: training FLOPs that an objective needs over those that the reference needs, at equal loss."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt

from llada_lightning.compute.flops import CONVENTION_NAMES, Convention
from llada_lightning.objectives import REFERENCE, ValidationKind, get_objective
from llada_lightning.study.fits.least_squares import Estimate
from llada_lightning.study.fits.objective import HeldOut, LossLine, Method, ObjectiveFits
from llada_lightning.study.fits.runs import base_objective
from llada_lightning.study.fits.uncertainty import Array

EXTRAPOLATION = 10.0
"""How far beyond its budgets an objective may reach a loss for the multiplier to be given."""

DRAWN_DECADES = 3.0
"""How far beyond its budgets a draw is followed."""

POINTS_A_DECADE = 12
ROUNDING = 1 + 1e-6

NO_COMMON_LOSS = "no common loss"
"""How the note begins that outweighs all others."""

REJECTED = 0.025
"""A fit whose lack of fit has a smaller p-value is rejected: 5 % over the two objectives of a multiplier."""


@dataclass(frozen=True)
class Multiplier:
    """FLOPs of an objective over FLOPs of the reference at the loss that the reference reaches at ``reference_flops``.

    The interval is at 95 %. Both names are those of ``ObjectiveFits``: with the variant where it is not the default.
    """

    objective: str
    reference: str
    convention: Convention
    method: Method
    reference_flops: float
    multiplier: float
    low: float
    high: float
    extrapolated: bool
    """Whether one of them reaches that loss only outside of the budgets that its fit goes through (within a decade)."""
    doubt: str | None = None
    """Why the number is not to be relied on, as ``with_doubts`` found it; None where nothing was found."""
    named: str | None = None
    """The name of the yardstick of the losses, which are exact then; None: they are validation losses."""

    @property
    def kind(self) -> ValidationKind:
        """Of what kind the losses are that are held equal: a bound if that of one of the two is a bound."""
        if self.named is not None:
            return "exact"
        kinds = {get_objective(base_objective(name)).val_kind for name in (self.objective, self.reference)}
        return "bound" if "bound" in kinds else "exact"

    @property
    def yardstick(self) -> str:
        """The quantity that is held equal: the name of the yardstick, or the kind of the validation losses."""
        return self.named or self.kind

    @property
    def trusted(self) -> bool:
        return self.doubt is None

    @property
    def shown(self) -> bool:
        """Whether tables and figures show it: not where a power law would have to hold beyond its budgets.

        Over synthetic studies with irreducible losses such 95 % intervals held the truth in four of ten.
        """
        return not (self.extrapolated and self.method == "envelope")

    @property
    def estimate(self) -> Estimate:
        return Estimate(self.multiplier, self.low, self.high)

    def as_dict(self) -> dict[str, Any]:
        """The record in ``fits.json``. The FLOPs of the default reference have their older name, too."""
        alias = {f"{REFERENCE}_flops": self.reference_flops} if self.reference == REFERENCE else {}
        found = {name: value for name, value in vars(self).items() if name != "named"}
        found |= {"yardstick": self.yardstick, "trusted": self.trusted, "interval": self.estimate.interval}
        return found | ({} if self.named is None else {"kind": self.kind}) | alias


def compute_multipliers(
    objective: str,
    reference: str,
    convention: Convention,
    method: Method,
    lines: tuple[LossLine, LossLine],
    reference_flops: npt.ArrayLike,
) -> list[Multiplier]:
    """The compute multiplier at given FLOPs of the reference, joint over the draws of both objectives.

    Left out is what either objective reaches only more than a decade beyond the budgets of its fit, or never. An
    interval's end that lies more than ``DRAWN_DECADES`` beyond them is open (infinite, or zero).

    ``lines`` are those of the objective and of the reference, both by ``method`` and ``convention``;
    ``reference_flops`` are (k,).
    """
    line, reference_line = lines
    flops = np.asarray(reference_flops, float)
    low, high = line.flops_range
    decades = np.log10(high / low) + 2 * DRAWN_DECADES
    log_grid = np.linspace(
        np.log(low) - DRAWN_DECADES * np.log(10),
        np.log(high) + DRAWN_DECADES * np.log(10),
        int(np.ceil(POINTS_A_DECADE * decades)) + 1,
    )
    grid = np.exp(log_grid)
    needed = np.exp(_first_reached(log_grid, line.loss(grid)[None], reference_line.loss(flops)[None]))[0]
    drawn = np.exp(_first_reached(log_grid, line.drawn(grid), reference_line.drawn(flops))) / flops
    found = []
    for number, (given, value) in enumerate(zip(flops, needed, strict=True)):
        sides = ((reference_line, given), (line, value))
        if all(_within(side, reached, EXTRAPOLATION) for side, reached in sides):
            own = Estimate.of(value / given, drawn[:, number])
            outside = not all(_within(side, reached, ROUNDING) for side, reached in sides)
            numbers = (float(given), own.value, own.low, own.high)
            found.append(Multiplier(objective, reference, convention, method, *numbers, outside))
    return found


def _within(line: LossLine, flops: float, factor: float) -> bool:
    """Whether FLOPs are no further beyond a line's own than by a factor."""
    low, high = line.flops_range
    return bool(low / factor <= flops <= high * factor)


def _first_reached(log_grid: Array, losses: Array, goals: Array) -> Array:
    """log FLOPs at which a loss is first reached, per draw: losses (S, g) on the grid and goals (S, k) give (S, k).

    Minus infinity where the grid begins below the goal, infinity where it is never reached, NaN where unknown.
    Between two points of the grid the logarithm of the loss is a straight line.
    """
    best = np.log(np.minimum.accumulate(losses, axis=1))
    wanted = np.log(goals)
    reached = np.empty_like(wanted)
    rows = np.arange(len(best))
    for column in range(wanted.shape[1]):
        goal = wanted[:, column]
        right = np.sum(best > goal[:, None], axis=1)
        inner = np.clip(right, 1, len(log_grid) - 1)
        before, after = best[rows, inner - 1], best[rows, inner]
        with np.errstate(invalid="ignore", divide="ignore"):
            share = (before - goal) / (before - after)
        value = log_grid[inner - 1] + share * (log_grid[inner] - log_grid[inner - 1])
        value = np.where(right == 0, -np.inf, np.where(right == len(log_grid), np.inf, value))
        reached[:, column] = np.where(np.isnan(goal) | np.isnan(best[:, 0]), np.nan, value)
    return reached


# --- doubt -----------------------------------------------------------------------------------------------------------


def with_doubts(
    multipliers: list[Multiplier], objectives: Iterable[ObjectiveFits], held_out: list[HeldOut]
) -> list[Multiplier]:
    """The same multipliers, each with the reasons to doubt its method by its convention.

    These are: a largest budget that was held out and lies outside of its predicted interval, and a fit that is
    rejected (``REJECTED``), of either objective; and, of a single multiplier, a power law beyond its budgets.
    """
    fits, found = {own.objective: own for own in objectives}, []
    for entry in multipliers:
        pair = (entry.objective, entry.reference)
        reasons = [
            f"{own.objective}'s largest budget, held out, is outside of its interval"
            for own in held_out
            if (own.method, own.convention) == (entry.method, entry.convention)
            and own.objective in pair
            and own.inside is False
        ]
        for name in fits:
            line = fits[name].line(entry.method, entry.convention) if name in pair else None
            if line and line.misfit < REJECTED:
                p_value = f"{line.misfit:.3f}" if line.misfit >= 0.001 else "< 0.001"
                reasons.append(f"{name}'s fit is rejected (p {p_value})")
        if not entry.shown:
            reasons.append("a power law beyond its budgets")
        found.append(replace(entry, doubt="; ".join(reasons) or None))
    return found


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
    theirs, own = (fits[name].envelope[convention].points for name in (reference, objective))
    behind = own[-1].loss > theirs[0].loss
    if not behind and own[0].loss >= theirs[-1].loss:
        return None
    found = [
        entry
        for entry in multipliers
        if (entry.objective, entry.reference, entry.convention) == (objective, reference, convention)
    ]
    least = min(
        (entry for entry in found if behind and entry.shown), key=lambda entry: entry.reference_flops, default=None
    )
    factor = least.multiplier * least.reference_flops / own[-1].flops if least else None
    by = f", by a factor of about {factor:.2g} ({least.method})" if least and factor else ""
    printed = "; what is printed is extrapolated" if any(entry.shown for entry in found) else ""
    smaller, larger = (reference, objective) if behind else (objective, reference)
    if len(theirs) == len(own) == 1:
        reached = f"{reference}'s loss is {theirs[0].loss:.3f}, {objective}'s {own[0].loss:.3f}"
    else:
        reached = (
            f"{reference}'s best losses go from {theirs[0].loss:.3f} to {theirs[-1].loss:.3f}, {objective}'s from "
            f"{own[0].loss:.3f} to {own[-1].loss:.3f}"
        )
    return (
        f"{NO_COMMON_LOSS} by {CONVENTION_NAMES[convention]}: {reached}, so no multiplier is measured{printed}; add "
        f"smaller budgets for {smaller} or larger ones for {larger}{by}"
    )


# --- agreement -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Disagreement:
    """Two methods whose 95 % intervals of one quantity share no number. Both are known; an infinite end is open."""

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


def disagreements(objectives: Iterable[ObjectiveFits], multipliers: list[Multiplier]) -> list[Disagreement]:
    """Where two methods' intervals do not overlap: the exponent of N_opt, and the multiplier at the same budget."""
    # What was estimated -> its estimates by method.
    quantities: dict[tuple[str, str, str | None, Convention, float | None], dict[str, Estimate]] = {}
    for fits in objectives:
        for convention, isoflop in fits.isoflop.items():
            if isoflop.n_law and fits.parametric:
                estimates = {"isoflop": isoflop.n_law.exponent, "parametric": fits.parametric.n_exponent(convention)}
                quantities[f"exponent of N_opt, {fits.objective}", fits.objective, None, convention, None] = estimates

    def pair(entry: Multiplier) -> tuple[str, str, Convention, float]:
        return entry.objective, entry.reference, entry.convention, entry.reference_flops

    for entry in sorted(multipliers, key=pair):
        quantities.setdefault(("compute multiplier", *pair(entry)), {})[entry.method] = entry.estimate
    found = []
    for what, estimates in quantities.items():
        for (one, own), (other, its) in combinations(estimates.items(), 2):
            if not own.overlaps(its):
                ends = ((own.low, own.high), (its.low, its.high))
                found.append(Disagreement(*what, (one, other), (own.value, its.value), ends))
    return found
