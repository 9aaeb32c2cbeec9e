"""The tables and notes that ``llada curves`` prints, 80 columns wide."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from rich.box import SIMPLE_HEAD
from rich.table import Table

from llada_lightning.compute.flops import CONVENTION_NAMES, Convention
from llada_lightning.compute.shapes import format_count
from llada_lightning.objectives import get_objective
from llada_lightning.records import NOISE_LEVELS
from llada_lightning.study.fits import (
    METHODS,
    NO_COMMON_LOSS,
    NOISE_MODELS,
    UNIT_NAMES,
    Disagreement,
    Estimate,
    IsoflopBudget,
    ObjectiveFits,
    StudyFits,
    best_of_budgets,
    budget_groups,
    flops_column,
    losses,
    objective_names,
    planned_flops,
    usable_runs,
)
from llada_lightning.study.fits.multiplier import OPEN
from llada_lightning.study.fits.rules import TuningFits
from llada_lightning.study.fits.runs import base_objective
from llada_lightning.study.forecast import Scored
from llada_lightning.study.levels import RunLevels
from llada_lightning.support.printing import people_console

DOUBT = "†"
DOUBT_MEANS = f"{DOUBT} do not rely on it: a fit is rejected, or fails its held-out test"
BEYOND_MEANS = "* beyond the budgets of one of the fits, by at most a decade; held-out tests passed"

MOST_RUNS = 40
"""A table of more runs shows the best of each budget only."""


def print_report(
    table: pd.DataFrame, fits: StudyFits, convention: Convention, files: list[str], forecasts: Sequence[Scored] = ()
) -> None:
    """Prints the runs, then their fits by one convention, and forecasts beside what was measured since."""
    console = people_console()
    if fits.yardstick is not None:
        console.print(f"Yardstick: {fits.yardstick}, the exact loss under this decoding policy\n", highlight=False)
    multipliers = [multiplier_table(fits, convention, name) for name in fits.compared]
    laws = (optima_table(fits, convention), parameters_table(fits, convention))
    scored = [forecast_table(forecasts)] if forecasts else []
    tables = (runs_table(table, convention), *laws, *multipliers, held_out_table(fits, convention), *scored)
    for printed in tables:
        if printed.row_count:
            console.print(printed)
            console.print()
    console.print(f"Intervals are at 95 %; errors: {NOISE_MODELS[fits.noise_model]}.\n", highlight=False)
    for line in headline_lines(fits, convention):
        console.print(line, highlight=False)
    apart = [_disagreement(own) for own in fits.disagreements if own.convention == convention]
    flags = [*doubt_lines(fits, convention), *withheld_lines(fits, convention), *apart, *fits.notes]
    flags.sort(key=lambda flag: not flag.startswith(NO_COMMON_LOSS))
    if flags:
        console.print("To note:")
    for flag in flags:
        console.print(f"- {flag}", highlight=False, soft_wrap=True)
    console.print(f"-> {', '.join(files)}", soft_wrap=True)


def _titled(title: str, *columns: str, left: int = 1) -> Table:
    printed = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 0), show_edge=False, pad_edge=False)
    for number, name in enumerate(columns):
        printed.add_column(name, justify="left" if number < left else "right", overflow="fold", no_wrap=number > 0)
    return printed


def _captioned(printed: Table, caption: str) -> Table:
    if caption:
        printed.caption, printed.caption_justify = caption, "left"
    return printed


# --- runs ------------------------------------------------------------------------------------------------------------


def runs_table(table: pd.DataFrame, convention: Convention = "6nd") -> Table:
    """The usable runs, the best of each objective's budgets marked; of more than 40 runs only those best ones."""
    runs = usable_runs(table)
    short = len(runs) > MOST_RUNS
    shown = f", the best of each budget ({len(runs)} runs)" if short else ""
    title = f"Budgets in training FLOPs ({CONVENTION_NAMES[convention]}){shown}"
    printed = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 0), show_edge=False)
    for name in ("objective", "shape"):
        printed.add_column(name, overflow="fold")
    for name in ("budget", "N", "tokens", "loss ± s.e.", "kind", "bits/byte", "tokens/s", "best"):
        printed.add_column(name, justify="left" if name in ("kind", "best") else "right", no_wrap=True)
    for objective in objective_names(runs):
        members = runs[runs["objective"] == objective]
        # The FLOPs themselves differ within a budget by a part of a step.
        members = members.assign(_budget=budget_groups(planned_flops(members)))
        members = members.sort_values(["_budget", "params_nonembedding"], ignore_index=True)
        best = set(best_of_budgets(members, "nats_per_token"))
        for row in range(len(members)):
            if row in best or not short:
                printed.add_row(*_run_row(members.iloc[row], convention), "best" if row in best else "")
        printed.add_section()
    return printed


