"""The tables and notes of a study's runs and fits, 80 columns wide."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from rich.box import SIMPLE_HEAD
from rich.table import Table

from llada_lightning.compute.flops import CONVENTION_NAMES, Convention
from llada_lightning.compute.rules import significant
from llada_lightning.compute.shapes import format_count
from llada_lightning.study.fits import (
    METHODS,
    NO_COMMON_LOSS,
    NOISE_MODELS,
    UNIT_NAMES,
    Disagreement,
    Estimate,
    IsoflopBudget,
    Method,
    Multiplier,
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
from llada_lightning.study.forecast import Scored
from llada_lightning.study.names import renamed, short_names, variant_settings, with_short_names
from llada_lightning.study.tables.style import (
    captioned,
    count_text,
    factor_text,
    flops_text,
    interval_short,
    interval_text,
    known,
    short_shape,
    titled,
    with_short_powers,
)
from llada_lightning.support.printing import people_console

DOUBT = "†"
DOUBT_MEANS = f"{DOUBT} do not rely on it: a fit is rejected, or fails its held-out test"
BEYOND_MEANS = "* beyond the budgets of one of the fits, by at most a decade; held-out tests passed"

MEAN_LOSS = "the mean over the runs of the best shape, less the luck of the best"
BEST_RUN = f"best: the best single run of a budget; fits and multipliers take {MEAN_LOSS}"

MOST_RUNS = 40
"""A table of more runs shows the best of each budget only."""


def print_study(
    table: pd.DataFrame,
    fits: StudyFits,
    convention: Convention,
    files: list[str],
    forecasts: Sequence[Scored] = (),
    unfinished: str | None = None,
) -> None:
    """Prints the runs, then their fits by one convention, and forecasts beside what was measured since.

    Variants have their short names, and their settings in full below the tables. The answer begins with ``unfinished``,
    a sentence on how much is missing.
    """
    console, variants = people_console(), variant_settings(table)
    forecasts = renamed(list(forecasts), short_names(fits.objectives))
    table, fits = with_short_names(table, fits)
    if fits.yardstick is not None:
        console.print(f"Yardstick: {fits.yardstick}, the exact loss under this decoding policy\n", highlight=False)
    multipliers = [
        multiplier_table(fits, convention, name, own_budgets=own) for name in fits.compared for own in (False, True)
    ]
    laws = (optima_table(fits, convention), parameters_table(fits, convention))
    scored = [forecast_table(forecasts)] if forecasts else []
    tables = (runs_table(table, convention), *laws, *multipliers, held_out_table(fits, convention), *scored)
    for printed in tables:
        if printed.row_count:
            console.print(printed)
            console.print()
    for name, settings in variants.items():
        console.print(f"{name}: {settings}\n", highlight=False, soft_wrap=True)
    console.print(f"Intervals are at 95 %; errors: {NOISE_MODELS[fits.noise_model]}.\n", highlight=False)
    if unfinished is not None:
        console.print(f"{unfinished}\n", highlight=False)
    for line in headline_lines(fits, convention):
        console.print(line, highlight=False)
    flags = flag_lines(fits, convention)
    if flags:
        console.print("To note:")
    for flag in flags:
        console.print(f"- {flag}", highlight=False, soft_wrap=True)
    console.print(f"-> {', '.join(files)}", soft_wrap=True)


def flag_lines(fits: StudyFits, convention: Convention) -> list[str]:
    """What a reader of fits by a convention has to know, that there is no common loss first."""
    flags = [*judged_lines(fits, convention), *notes_by(fits, convention)]
    return sorted(flags, key=lambda flag: not flag.startswith(NO_COMMON_LOSS))


def notes_by(fits: StudyFits, convention: Convention) -> list[str]:
    """The notes of the fits, without those on isoFLOP fits and envelopes by other conventions than the one shown."""
    hidden = [
        f", {method}, {other}: "
        for method in ("isoflop", "envelope")
        for other in fits.conventions
        if other != convention
    ]
    return [with_short_powers(note) for note in fits.notes if not any(part in note for part in hidden)]


def judged_lines(fits: StudyFits, convention: Convention) -> list[str]:
    """Which multipliers by a convention are doubted, not shown, or differ by method, and why."""
    apart = [_disagreement(own) for own in fits.disagreements if own.convention == convention]
    return [*doubt_lines(fits, convention), *withheld_lines(fits, convention), *apart]


# --- runs ------------------------------------------------------------------------------------------------------------


def runs_table(table: pd.DataFrame, convention: Convention = "6nd", whole: bool = False) -> Table:
    """The usable runs, the best of each objective's budgets marked; of more than 40 runs only those best ones.

    The ``whole`` table is too wide for a terminal: it has all runs, with their settings and names.
    """
    runs = usable_runs(table)
    short = len(runs) > MOST_RUNS and not whole
    shown = f", the best of each budget ({len(runs)} runs)" if short else ""
    title = f"Budgets in training FLOPs ({CONVENTION_NAMES[convention]}){shown}"
    printed = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 0), show_edge=False)
    for name in ("objective", "shape"):
        printed.add_column(name, overflow="fold")
    for name in ("budget", "N", "tokens", "loss ± s.e.", "kind", "bits/byte", "tokens/s", "best"):
        printed.add_column(name, justify="left" if name in ("kind", "best") else "right", no_wrap=True)
    for name in ("steps", "batch", "rate", "seed", "run") if whole else ():
        printed.add_column(name, justify="left" if name == "run" else "right")
    for objective in objective_names(runs):
        members = runs[runs["objective"] == objective]
        # The FLOPs themselves differ within a budget by a part of a step.
        members = members.assign(_budget=budget_groups(planned_flops(members)))
        members = members.sort_values(["_budget", "params_nonembedding"], ignore_index=True)
        best = set(best_of_budgets(members, "nats_per_token"))
        for row in range(len(members)):
            if row in best or not short:
                own = members.iloc[row]
                mark = "best" if row in best else ""
                printed.add_row(*_run_row(own, convention), mark, *(_run_settings(own) if whole else ()))
        printed.add_section()
    return captioned(printed, BEST_RUN if runs.duplicated(["objective", "params_nonembedding", "tokens"]).any() else "")


def _run_row(run: Any, convention: Convention) -> list[str]:
    loss, stderr = (values[0] for values in losses(run.to_frame().T, "nats_per_token"))
    return [
        run["objective"],
        short_shape(str(run["shape"])),
        flops_text(run[flops_column(convention)]),
        format_count(run["params_nonembedding"]),
        format_count(run["tokens"]),
        f"{loss:.3f} ± {stderr:.3f}" if math.isfinite(stderr) else f"{loss:.3f}",
        run["val_kind"],
        known(run["val_bits_per_byte"], ".3f"),
        known(run["tokens_per_second"], ",.0f"),
    ]


def _run_settings(run: Any) -> list[str]:
    batch = run["global_batch_tokens"] / run["sequence_length"]
    numbers = (run["steps"], batch, run["lr"], run["seed"])
    texts = (
        "" if pd.isna(value) else f"{value:{form}}" for value, form in zip(numbers, ("d", "g", "g", "d"), strict=True)
    )
    return [*texts, "" if pd.isna(run["run"]) else str(run["run"])]


# --- fits ------------------------------------------------------------------------------------------------------------


def optima_table(fits: StudyFits, convention: Convention) -> Table:
    """N_opt, D_opt, tokens per parameter and loss at each budget, by its isoFLOP parabola."""
    printed = titled(
        f"Optimum by isoFLOP ({CONVENTION_NAMES[convention]}; loss in {UNIT_NAMES[fits.unit]})",
        *("objective", "budget ", "N", "", "tokens", "tokens/N", "", "loss"),
    )
    for objective, own in fits.objectives.items():
        for budget in own.isoflop[convention].budgets:
            printed.add_row(objective, *_optimum_row(budget))
        printed.add_section()
    budgets = [budget for own in fits.objectives.values() for budget in own.isoflop[convention].budgets]
    return captioned(printed, "; ".join(dict.fromkeys(_FLAGS[flag] for flag in map(_flag, budgets) if flag)))


_FLAGS = {"!": "! optimum outside of the grid", "~": "~ moved by the grid beyond its interval"}


def _flag(budget: IsoflopBudget) -> str:
    return "!" if not budget.interior else "~" if budget.bias is not None else ""


def _optimum_row(budget: IsoflopBudget) -> list[str]:
    if not budget.interior:
        smallest, largest = np.exp(budget.log_n.min()), np.exp(budget.log_n.max())
        side = f"< {format_count(smallest)}" if budget.n_opt.value < smallest else f"> {format_count(largest)}"
        return [flops_text(budget.flops) + _flag(budget), side]
    return [
        flops_text(budget.flops) + (_flag(budget) or " "),
        format_count(budget.n_opt.value),
        f" ({count_text(budget.n_opt.low)}–{count_text(budget.n_opt.high)})",
        format_count(budget.d_opt.value),
        f"{budget.tokens_per_param.value:.3g}",
        f" ({interval_short(budget.tokens_per_param)})",
        f"{budget.loss_opt.value:.3f}",
    ]


def parameters_table(fits: StudyFits, convention: Convention) -> Table:
    """Exponents and parameters of every law, with intervals."""
    printed = titled("Laws", "objective", "quantity", "method", "value", "95 % interval", left=3)
    for objective, own in fits.objectives.items():
        for quantity, method, estimate in _parameters(own, convention):
            printed.add_row(objective, quantity, method, f"{estimate.value:.4g}", interval_text(estimate, ".4g"))
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


def multiplier_table(fits: StudyFits, convention: Convention, objective: str, *, own_budgets: bool = False) -> Table:
    """The compute multiplier of an objective at each of the reference's budgets, or at its own, a column a method."""
    entries = _shown(fits, convention, [objective], own_budgets)
    methods = _methods(entries)
    budget, where = ("its budget", f", at {objective}'s budgets") if own_budgets else (f"{fits.reference}'s budget", "")
    printed = titled(
        f"Compute multiplier at equal loss, {objective} over {fits.reference} ({CONVENTION_NAMES[convention]}){where}",
        *(budget, *methods),
    )
    for flops, cells in _multipliers(entries, methods, own_budgets):
        printed.add_row(flops_text(flops), *cells)
    kinds = f"the losses that are held equal: {fits.kind(objective)} against {fits.kind(fits.reference)}"
    return captioned(printed, "\n".join([kinds, *_legend(entries)]))


