"""IsoFLOP curves: loss against size at each budget, with the parabola and its optimum."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.markers import CARETLEFT, CARETRIGHT, MarkerStyle

from llada_lightning.scaling.fits import (
    UNIT_NAMES,
    Estimate,
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
    label_counts,
    label_plain,
    new_figure,
    note,
    power_of_ten,
    shades,
    side_legend,
)

_SAME_BUDGET = 1e-6

_NAME = (48, 11)
"""Room for a budget's name, points."""


def isoflop_curves(table: pd.DataFrame, fits: StudyFits, convention: Convention = "6nd") -> StudyFigure:
    """Loss against non-embedding parameters at each budget, one panel an objective.

    A budget with enough shapes has its parabola and its optimum (a star, with N's 95 % interval, of which an open end
    is a caret at the grid's edge). Where the optimum is not inside of the shapes tried, the parabola is dotted and an
    arrow head at the grid's edge points to it.

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
    names = []
    for panel, (objective, fit) in zip(panels, fits.objectives.items(), strict=True):
        members = runs[runs["objective"] == objective].reset_index(drop=True)
        names.append(_draw_budgets(panel, members, fit.isoflop[convention], fits, convention))
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
    for panel, own in zip(panels, names, strict=True):
        _name_budgets(panel, own)
    side_legend(figure, _curves_legend(runs, fits, convention))
    return figure


def _draw_budgets(
    axes: Axes, runs: pd.DataFrame, fit: IsoflopFit, fits: StudyFits, convention: Convention
) -> list[tuple[str, float, float]]:
    """Returns: the budgets' names and where their last points stand."""
    style = STYLES[str(runs["objective"].iloc[0])]
    flops = runs[flops_column(convention)].to_numpy(float)
    sizes = runs["params_nonembedding"].to_numpy(float)
    loss, stderr = losses(runs, fits.unit)
    groups, names = budget_members(flops), []
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
        names.append((power_of_ten(middle), float(sizes[right]), float(loss[right])))
    return names


def _name_budgets(axes: Axes, names: list[tuple[str, float, float]]) -> None:
    """Each name right of its point, lower where it would stand on another; the axes' limits are final by now."""
    taken: list[npt.NDArray[np.float64]] = []
    for name, size, loss in sorted(names, key=lambda one: -one[2]):
        point = axes.transData.transform((size, loss)) * 72 / axes.figure.dpi
        place = point + np.array([5.0, 3.0])
        for other in sorted(taken, key=lambda one: -one[1]):
            if abs(place[0] - other[0]) < _NAME[0] and abs(place[1] - other[1]) < _NAME[1]:
                place[1] = other[1] - _NAME[1]
        taken.append(place)
        offset = tuple(place - point)
        axes.annotate(name, (size, loss), xytext=offset, textcoords="offset points", fontsize=8, color=INK)


def _draw_parabola(axes: Axes, budget: IsoflopBudget, color: Any) -> None:
    low, high = float(np.exp(budget.log_n.min())), float(np.exp(budget.log_n.max()))
    line = np.geomspace(low, high, 100)
    axes.plot(line, budget.curve(line), "-" if budget.interior else ":", color=color, linewidth=1.4, zorder=2)
    if not budget.interior:
        ends = np.array([low, high])
        outer = int(np.argmin(budget.curve(ends)))
        axes.plot(ends[outer], budget.curve(ends[outer]), marker="<>"[outer], color=INK, markersize=8, zorder=5)
        return
    optimum, loss = budget.n_opt, budget.loss_opt.value
    if optimum.interval != "unknown":
        _draw_interval(axes, optimum, loss, (low, high))
    axes.plot(optimum.value, loss, "*", color=INK, markersize=8, markeredgecolor="white", markeredgewidth=0.6, zorder=5)


def _draw_interval(axes: Axes, size: Estimate, loss: float, grid: tuple[float, float]) -> None:
    for end, edge, caret in zip((size.low, size.high), grid, (CARETLEFT, CARETRIGHT), strict=True):
        known = 0 < end < np.inf
        reach = [size.value, end if known else edge]
        marker: Any = "|" if known else caret
        axes.plot(reach, [loss, loss], color=INK, linewidth=1.2, marker=marker, markevery=[1], markersize=7, zorder=4)


def _curves_legend(runs: pd.DataFrame, fits: StudyFits, convention: Convention) -> list[list[Line2D]]:
    budgets = [budget for fit in fits.objectives.values() for budget in fit.isoflop[convention].budgets]
    handles = []
    if any(budget.interior for budget in budgets):
        handles += [
            Line2D([], [], color=GREY, linewidth=1.4, label="parabola in log N"),
            Line2D([], [], color=INK, linestyle="", marker="*", markersize=8, label="optimum, 95 %"),
        ]
    if any(budget.interior and budget.n_opt.interval == "open" for budget in budgets):
        label = "interval with\nan open end"
        handles.append(
            Line2D([], [], color=INK, linewidth=1.2, marker=MarkerStyle(CARETRIGHT), markersize=7, label=label)
        )
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