def _run_row(run: Any, convention: Convention) -> list[str]:
    loss, stderr = (values[0] for values in losses(run.to_frame().T, "nats_per_token"))
    return [
        run["objective"],
        _short_shape(str(run["shape"])),
        _flops(run[flops_column(convention)]),
        format_count(run["params_nonembedding"]),
        format_count(run["tokens"]),
        f"{loss:.3f} ± {stderr:.3f}" if math.isfinite(stderr) else f"{loss:.3f}",
        run["val_kind"],
        _known(run["val_bits_per_byte"], ".3f"),
        _known(run["tokens_per_second"], ",.0f"),
    ]


def _short_shape(shape: str) -> str:
    """Of a shape without a name, depth and width: `2x32`."""
    return re.sub(r"^L(\d+)-d(\d+)-.*", r"\1x\2", shape)


def _known(value: float, form: str) -> str:
    return format(value, form) if math.isfinite(value) else ""


# --- fits ------------------------------------------------------------------------------------------------------------


def optima_table(fits: StudyFits, convention: Convention) -> Table:
    """N_opt, D_opt, tokens per parameter and loss at each budget, by its isoFLOP parabola."""
    printed = _titled(
        f"Optimum by isoFLOP ({CONVENTION_NAMES[convention]}; loss in {UNIT_NAMES[fits.unit]})",
        *("objective", "budget ", "N", "", "tokens", "tokens/N", "", "loss"),
    )
    for objective, own in fits.objectives.items():
        for budget in own.isoflop[convention].budgets:
            printed.add_row(objective, *_optimum_row(budget))
        printed.add_section()
    budgets = [budget for own in fits.objectives.values() for budget in own.isoflop[convention].budgets]
    return _captioned(printed, "; ".join(dict.fromkeys(_FLAGS[flag] for flag in map(_flag, budgets) if flag)))


_FLAGS = {"!": "! optimum outside of the grid", "~": "~ moved by the grid beyond its interval"}


def _flag(budget: IsoflopBudget) -> str:
    return "!" if not budget.interior else "~" if budget.bias is not None else ""


def _optimum_row(budget: IsoflopBudget) -> list[str]:
    if not budget.interior:
        smallest, largest = np.exp(budget.log_n.min()), np.exp(budget.log_n.max())
        side = f"< {format_count(smallest)}" if budget.n_opt.value < smallest else f"> {format_count(largest)}"
        return [_flops(budget.flops) + _flag(budget), side]
    return [
        _flops(budget.flops) + (_flag(budget) or " "),
        format_count(budget.n_opt.value),
        f" ({_count(budget.n_opt.low)}–{_count(budget.n_opt.high)})",
        format_count(budget.d_opt.value),
        f"{budget.tokens_per_param.value:.3g}",
        f" ({_short(budget.tokens_per_param)})",
        f"{budget.loss_opt.value:.3f}",
    ]


