"""Figures of tables without a fit: scores of tasks, the paper's Figure 3, a planned study, the parts of a step."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from llada_lightning.compute.flops import CONVENTION_NAMES, Convention
from llada_lightning.compute.shapes import PAPER_SEQUENCE_LENGTH, PAPER_VOCAB_SIZE, format_count
from llada_lightning.study.fits.runs import flops_column, named_variants, objective_names
from llada_lightning.study.plots.style import (
    CHANCE,
    GREY,
    INK,
    StudyFigure,
    Style,
    dress,
    flops_axis,
    flops_label,
    label_counts,
    label_plain,
    label_powers,
    marker_handle,
    markers_of,
    new_figure,
    note,
    objective_styles,
    plain,
    side_legend,
)
from llada_lightning.study.reference import PAPER_TASKS, paper_scalability
from llada_lightning.support.errors import UserError

# --- task scores -----------------------------------------------------------------------------------------------------

PAPER_CHANCE = {"mmlu": 25.0, "cmmlu": 25.0, "arc_c": 25.0, "piqa": 50.0}
"""Percent that guessing gets: four choices a question (nearly always in ARC-C), two in PIQA."""

_PREFIX, _STDERR = "task_", "_stderr"


def task_names(table: pd.DataFrame) -> list[str]:
    """The tasks of a table: its columns ``task_<name>`` that hold a score, without their errors."""
    names = [column.removeprefix(_PREFIX) for column in table.columns if column.startswith(_PREFIX)]
    return [name for name in names if not name.endswith(_STDERR) and table[_PREFIX + name].notna().any()]


def task_accuracy(
    table: pd.DataFrame,
    convention: Convention = "6nd",
    *,
    titles: Mapping[str, str] | None = None,
    chance: Mapping[str, float] | None = None,
    remark: str = "",
) -> StudyFigure:
    """Scores against training FLOPs, one panel a task; a line joins the budgets of one objective and size.

    Args:
        table: A table with ``objective``, ``params_nonembedding``, FLOPs, and ``task_<name>`` in percent, optionally
            ``task_<name>_stderr`` (one standard error, drawn as a bar). Rows without a score are left out.
        convention: The convention by which the x axis counts FLOPs.
        titles: The titles of the panels by task; the task's name where there is none.
        chance: The percentage that guessing gets, by task.
        remark: A sentence below the panels.

    Raises:
        UserError: The table has no scores, or lacks the FLOPs of this convention.
    """
    table = named_variants(table)
    names = task_names(table)
    styles = objective_styles(objective_names(table))
    column = flops_column(convention)
    if not names:
        raise UserError("results: no column task_<name> holds a score; add scores in percent under such names")
    if column not in table.columns or table[column].isna().all():
        raise UserError(f"results: {column} is missing, the FLOPs by {CONVENTION_NAMES[convention]}; take another")
    titles, chance = titles or {}, chance or {}
    markers = markers_of(sorted(table["params_nonembedding"].dropna().astype(float)))
    columns = min(3, len(names))
    rows = math.ceil(len(names) / columns)
    figure = new_figure(2.9 * columns + 2.2, 2.5 * rows + 0.6)
    panels = figure.subplots(rows, columns, sharex=True, squeeze=False).flatten()
    for panel, name in zip(panels, names, strict=False):
        _draw_task(panel, table, name, convention, markers, styles)
        if name in chance:
            panel.axhline(chance[name], color=CHANCE.color, linewidth=1, linestyle=CHANCE.line, zorder=1)
        panel.set_title(titles.get(name, plain(name)), fontsize=11, color=INK)
        flops_axis(panel)
        label_plain(panel.yaxis, 6)
        dress(panel)
    for panel in panels[len(names) :]:
        panel.set_visible(False)
    figure.supylabel("score (%)", fontsize=10, color=INK)
    label = flops_label(convention)
    figure.supxlabel(f"{label}\n{remark}" if remark else label, fontsize=10, color=INK)
    errors = any(f"{_PREFIX}{name}{_STDERR}" in table.columns for name in names)
    guesses = [CHANCE.handle()] if set(names) & set(chance) else []
    side_legend(figure, [
        [style.handle(plain(name), marker="o") for name, style in styles.items()],
        [note("N, non-embedding"), *(marker_handle(marker, format_count(size)) for size, marker in markers.items())],
        [*guesses, *([note("bars: ± 1 s.e.")] if errors else [])],
    ])  # fmt: skip
    return figure


def _draw_task(
    axes: Axes,
    table: pd.DataFrame,
    name: str,
    convention: Convention,
    markers: dict[float, str],
    styles: Mapping[str, Style],
) -> None:
    scored = table[table[_PREFIX + name].notna()].sort_values(flops_column(convention))
    for (objective, size), members in scored.groupby(["objective", "params_nonembedding"], observed=True):
        style = styles[str(objective)]
        error = members.get(f"{_PREFIX}{name}{_STDERR}")
        axes.errorbar(
            members[flops_column(convention)].to_numpy(float),
            members[_PREFIX + name].to_numpy(float),
            yerr=None if error is None else np.nan_to_num(error.to_numpy(float, na_value=np.nan)),
            linestyle=style.line,
            marker=markers[float(size)],  # type: ignore[arg-type]
            color=style.color,
            markerfacecolor=style.face,
            markersize=4.5,
            linewidth=1.1,
            capsize=3,
            zorder=3,
        )


def paper_figure3(convention: Convention = "6nd", own: pd.DataFrame | None = None) -> StudyFigure:
    """Figure 3 of the paper from its Tables 18 and 19: six tasks against training FLOPs.

    Args:
        convention: The convention by which the x axis counts FLOPs.
        own: A table with scores of the same tasks, whose points are drawn, too; those of the paper are then named so.
            Results with and without a decay are joined. Other variants of an objective have lines of their own.

    The paper counts 6ND. The total needs what it does not say; see ``paper_scalability``, and the remark in the figure.
    Above 1B the two objectives differ in size: 5.8b for the ARM, 6.98b for LLaDA.
    """
    remark = (
        f"attention and head at length {PAPER_SEQUENCE_LENGTH} and {PAPER_VOCAB_SIZE:,} vocabulary entries, "
        "logits at every position (assumed)"
    )
    table = paper_scalability()
    if own is not None:
        table = pd.concat([table.assign(variant="paper"), _as_in_the_paper(own)])
    return task_accuracy(
        table,
        convention,
        titles=PAPER_TASKS,
        chance=PAPER_CHANCE,
        remark="" if convention == "6nd" else remark,
    )


def _as_in_the_paper(own: pd.DataFrame) -> pd.DataFrame:
    """A table without the variants that are one objective at one size, as the paper's own models are."""
    variants = own["variant"].fillna("") if "variant" in own else pd.Series("", own.index)
    decayed = variants.str.replace(r"(^|;)decay_steps=0(?=;|$)", "", regex=True).str.removeprefix(";")
    several = decayed.groupby([own["objective"], own["params_nonembedding"]], observed=True).nunique().max() > 1
    return own.assign(variant=decayed if several else "")


