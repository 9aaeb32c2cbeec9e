"""The compute multiplier: training FLOPs that an objective needs over those that the reference needs, at equal loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from llada_lightning.compute.flops import Convention
from llada_lightning.objectives import REFERENCE, ValidationKind, get_objective
from llada_lightning.study.fits.held_out import HeldOut
from llada_lightning.study.fits.least_squares import Estimate
from llada_lightning.study.fits.lines import LossLine
from llada_lightning.study.fits.objective import Method
from llada_lightning.study.fits.runs import base_objective
from llada_lightning.study.fits.uncertainty import Array

EXTRAPOLATION = 10.0
"""How far beyond its budgets an objective may reach a loss for the multiplier to be given."""

POINTS_A_DECADE = 12
ROUNDING = 1 + 1e-6

OPEN = "its interval is open"
"""Why a multiplier is withheld of which some draws reach the loss nowhere."""

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
    """Whether one of them reaches that loss only outside of the budgets that its fit goes through (within a decade).

    The interval then holds the values of the other methods, too.
    """
    doubt: str | None = None
    """Why the number is not to be relied on, as ``judged`` found it; None where nothing was found."""
    withheld: str | None = None
    """Why tables and figures do not show the number, as ``judged`` found it; None where they do."""
    named: str | None = None
    """The name of the yardstick of the losses, which are exact then; None: they are validation losses."""
    draws: Array | None = field(default=None, repr=False, compare=False)
    """The multiplier in every draw (samples,)."""

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
        return self.withheld is None

    @property
    def point(self) -> tuple[str, str, Convention, float]:
        """What it is the multiplier of: the pair, the convention and the FLOPs of the reference."""
        return self.objective, self.reference, self.convention, self.reference_flops

    @property
    def estimate(self) -> Estimate:
        return Estimate(self.multiplier, self.low, self.high)

    @property
    def objective_flops(self) -> float:
        """What the objective needs for the loss."""
        return self.reference_flops * self.multiplier

    def inverse(self) -> Multiplier:
        """FLOPs of the reference over FLOPs of the objective, at the same loss."""
        with np.errstate(divide="ignore"):
            value, low, high = 1 / np.array([self.multiplier, self.high, self.low])
            draws = None if self.draws is None else 1 / self.draws
        return replace(
            self, objective=self.reference, reference=self.objective, reference_flops=self.objective_flops,
            multiplier=float(value), low=float(low), high=float(high), draws=draws,
        )  # fmt: skip

    def as_dict(self) -> dict[str, Any]:
        """The record in ``fits.json``. The FLOPs of the default reference have their older name, too."""
        alias = {f"{REFERENCE}_flops": self.reference_flops} if self.reference == REFERENCE else {}
        found = {name: value for name, value in vars(self).items() if name not in ("named", "draws")}
        found |= {"objective_flops": self.objective_flops, "yardstick": self.yardstick}
        found |= {"trusted": self.trusted, "interval": self.estimate.interval}
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
    interval's end that lies beyond where a line is followed (``LossLine.decades``) is open (infinite, or zero).

    ``lines`` are those of the objective and of the reference, both by ``method`` and ``convention``;
    ``reference_flops`` are (k,).
    """
    line, reference_line = lines
    flops = np.asarray(reference_flops, float)
    low, high = line.flops_range
    beyond = line.decades * np.log(10)
    decades = np.log10(high / low) + 2 * line.decades
    points = int(np.ceil(POINTS_A_DECADE * decades)) + 1
    log_grid = np.linspace(np.log(low) - beyond, np.log(high) + beyond, points)
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
            names = (objective, reference, convention, method)
            found.append(Multiplier(*names, *numbers, outside, draws=drawn[:, number]))
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
    with np.errstate(divide="ignore"):  # a draw of a law may fall to 0 far beyond its runs
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


# --- what is relied on -----------------------------------------------------------------------------------------------

Misfit = Callable[[str, Multiplier], float]
"""The name of an objective and a multiplier -> the p-value of the lack of fit of the line that it rests on."""


def judged(multipliers: Sequence[Multiplier], held_out: Sequence[HeldOut], misfit: Misfit) -> list[Multiplier]:
    """The same multipliers, each with the reasons to doubt or to withhold it.

    Doubted is a method whose fit of either objective is rejected (``REJECTED``) or misses a largest budget that was
    held out. Withheld is a number whose interval is open, and one beyond the budgets of a fit, unless the method
    passed the held-out test of both objectives. The interval of what is shown beyond the budgets holds the values of
    the other methods, too.
    """
    found = [
        replace(entry, doubt=_doubt(entry, held_out, misfit), withheld=_withheld(entry, held_out))
        for entry in multipliers
    ]
    return [_widened(entry, found) if entry.extrapolated and entry.shown else entry for entry in found]


def _tests(entry: Multiplier, held_out: Iterable[HeldOut]) -> list[HeldOut]:
    return [
        own
        for own in held_out
        if (own.method, own.convention) == (entry.method, entry.convention)
        and own.of_pair(entry.objective, entry.reference)
    ]


def _doubt(entry: Multiplier, held_out: Iterable[HeldOut], misfit: Misfit) -> str | None:
    reasons = [
        f"{own.objective}'s largest budget, held out, is outside of its interval"
        for own in _tests(entry, held_out)
        if own.inside is False
    ]
    for name in (entry.objective, entry.reference):
        p_value = misfit(name, entry)
        if p_value < REJECTED:
            shown = f"{p_value:.3f}" if p_value >= 0.001 else "< 0.001"
            fit = "the joint fit" if entry.method == "joint" else f"{name}'s fit"
            reasons.append(f"{fit} is rejected (p {shown})")
    return "; ".join(dict.fromkeys(reasons)) or None


def _withheld(entry: Multiplier, held_out: Iterable[HeldOut]) -> str | None:
    if entry.extrapolated:
        passed = {own.objective for own in _tests(entry, held_out) if own.inside}
        if missing := [name for name in (entry.objective, entry.reference) if name not in passed]:
            return f"beyond its budgets, where the held-out test of {' and '.join(missing)} was not passed"
    if entry.estimate.interval == "open":
        return OPEN
    return None


def _widened(entry: Multiplier, among: Sequence[Multiplier]) -> Multiplier:
    """The multiplier with an interval that holds what other methods give at the same point."""
    others = [
        other.multiplier
        for other in among
        if other.point == entry.point and other.method != entry.method and other.shown and other.trusted
    ]
    return replace(entry, low=min([entry.low, *others]), high=max([entry.high, *others]))
