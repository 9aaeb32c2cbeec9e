"""IsoFLOP curves: loss against size at each budget, with the parabola and its optimum."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from llada_lightning.scaling.fits import (
    UNIT_NAMES,
    IsoflopBudget,
    IsoflopFit,
    StudyFits,
    flops_column,
    losses,
    usable_runs,
)
from llada_lightning.scaling.fits.runs import budget_members
from llada_lightning.scaling.flops import Convention
from llada_lightning.scaling.plots.style import (
    GREY,
    INK,
    MARKERS,
    STYLES,
    StudyFigure,
    check_counted,
    dress,
    interval_bars,
    label_counts,
    label_plain,
    new_figure,
    note,
    power_of_ten,
    shades,
    side_legend,
)

_SAME_BUDGET = 1e-6


def isoflop_curves(table: pd.DataFrame, fits: StudyFits, convention: Convention = "6nd") -> StudyFigure:
    """Loss against non-embedding parameters at each budget, one panel an objective.

    A budget with enough shapes has its parabola and its optimum (a star, with N's 95 % interval). Where the optimum is
    not inside of the shapes tried, the parabola is dotted and an arrow head at the grid's edge points to it.

    Args:
        table: a results table.
        fits: its fits.
        convention: which FLOPs make a budget.

    Raises:
        UserError: the table lacks the FLOPs of this convention.
    """
    check_counted(fits, convention)
    runs = usable_runs(table)
    figure = new_figure(3.6 * len(fits.objectives) + 2.6, 4.4)
    panels = figure.subplots(1, len(fits.objectives), sharex=True, sharey=True, squeeze=False)[0]
    for panel, (objective, fit) in zip(panels, fits.objectives.items(), strict=True):
        members = runs[runs["objective"] == objective].reset_index(drop=True)
        _draw_budgets(panel, members, fit.isoflop[convention], fits, convention)
        panel.set_title(STYLES[objective].label, fontsize=11, color=INK)
        panel.set_xlabel("non-embedding parameters N", color=INK)
        dress(panel)
    panels[0].set_xscale("log")
    panels[0].set_yscale("log")
    panels[0].margins(x=0.08, y=0.06)
    low, high = panels[0].get_xlim()
    panels[0].set_xlim(low, high * (high / low) ** 0.09)  # room for the budgets' names
    panels[0].set_ylabel(f"validation loss ({UNIT_NAMES[fits.unit]})", color=INK)
    label_counts(panels[0].xaxis, panels[0].get_xlim())
    label_plain(panels[0].yaxis)
    side_legend(figure, _curves_legend(runs, fits, convention))
    return figure


def _draw_budgets(axes: Axes, runs: pd.DataFrame, fit: IsoflopFit, fits: StudyFits, convention: Convention) -> None:
    style = STYLES[str(runs["objective"].iloc[0])]
    flops = runs[flops_column(convention)].to_numpy(float)
    sizes = runs["params_nonembedding"].to_numpy(float)
    loss, stderr = losses(runs, fits.unit)
    groups = budget_members(flops)
    for number, (members, color) in enumerate(zip(groups, shades(style.color, len(groups)), strict=True)):
        axes.errorbar(
            sizes[members],
            loss[members],
            yerr=np.nan_to_num(stderr[members]),
            fmt=MARKERS[number % len(MARKERS)],
            color=color,
            markersize=4.5,
            elinewidth=1,
            zorder=3,
        )
        middle = float(np.exp(np.log(flops[members]).mean()))
        budget = next((one for one in fit.budgets if abs(one.flops / middle - 1) < _SAME_BUDGET), None)
        if budget is not None:
            _draw_parabola(axes, budget, color)
        right = members[np.argmax(sizes[members])]
        axes.annotate(
            power_of_ten(middle), (sizes[right], loss[right]), xytext=(5, 3), textcoords="offset points",
            fontsize=8, color=INK,
        )  # fmt: skip


def _draw_parabola(axes: Axes, budget: IsoflopBudget, color: Any) -> None:
    low, high = float(np.exp(budget.log_n.min())), float(np.exp(budget.log_n.max()))
    line = np.geomspace(low, high, 100)
    axes.plot(line, budget.curve(line), "-" if budget.interior else ":", color=color, linewidth=1.4, zorder=2)
    if not budget.interior:
        ends = np.array([low, high])
        edge = int(np.argmin(budget.curve(ends)))
        axes.plot(ends[edge], budget.curve(ends[edge]), marker="<>"[edge], color=INK, markersize=8, zorder=5)
        return
    optimum = budget.n_opt
    axes.errorbar(
        optimum.value,
        budget.loss_opt.value,
        xerr=interval_bars([optimum.value], [optimum.low], [optimum.high]),
        fmt="*",
        color=INK,
        markersize=8,
        markeredgecolor="white",
        markeredgewidth=0.6,
        elinewidth=1.2,
        capsize=4,
        zorder=5,
    )


def _curves_legend(runs: pd.DataFrame, fits: StudyFits, convention: Convention) -> list[list[Line2D]]:
    budgets = [budget for fit in fits.objectives.values() for budget in fit.isoflop[convention].budgets]
    handles = []
    if any(budget.interior for budget in budgets):
        handles += [
            Line2D([], [], color=GREY, linewidth=1.4, label="parabola in log N"),
            Line2D([], [], color=INK, linestyle="", marker="*", markersize=8, label="optimum, 95 %"),
        ]
    if not all(budget.interior for budget in budgets):
        label = "optimum outside\nof the shapes tried"
        handles.append(
            Line2D([], [], color=GREY, linewidth=1.4, linestyle=":", marker=">", markerfacecolor=INK,
                   markeredgecolor=INK, markersize=7, label=label)
        )  # fmt: skip
    counted = "6ND" if convention == "6nd" else "total"
    notes = [note(f"numbers: training\nFLOPs ({counted})")]
    if np.isfinite(losses(runs, fits.unit)[1]).any():
        notes.append(note("bars: ± 1 s.e."))
    if not budgets:
        notes.append(note("no budget has\nenough shapes"))
    return [handles, notes]