def parameters_table(fits: StudyFits, convention: Convention) -> Table:
    """Exponents and parameters of every law, with intervals."""
    printed = _titled("Laws", "objective", "quantity", "method", "value", "95 % interval", left=3)
    for objective, own in fits.objectives.items():
        for quantity, method, estimate in _parameters(own, convention):
            printed.add_row(objective, quantity, method, f"{estimate.value:.4g}", _interval(estimate, ".4g"))
        if own.parametric and not own.parametric.identified:
            printed.add_row(objective, "L(N, D)", "parametric", "", "not identified")
        printed.add_section()
    return printed


def _parameters(own: ObjectiveFits, convention: Convention) -> Iterable[tuple[str, str, Estimate]]:
    envelope, isoflop = own.envelope[convention], own.isoflop[convention]
    parametric = own.parametric if own.parametric and own.parametric.identified else None
    if isoflop.n_law:
        yield "a of N_opt ~ C^a", "isoflop", isoflop.n_law.exponent
    if parametric:
        yield "a of N_opt ~ C^a", "parametric", parametric.n_exponent(convention)
    if isoflop.d_law:
        yield "b of D_opt ~ C^b", "isoflop", isoflop.d_law.exponent
    if envelope.law:
        yield "c of loss ~ C^-c", "envelope", envelope.law.exponent
    if isoflop.loss_law:
        yield "c of loss ~ C^-c", "isoflop", isoflop.loss_law.exponent
    if parametric:
        for name in ("alpha", "beta", "E"):
            yield f"{name} of L(N, D)", "parametric", getattr(parametric, name)


def multiplier_table(fits: StudyFits, convention: Convention, objective: str) -> Table:
    """The compute multiplier of an objective at each of the reference's budgets, a column a method."""
    entries = [
        entry
        for entry in fits.compute_multiplier
        if (entry.objective, entry.convention) == (objective, convention) and entry.shown
    ]
    methods = [method for method in METHODS if any(entry.method == method for entry in entries)]
    printed = _titled(
        f"Compute multiplier at equal loss, {objective} over {fits.reference} ({CONVENTION_NAMES[convention]})",
        *(f"{fits.reference}'s budget", *methods),
    )
    for flops in sorted({entry.reference_flops for entry in entries}):
        cells = dict.fromkeys(methods, "")
        for entry in entries:
            if entry.reference_flops == flops:
                marks = DOUBT * (not entry.trusted) + "*" * entry.extrapolated
                ends = f"{_factor(entry.low)}–{_factor(entry.high)}"
                cells[entry.method] = f"{_factor(entry.multiplier)}{marks:1}({ends})"
        printed.add_row(_flops(flops), *cells.values())
    legend = [f"the losses that are held equal: {_kind(fits, objective)} against {_kind(fits, fits.reference)}"]
    legend += [DOUBT_MEANS] * any(not entry.trusted for entry in entries)
    legend += [BEYOND_MEANS] * any(entry.extrapolated for entry in entries)
    return _captioned(printed, "\n".join(legend))


def headline_lines(fits: StudyFits, convention: Convention) -> list[str]:
    """The headline of each pair in words."""
    return [f"{own.words}\n" for own in fits.headlines if own.convention == convention]


def withheld_lines(fits: StudyFits, convention: Convention) -> list[str]:
    """Which multipliers are not shown, at which budgets and why: a line for each objective and reason."""
    reasons: dict[tuple[str, str], dict[str, list[str]]] = {}
    for entry in fits.compute_multiplier:
        if entry.convention == convention and entry.withheld:
            budgets = reasons.setdefault((entry.objective, entry.withheld), {}).setdefault(entry.method, [])
            budgets.append(_flops(entry.reference_flops))
    found = []
    for (objective, reason), methods in reasons.items():
        where = "; ".join(f"{method} at {', '.join(budgets)}" for method, budgets in methods.items())
        remedy = " (more budgets around them, or seeds, narrow it)" if reason == OPEN else ""
        found.append(f"compute multiplier of {objective} not shown, {where}: {reason}{remedy}")
    return found