# --- a plan ----------------------------------------------------------------------------------------------------------

_DODGE = 1.06
"""The factor between objectives of one size, which are set side by side."""


def plan_grid(table: pd.DataFrame) -> StudyFigure:
    """Sizes and tokens per parameter of ``Plan.table()`` against its budgets; a line joins the budgets of a trunk."""
    figure = new_figure(9.0, 3.6)
    panels = figure.subplots(1, 2)
    styles = objective_styles(objective_names(table))
    dodges = {name: _DODGE ** (number - (len(styles) - 1) / 2) for number, name in enumerate(styles)}
    for panel, column in zip(panels, ("params_nonembedding", "tokens_per_param"), strict=True):
        for (objective, _), members in table.sort_values("budget").groupby(["objective", "trunk"], observed=True):
            style = styles[str(objective)]
            panel.plot(
                members["budget"] * dodges[str(objective)],
                members[column],
                style.line,
                marker=style.marker,
                color=style.color,
                markerfacecolor=style.face,
                markersize=5,
                linewidth=0.8,
            )
        panel.set_xscale("log")
        panel.set_yscale("log")
        panel.margins(x=0.1)
        label_powers(panel.xaxis, panel.get_xlim())
        label_counts(panel.yaxis, panel.get_ylim())
        dress(panel)
    panels[0].set_title("non-embedding parameters N", fontsize=10, color=INK)
    panels[1].set_title("tokens per parameter D/N", fontsize=10, color=INK)
    figure.supxlabel("budget (training FLOPs)", fontsize=10, color=INK)
    handles = [style.handle(name, marker=style.marker) for name, style in styles.items()]
    side_legend(figure, [handles, [note("a line: one trunk")] if table["trunk"].duplicated().any() else []])
    return figure


# --- a step ----------------------------------------------------------------------------------------------------------

_COLORS = ("#F0E442", "#CC79A7", "#56B4E9", "#E69F00", "#009E73", "#D55E00", GREY)
"""Okabe and Ito's, none used twice."""
_NAMED_FROM = 0.05
"""The smallest share of the step whose percentage is written on its bar."""


def step_phases(milliseconds: Mapping[str, float], labels: Mapping[str, str]) -> StudyFigure:
    """One bar: a step, each of its phases as long as it takes, in the order of ``milliseconds``."""
    figure = new_figure(8.0, 1.9)
    axes = figure.subplots()
    step, left = sum(milliseconds.values()), 0.0
    for (name, length), color in zip(milliseconds.items(), _COLORS, strict=True):
        label = f"{labels[name]}: {length:.3g} ms"
        axes.barh(0, length, left=left, color=color, edgecolor="white", linewidth=0.8, label=label)
        if length >= _NAMED_FROM * step:
            axes.text(left + length / 2, 0, f"{length / step:.0%}", ha="center", va="center", fontsize=9, color=INK)
        left += length
    axes.set_xlim(0, step)
    axes.set_yticks([])
    axes.set_xlabel("milliseconds of a step", fontsize=10, color=INK)
    axes.spines[["left", "right", "top"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=8, labelcolor=INK)
    return figure