def multipliers_table(fits: StudyFits, convention: Convention, *, own_budgets: bool = False) -> Table:
    """As ``multiplier_table``, of all objectives, with the loss that is held equal."""
    entries = _shown(fits, convention, fits.compared, own_budgets)
    methods = _methods(entries)
    budget, where = (
        ("its budget", ", at each objective's budgets") if own_budgets else (f"{fits.reference}'s budget", "")
    )
    title = f"Compute multiplier over {fits.reference} at equal loss ({CONVENTION_NAMES[convention]}){where}"
    printed = titled(title, "objective", budget, f"its loss ({UNIT_NAMES[fits.unit]})", *methods)
    kinds: dict[str, list[str]] = {}
    for objective in dict.fromkeys(entry.objective for entry in entries):
        kinds.setdefault(fits.kind(objective), []).append(objective)
        own = [entry for entry in entries if entry.objective == objective]
        for flops, cells in _multipliers(own, methods, own_budgets):
            held = fits.best_loss(objective if own_budgets else fits.reference, convention, flops)
            printed.add_row(objective, flops_text(flops), known(held, ".3f"), *cells)
        printed.add_section()
    legend = []
    for kind, names in kinds.items():
        whose = ", ".join(names) if len(names) <= 3 else f"{len(names)} objectives"
        other = f"{fits.kind(fits.reference)} ({fits.reference})"
        legend.append(f"the losses that are held equal: {kind} ({whose}) against {other}")
    reached = "the objective's" if own_budgets else f"{fits.reference}'s"
    legend.append(f"its loss: read off {reached} best losses, each {MEAN_LOSS}")
    return captioned(printed, "\n".join([*legend, *_legend(entries)]))


