"""The verdict of a study in a few sentences: the multipliers, whether methods agree, and what was compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from llada_lightning.compute.flops import CONVENTION_NAMES, Convention
from llada_lightning.compute.shapes import format_count
from llada_lightning.objectives import REFERENCE
from llada_lightning.study.fits import (
    METHODS,
    UNIT_NAMES,
    CommonLoss,
    Estimate,
    Headline,
    Multiplier,
    StudyFits,
    usable_runs,
)
from llada_lightning.study.fits.contrast import method_text
from llada_lightning.study.fits.runs import flops_column
from llada_lightning.study.tables.style import flops_text, known, with_short_powers
from llada_lightning.support.printing import listed

FEW = 3
"""Of more objectives than this a sentence tells the least and the largest number."""


def verdict(table: pd.DataFrame, fits: StudyFits, convention: Convention) -> tuple[str, ...]:
    """The sentences, with FLOPs by a convention: the answer, what several objectives say of each other, whether methods
    agree, and what was compared.

    Args:
        table: The table that was fitted.
        fits: The fits of the table.
        convention: The convention by which the table's FLOPs are counted.
    """
    found = [own for own in fits.headlines if own.convention == convention]
    own = [own.words for own in fits.contrasts if own.convention == convention]
    beside = [" ".join(own)] if 0 < len(own) < FEW else []
    agreement = [_agreement(found, fits, convention)] if found else []
    said = _answer(found, fits, convention), *beside, *agreement, _compared(table, fits, convention)
    return tuple(map(with_short_powers, said))


def verdict_without_fits(table: pd.DataFrame) -> tuple[str, ...]:
    """The sentences of a table that has no finished run with a finite loss."""
    states = table["status"].astype(object).fillna("no status").map(str).value_counts(sort=False)
    names = listed(sorted(set(table["objective"].astype(object).fillna("no objective").map(str))))
    of = ", ".join(f"{count} with status {state}" for state, count in states.items())
    return (
        "No compute multiplier is measured, because no run is finished with a finite loss.",
        f"The table holds {number(len(table), 'result')} of {names}: {of}.",
    )


def number(count: int, noun: str) -> str:
    """A number of things: 1 budget, 2 budgets."""
    return f"{count} {noun}{'s' * (count != 1)}"


def span(low: str, high: str) -> str:
    """The ends of a range; one of them where they read the same."""
    return low if low == high else f"{low} to {high}"


# --- the first sentence ----------------------------------------------------------------------------------------------


def _answer(found: Sequence[Headline], fits: StudyFits, convention: Convention) -> str:
    if fits.reference is None:
        return f"No compute multiplier is measured, because the results hold no runs of {REFERENCE} to divide by."
    if not found:
        return f"No compute multiplier is measured, because {fits.reference} is the only objective of the results."
    common = {own.convention: own for own in fits.common}
    if len(found) <= FEW and convention in common:
        others = [own for name, own in common.items() if name != convention]
        return _sentence("; ".join([_common_clause(common[convention], fits), *map(_otherwise_common, others)]))
    if len(found) <= FEW:
        return _sentence("; ".join(_clause(own, fits) + _otherwise(own, fits) for own in found))
    measured = sorted((own for own in found if own.read_off), key=lambda own: _read_off(own).value)
    counted = CONVENTION_NAMES[convention]
    if not measured:
        return f"Of {len(found)} objectives and variants, none has a measured multiplier over {fits.reference}."
    least, most = (f"{_told(_read_off(own))} for {own.objective}" for own in (measured[0], measured[-1]))
    return (
        f"Read off the measured losses, {len(measured)} of {len(found)} objectives and variants have a compute "
        f"multiplier over {fits.reference} ({counted}), from {least} to {most}, each at the common loss that the table "
        "of multipliers names."
    )


def _clause(own: Headline, fits: StudyFits) -> str:
    if own.read_off is None or own.reference_flops is None:
        best = [_best_losses(name, own.convention, fits) for name in (own.reference, own.objective)]
        return f"{_lowered(own.words.removesuffix('.'))} ({'; '.join(best)}, in {UNIT_NAMES[fits.unit]})"
    loss = fits.best_loss(own.reference, own.convention, own.reference_flops)
    return (
        f"read off the measured losses, {own.objective} needs {_told(own.read_off)} times the training FLOPs of "
        f"{own.reference} ({CONVENTION_NAMES[own.convention]}) for the loss of {known(loss, '.3f')} "
        f"{UNIT_NAMES[fits.unit]} that {own.reference} reaches with {flops_text(own.reference_flops, '.3g')} FLOPs"
    )


def _common_clause(own: CommonLoss, fits: StudyFits) -> str:
    flops = flops_text(own.reference_flops, ".3g")
    loss = known(fits.best_loss(own.reference, own.convention, own.reference_flops), ".3f")
    told = [f"{name} needs {_told(estimate)}" for name, estimate in own.multipliers.items()]
    return (
        f"for the loss of {loss} {UNIT_NAMES[fits.unit]} that {own.reference} reaches with {flops} FLOPs "
        f"({CONVENTION_NAMES[own.convention]}), {listed(told)} times its training FLOPs, {method_text(own.method)}"
    )


def _otherwise_common(own: CommonLoss) -> str:
    told = listed([_told(estimate) for estimate in own.multipliers.values()])
    flops = flops_text(own.reference_flops, ".3g")
    return f"counted as {CONVENTION_NAMES[own.convention]}, {told} times at {flops} FLOPs of {own.reference}"


def _best_losses(name: str, convention: Convention, fits: StudyFits) -> str:
    first, last = (fits.objectives[name].envelope[convention].points[end].loss for end in (0, -1))
    if f"{first:.3f}" == f"{last:.3f}":
        return f"the best loss of {name} is {last:.3f}"
    return f"the best losses of {name} go from {first:.3f} to {last:.3f}"


def _otherwise(own: Headline, fits: StudyFits) -> str:
    """The multiplier of the same pair with FLOPs by the other conventions, as far as it is measured."""
    found = [
        f"counted as {CONVENTION_NAMES[other.convention]}, it is {_told(other.read_off)} at "
        f"{flops_text(other.reference_flops, '.3g')} FLOPs of {other.reference}"
        for other in fits.headlines
        if (other.objective, other.reference) == (own.objective, own.reference)
        and other.convention != own.convention
        and other.read_off is not None
        and other.reference_flops is not None
    ]
    return "".join(f"; {words}" for words in found)


def _read_off(own: Headline) -> Estimate:
    assert own.read_off is not None
    return own.read_off


def _told(estimate: Estimate) -> str:
    unknown = estimate.interval == "unknown"
    ends = "its interval is not known" if unknown else f"95 % interval {estimate.low:.3g} to {estimate.high:.3g}"
    return f"{estimate.value:.3g} ({ends})"


# --- the second sentence ---------------------------------------------------------------------------------------------


def _agreement(found: Sequence[Headline], fits: StudyFits, convention: Convention) -> str:
    measured = [own for own in found if own.read_off]
    common = next((own for own in fits.common if own.convention == convention), None)
    if common and len(found) <= FEW:
        measured = [
            replace(own, reference_flops=common.reference_flops) for own in found if own.objective in common.multipliers
        ]
    if not measured:
        agreement = "no multiplier is measured by which the methods of fitting could be compared"
    elif len(measured) <= FEW:
        agreement = "; ".join(_methods_of(own, fits, named=len(measured) > 1) for own in measured)
    else:
        agreement = _methods_of_many(fits, convention)
    missing = [*_bounds(measured, fits), *_not_shown(fits, convention)]
    return _sentence("; ".join([agreement, *missing]))


def _methods_of(own: Headline, fits: StudyFits, named: bool) -> str:
    """Whether the methods agree at the point of a headline."""
    point = (own.objective, own.reference, own.convention, own.reference_flops)
    beside = [entry for entry in fits.compute_multiplier if entry.point == point and entry.shown and entry.trusted]
    of = f" for {own.objective}" if named else ""
    if len(beside) < 2:
        return f"no second method is relied on at that loss{of}"
    values = [entry.multiplier for entry in beside]
    names = [entry.method for entry in beside]
    apart = {
        method
        for entry in fits.disagreements
        if (entry.objective, entry.convention, entry.flops) == (own.objective, own.convention, own.reference_flops)
        and set(entry.methods) <= set(names)
        for method in entry.methods
    }
    differ = (
        f"of which {listed([name for name in METHODS if name in apart])} differ by more than their errors"
        if apart
        else "and do not differ by more than their errors"
    )
    return (
        f"the methods that are relied on at that loss{of} ({listed(names)}) give {min(values):.3g} to "
        f"{max(values):.3g}, {differ}"
    )


def _methods_of_many(fits: StudyFits, convention: Convention) -> str:
    points: dict[tuple[str, float], list[Multiplier]] = {}
    for entry in fits.compute_multiplier:
        if entry.convention == convention and entry.shown and not entry.extrapolated:
            points.setdefault((entry.objective, entry.reference_flops), []).append(entry)
    several = {point for point, entries in points.items() if len(entries) > 1}
    apart = {
        (entry.objective, entry.flops)
        for entry in fits.disagreements
        if entry.convention == convention and entry.flops is not None
    }
    if not several:
        return "no multiplier is given by more than one method"
    return f"methods differ by more than their errors at {len(apart)} of {len(several)} points where several are shown"


def _bounds(measured: Sequence[Headline], fits: StudyFits) -> list[str]:
    """That a part of a multiplier may be the gap of a bound."""
    bound = [
        own.objective for own in measured if fits.kind(own.objective) == "bound" and fits.kind(own.reference) == "exact"
    ]
    if not bound:
        return []
    whose = f"the bound of {bound[0]}" if len(bound) == 1 else f"the bounds of {_some(bound)}"
    return [f"not measured is how much of this is the gap between {whose} and the likelihood itself"]


def _some(names: Sequence[str]) -> str:
    return listed(names) if len(names) <= FEW else f"{len(names)} objectives and variants"


def _not_shown(fits: StudyFits, convention: Convention) -> list[str]:
    own = [entry for entry in fits.compute_multiplier if entry.convention == convention]
    withheld = sum(not entry.shown for entry in own)
    if not withheld:
        return []
    why = "their intervals are open, or they lie beyond budgets where no held-out test was passed"
    return [f"{withheld} of {len(own)} multipliers are not shown, because {why}"]


# --- the third sentence ----------------------------------------------------------------------------------------------


def _compared(table: pd.DataFrame, fits: StudyFits, convention: Convention) -> str:
    runs = usable_runs(table)
    flops = runs[flops_column(convention)].to_numpy(float)
    counted = CONVENTION_NAMES[convention]
    if len(fits.objectives) <= FEW + 1:
        parts = [
            f"{number(int(members.sum()), 'finished result')} of {name} "
            f"({number(len(own.envelope[convention].points), 'budget')}, {_range(flops[members])} FLOPs by {counted}, "
            f"{_sizes(runs[members])} parameters)"
            for name, own in fits.objectives.items()
            if (members := (runs["objective"] == name).to_numpy(bool)).any()
        ]
    else:
        many = f"{number(len(runs), 'finished result')} of {len(fits.objectives)} objectives and variants"
        parts = [f"{many} ({_range(flops)} FLOPs by {counted}, {_sizes(runs)} parameters)"]
    shared = [words for column, words in _SHARED.items() if runs[column].notna().all() and runs[column].nunique() == 1]
    on = f" on {listed(shared)}" if shared else ""
    what = "validation losses" if fits.yardstick is None else f"exact losses by {fits.yardstick}"
    ways = listed([CONVENTION_NAMES[name] for name in fits.conventions])
    verb = "is" if len(runs) == 1 else "are"
    return f"Compared {verb} {listed(parts)}{on}, by {what} in {UNIT_NAMES[fits.unit]}, with FLOPs counted by {ways}."


_SHARED = {"data_fingerprint": "the same data", "tokenizer": "one tokenizer", "sequence_length": "one sequence length"}


def _range(flops: np.ndarray) -> str:
    return span(flops_text(flops.min()), flops_text(flops.max()))


def _sizes(runs: pd.DataFrame) -> str:
    return span(*(format_count(float(end)) for end in runs["params_nonembedding"].agg(["min", "max"])))


def _lowered(text: str) -> str:
    return f"{text[:1].lower()}{text[1:]}"


def _sentence(text: str) -> str:
    """Clauses as a sentence."""
    return f"{text[:1].upper()}{text[1:]}."
