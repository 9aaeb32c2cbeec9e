"""Several objectives beside the reference: their multipliers at one loss, and what they need of each other's FLOPs.

Headlines tell each objective's multiplier at a budget of its own, so two of them do not say which objective is better.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llada_lightning.compute.flops import CONVENTION_NAMES, Convention
from llada_lightning.study.fits.envelope import ReadOff
from llada_lightning.study.fits.least_squares import Estimate
from llada_lightning.study.fits.multiplier import Multiplier, compute_multipliers
from llada_lightning.study.fits.objective import METHODS, Method, ObjectiveFits
from llada_lightning.study.fits.runs import BUDGET_TOLERANCE, UNIT_NAMES, Unit
from llada_lightning.support.printing import listed

TOLD = 3
"""Of more budgets than this only the smallest and the largest are told in words."""


@dataclass(frozen=True)
class CommonLoss:
    """The multipliers of several objectives at one budget of the reference, all by one method."""

    reference: str
    convention: Convention
    method: Method
    reference_flops: float
    multipliers: dict[str, Estimate]
    """By the name of the objective."""

    @property
    def words(self) -> str:
        told = [f"{name} needs {estimate_text(own)}" for name, own in self.multipliers.items()]
        return (
            f"At the loss that {self.reference} reaches with {self.reference_flops:.3g} FLOPs "
            f"({CONVENTION_NAMES[self.convention]}), {listed(told)} "
            f"times the compute, {method_text(self.method)}."
        )

    def as_dict(self) -> dict[str, Any]:
        return {**vars(self), "multipliers": {name: own.as_dict() for name, own in self.multipliers.items()}}


@dataclass(frozen=True)
class Contrast:
    """How two objectives compare with each other, by what is read off their measured losses."""

    objective: str
    """The one of the higher loss."""
    better: str
    convention: Convention
    unit: Unit
    factor: Estimate | None
    """FLOPs that ``objective`` needs over those of ``better`` at the loss that this reaches at ``flops``; None where no
    budget of ``better`` gives it an interval without an open end."""
    flops: float | None
    higher: dict[float, Estimate]
    """By how much the loss of ``objective`` is higher at equal FLOPs, by the budgets that both have."""

    @property
    def words(self) -> str:
        found, pair = [], f"{self.objective} and {self.better}"
        if self.factor is not None:
            assert self.flops is not None
            found.append(
                f"the former needs {estimate_text(self.factor)} times the compute of the latter for the loss that the "
                f"latter reaches with {self.flops:.3g} FLOPs"
            )
        if self.higher:
            told = sorted(self.higher.items())
            told = told if len(told) <= TOLD else [told[0], told[-1]]
            by = ", ".join(f"by {estimate_text(own)} at {flops:.3g} FLOPs" for flops, own in told)
            found.append(f"at equal FLOPs the loss of the latter is lower {by}, in {UNIT_NAMES[self.unit]}")
        return f"Of {pair} ({CONVENTION_NAMES[self.convention]}), {'; '.join(found)}; read off the measured losses."

    def as_dict(self) -> dict[str, Any]:
        return {
            **vars(self),
            "factor": self.factor and self.factor.as_dict(),
            "higher": [{"flops": flops, **own.as_dict()} for flops, own in self.higher.items()],
        }


def method_text(method: Method) -> str:
    """How a multiplier was found."""
    if method == "read-off":
        return "read off the measured losses"
    return "by a bent curve through the best losses" if method == "envelope" else f"by the method {method}"


def estimate_text(estimate: Estimate) -> str:
    """A value with its 95 % interval in brackets."""
    unknown = estimate.interval == "unknown"
    ends = "its interval is not known" if unknown else f"{estimate.low:.3g} to {estimate.high:.3g}"
    return f"{estimate.value:.3g} ({ends})"


def common_losses(multipliers: Sequence[Multiplier], conventions: Iterable[Convention]) -> list[CommonLoss]:
    """For each convention the largest budget of the reference at which all objectives have a multiplier by one method.

    The method is the one that assumes least. Only what is measured and relied on counts, and objectives that have
    nothing of it are left aside. Nothing is told of one objective.
    """
    found = []
    for convention in conventions:
        own = [
            entry
            for entry in multipliers
            if entry.convention == convention and entry.shown and entry.trusted and not entry.extrapolated
        ]
        names = list(dict.fromkeys(entry.objective for entry in own))
        points: dict[tuple[Method, float], list[Multiplier]] = {}
        for entry in own:
            points.setdefault((entry.method, entry.reference_flops), []).append(entry)
        whole = [point for point, entries in points.items() if len(entries) == len(names) > 1]
        if whole:
            point = min(whole, key=lambda point: (METHODS.index(point[0]), -point[1]))
            told = {entry.objective: entry.estimate for entry in points[point]}
            found.append(CommonLoss(own[0].reference, convention, *point, told))
    return found


def contrasts(
    names: Sequence[str], fits: Mapping[str, ObjectiveFits], conventions: Iterable[Convention], unit: Unit
) -> list[Contrast]:
    """Each objective but the first against the first, as far as their measured losses or their FLOPs meet."""
    return [
        found
        for convention in conventions
        for name in names[1:]
        if (found := _contrast((names[0], name), fits, convention, unit))
    ]


def _contrast(
    pair: tuple[str, str], fits: Mapping[str, ObjectiveFits], convention: Convention, unit: Unit
) -> Contrast | None:
    joined = {name: fits[name].envelope[convention].read_off for name in pair}
    first, second = (joined[name] for name in pair)
    if first is None or second is None:
        return None
    higher = _higher(first, second)
    above = higher[max(higher)].value if higher else _in_the_middle(first, second)
    if np.isnan(above):
        return None
    worse, better = pair if above >= 0 else pair[::-1]
    own, theirs = joined[worse], joined[better]
    assert own is not None and theirs is not None
    measured = [
        entry
        for entry in compute_multipliers(
            worse, better, convention, "read-off", (own.line(), theirs.line()), np.exp(theirs.log_c)
        )
        if entry.estimate.interval != "open" and not entry.extrapolated
    ]
    last = max(measured, key=lambda entry: entry.reference_flops, default=None)
    higher = _higher(own, theirs)
    if last is None and not higher:
        return None
    factor, flops = (last.estimate, last.reference_flops) if last else (None, None)
    return Contrast(worse, better, convention, unit, factor, flops, higher)


def _higher(own: ReadOff, theirs: ReadOff) -> dict[float, Estimate]:
    """By how much the loss is higher than the other at the budgets that both have, with both drawn together."""
    found = {}
    for row, log_c in enumerate(own.log_c):
        other = int(np.argmin(np.abs(theirs.log_c - log_c)))
        if abs(theirs.log_c[other] - log_c) < np.log(BUDGET_TOLERANCE):
            value = np.exp(own.log_loss[row]) - np.exp(theirs.log_loss[other])
            drawn = np.exp(own.draws[:, row]) - np.exp(theirs.draws[:, other])
            found[float(np.exp(log_c))] = Estimate.of(value, drawn)
    return found


def _in_the_middle(first: ReadOff, second: ReadOff) -> float:
    """The difference of the losses in the middle of the FLOPs that both cover; NaN where they cover none."""
    low, high = max(first.log_c[0], second.log_c[0]), min(first.log_c[-1], second.log_c[-1])
    if low > high:
        return np.nan
    middle = [float(np.exp((low + high) / 2))]
    return float(first.loss(middle)[0] - second.loss(middle)[0])