def _shown(fits: StudyFits, convention: Convention, objectives: Sequence[str], own_budgets: bool) -> list[Multiplier]:
    return [
        entry
        for entry in (fits.multiplier_at_own_budgets if own_budgets else fits.compute_multiplier)
        if entry.objective in objectives and entry.convention == convention and entry.shown
    ]


def _methods(entries: Sequence[Multiplier]) -> list[Method]:
    return [method for method in METHODS if any(entry.method == method for entry in entries)]


def _multipliers(
    entries: Sequence[Multiplier], methods: Sequence[Method], own_budgets: bool
) -> Iterable[tuple[float, list[str]]]:
    """The multipliers of one objective: for each budget of the reference, or of its own, a cell for each method."""
    budgets = [_budget(entry, own_budgets) for entry in entries]
    for flops in sorted(set(budgets)):
        cells = dict.fromkeys(methods, "")
        for entry, budget in zip(entries, budgets, strict=True):
            if budget == flops:
                marks = DOUBT * (not entry.trusted) + "*" * entry.extrapolated
                ends = f"{factor_text(entry.low)}–{factor_text(entry.high)}"
                cells[entry.method] = f"{factor_text(entry.multiplier)}{marks:1}({ends})"
        yield flops, list(cells.values())


def _budget(entry: Multiplier, own: bool) -> float:
    """The budget at which a multiplier is read, the same by all methods."""
    return significant(entry.objective_flops, 9) if own else entry.reference_flops