def _kind(fits: StudyFits, objective: str | None) -> str:
    """Of what kind the losses of an objective are: `bound` or `exact`."""
    assert objective is not None
    return "exact" if fits.yardstick else get_objective(base_objective(objective)).val_kind


def doubt_lines(fits: StudyFits, convention: Convention) -> list[str]:
    """Why the multipliers of an objective and method are marked, a line for each."""
    doubts = {
        (entry.objective, entry.method): entry.doubt
        for entry in fits.compute_multiplier
        if entry.convention == convention and entry.shown and not entry.trusted
    }
    return [
        f"{DOUBT} compute multiplier of {objective}, {method}, {convention}: {doubt}"
        for (objective, method), doubt in doubts.items()
    ]


_INSIDE = {True: "yes", False: "NO", None: "?"}
"""Whether an interval holds what was measured; ?: it is too wide to tell anything."""


def held_out_table(fits: StudyFits, convention: Convention) -> Table:
    """The largest budget as fits without it predict it."""
    printed = _titled(
        "The largest budget, predicted by fits without it",
        *("objective", "method", "budget", "observed", "predicted", "95 % interval", "error", "inside"),
        left=2,
    )
    for entry in fits.held_out:
        if entry.convention == convention:
            printed.add_row(
                *(entry.objective, entry.method, _flops(entry.flops), f"{entry.observed:.3f}"),
                f"{entry.predicted:.3f}",
                _interval(Estimate(entry.predicted, entry.low, entry.high), ".3f"),
                f"{entry.relative_error:+.1%}",
                _INSIDE[entry.inside],
            )
    return printed


def forecast_table(forecasts: Iterable[Scored]) -> Table:
    """Forecasts, each with the loss that was measured since, if it was."""
    printed = _titled(
        "Forecasts of the best loss",
        *("objective", "method", "budget", "predicted", "95 % interval", "measured", "error", "inside"),
        left=2,
    )
    for scored in forecasts:
        own, measured = scored.prediction, scored.observed
        mark = "" if own.passed else DOUBT
        seen = ("not run", "", "")
        if measured is not None:
            seen = (f"{measured:.3f}", f"{own.loss / measured - 1:+.1%}", _INSIDE[scored.inside])
        numbers = (_flops(own.flops), f"{own.loss:.3f}{mark}", _interval(own.estimate, ".3f"))
        printed.add_row(own.objective, own.method, *numbers, *seen)
    return _captioned(printed, f"{DOUBT} the method had not passed a held-out test when it was made")


def _disagreement(entry: Disagreement) -> str:
    at = "" if entry.flops is None else f" of {entry.objective} at {entry.reference}'s {_flops(entry.flops)} FLOPs"
    sides = (
        f"{method} {value:.3g} ({_short(Estimate(value, *ends))})"
        for method, value, ends in zip(entry.methods, entry.values, entry.intervals, strict=True)
    )
    return f"{entry.quantity}{at}, {entry.convention}: methods disagree, {' against '.join(sides)}"


# --- rules of a tuning study ------------------------------------------------------------------------------------------

EDGE = "‡"


def print_rules(fits: TuningFits, files: list[str]) -> None:
    """Prints the optimal rate and batch of every budget of a tuning study, and their laws."""
    console = people_console()
    console.print(rules_table(fits))
    console.print()
    for line in law_lines(fits):
        console.print(line, highlight=False, soft_wrap=True)
    notes = [*fits.notes, *(note for own in fits.objectives.values() for note in own.notes)]
    if notes:
        console.print("To note:")
    for note in notes:
        console.print(f"- {note}", highlight=False, soft_wrap=True)
    console.print(f"-> {', '.join(files)}", soft_wrap=True)


def rules_table(fits: TuningFits) -> Table:
    """The optimum of every budget and shape; one that is not inside of its grid is marked."""
    printed = _titled(
        "Lowest loss over rates and batches (budgets by 6ND; intervals at 95 %)",
        *("objective", "budget ", "shape", "rate", "", "batch", "", "loss"),
    )
    for name, rules in fits.objectives.items():
        for own in rules.optima:
            rate, batch = own.lr, own.batch
            batches = Estimate(*(value / fits.sequence_length for value in (batch.value, batch.low, batch.high)))
            printed.add_row(
                *(name, _flops(own.flops), _short_shape(own.shape), f"{rate.value:.2g}{'' if own.inside else EDGE}"),
                f"({_short(rate)})",
                f"{batches.value:.3g}",
                f"({_short(batches)})" if own.batch_varied else "",
                f"{own.loss.value:.3f}",
            )
        printed.add_section()
    marked = any(not own.inside for rules in fits.objectives.values() for own in rules.optima)
    return _captioned(printed, f"batches in sequences{f'; {EDGE} not inside of the grid' if marked else ''}")


def law_lines(fits: TuningFits) -> list[str]:
    """The laws in words, with the intervals of value and exponent."""
    lines = []
    for name, rules in fits.objectives.items():
        laws = (("rate", "C", rules.lr_law, 1), ("batch", "D", rules.batch_law, fits.sequence_length))
        for what, symbol, law, unit in laws:
            if law is not None:
                value = Estimate(*(end / unit for end in (law.a, *law.interval_a)))
                unit_name = "" if unit == 1 else " sequences"
                lines.append(
                    f"{name}: {what} = {value.value:.3g} ({_short(value)}){unit_name} × ({symbol} / {_flops(law.c0)})^"
                    f"{law.b:.3f} ({_short(law.exponent)})"
                )
    return lines


# --- one run by noise level -------------------------------------------------------------------------------------------


def print_levels(levels: RunLevels, files: list[str]) -> None:
    """Prints the first and the last loss of each noise level, in training and in validation."""
    console = people_console()
    title = f"{levels.run}: nats per scored token by noise level, up to a step"
    console.print(title, highlight=False, soft_wrap=True)  # not that of the table, which is narrower than most names
    console.print(levels_table(levels))
    console.print(f"-> {', '.join(files)}", soft_wrap=True)


def levels_table(levels: RunLevels) -> Table:
    """The loss of each noise level in the first and the last window of each split, named by the window's last step."""
    shown = [
        (f"  {split} {own.steps[window]}", own.nats_WT[window])
        for split, own in levels.curves.items()
        for window in sorted({0, len(own.steps) - 1})
    ]
    printed = _titled("", "level", *(name for name, _ in shown))
    for n in range(NOISE_LEVELS):
        bounds = f"{n / NOISE_LEVELS:g}–{(n + 1) / NOISE_LEVELS:g}"
        printed.add_row(bounds, *(_known(nats_T[n], ".3f") for _, nats_T in shown))
    return printed


# --- numbers ---------------------------------------------------------------------------------------------------------


def _flops(value: float) -> str:
    return f"{value:.1e}".replace("e+", "e")


def _count(value: float) -> str:
    if math.isnan(value):
        return "?"
    return "∞" if math.isinf(value) else format_count(value) if value >= 1 else "0"


def _end(value: float, form: str) -> str:
    if abs(value) >= 1e4 and math.isfinite(value):
        return f"{value:.0e}".replace("e+", "e")
    return "?" if math.isnan(value) else "∞" if math.isinf(value) else format(value, form)


def _factor(value: float) -> str:
    """A multiplier with the digits that its interval leaves sense to: two below 100."""
    return _end(value, ".3g" if value >= 99.5 else ".2g")


def _short(estimate: Estimate) -> str:
    return f"{_end(estimate.low, '.3g')}–{_end(estimate.high, '.3g')}"


def _interval(estimate: Estimate, form: str) -> str:
    return f"{_end(estimate.low, form)} to {_end(estimate.high, form)}"