def _legend(entries: Sequence[Multiplier]) -> list[str]:
    """What the marks of multipliers mean, as far as there are any."""
    doubted = any(not entry.trusted for entry in entries)
    return [DOUBT_MEANS] * doubted + [BEYOND_MEANS] * any(entry.extrapolated for entry in entries)


def headline_lines(fits: StudyFits, convention: Convention) -> list[str]:
    """What several objectives say beside each other, and the headline of each pair, in words."""
    return [f"{with_short_powers(words)}\n" for words in fits.answers(convention)]


def withheld_lines(fits: StudyFits, convention: Convention) -> list[str]:
    """Which multipliers are not shown, at which budgets and why: a line for each objective and reason."""
    found = []
    for entries, own_budgets in ((fits.compute_multiplier, False), (fits.multiplier_at_own_budgets, True)):
        reasons: dict[tuple[str, str], dict[str, list[str]]] = {}
        for entry in entries:
            if entry.convention == convention and entry.withheld:
                budgets = reasons.setdefault((entry.objective, entry.withheld), {}).setdefault(entry.method, [])
                budgets.append(flops_text(_budget(entry, own_budgets)))
        for (objective, reason), methods in reasons.items():
            where = "; ".join(f"{method} at {', '.join(budgets)}" for method, budgets in methods.items())
            whose = f" at {objective}'s budgets" if own_budgets else ""
            remedy = " (more budgets around them, or seeds, narrow it)" if reason == OPEN else ""
            found.append(f"compute multiplier of {objective}{whose} not shown, {where}: {reason}{remedy}")
    return found


def doubt_lines(fits: StudyFits, convention: Convention) -> list[str]:
    """Why the multipliers of an objective and method are marked, a line for each."""
    doubts = {
        (entry.objective, entry.method): entry.doubt
        for entry in [*fits.multiplier_at_own_budgets, *fits.compute_multiplier]
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
    printed = titled(
        "The largest budget, predicted by fits without it",
        *("objective", "method", "budget", "observed", "predicted", "95 % interval", "error", "inside"),
        left=2,
    )
    for entry in fits.held_out:
        if entry.convention == convention:
            told = entry.inside is not None
            printed.add_row(
                *(entry.objective, entry.method, flops_text(entry.flops), f"{entry.observed:.3f}"),
                f"{entry.predicted:.3f}" if told else "?",
                interval_text(Estimate(entry.predicted, entry.low, entry.high), ".3f"),
                f"{entry.relative_error:+.1%}" if told else "",
                _INSIDE[entry.inside],
            )
    unknown = any(entry.inside is None for entry in fits.held_out if entry.convention == convention)
    return captioned(printed, "?: the interval is too wide to tell anything" if unknown else "")


def forecast_table(forecasts: Iterable[Scored]) -> Table:
    """Forecasts, each with the loss that was measured since, if it was."""
    printed = titled(
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
        numbers = (flops_text(own.flops), f"{own.loss:.3f}{mark}", interval_text(own.estimate, ".3f"))
        printed.add_row(own.objective, own.method, *numbers, *seen)
    return captioned(printed, f"{DOUBT} the method had not passed a held-out test when it was made")


def _disagreement(entry: Disagreement) -> str:
    at = "" if entry.flops is None else f" of {entry.objective} at {entry.reference}'s {flops_text(entry.flops)} FLOPs"
    sides = (
        f"{method} {value:.3g} ({interval_short(Estimate(value, *ends))})"
        for method, value, ends in zip(entry.methods, entry.values, entry.intervals, strict=True)
    )
    return f"{entry.quantity}{at}, {entry.convention}: methods disagree, {' against '.join(sides)}"
