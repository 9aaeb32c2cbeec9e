"""IsoFLOP curves: loss against size at each budget, with the parabola and its optimum.

The optimum of a budget, N_opt, D_opt and tokens per parameter, as the IsoFLOP and the parametric fit give it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.markers import CARETLEFT, CARETRIGHT, MarkerStyle
from matplotlib.patches import Patch

from llada_lightning.compute.flops import Convention
from llada_lightning.study.fits import (
    BUDGET_TOLERANCE,
    UNIT_NAMES,
    Estimate,
    IsoflopBudget,
    IsoflopFit,
    ObjectiveFits,
    ParametricFit,
    StudyFits,
    flops_column,
    losses,
    usable_runs,
)
from llada_lightning.study.fits.runs import budget_members
from llada_lightning.study.plots.style import (
    GREY,
    INK,
    MARKERS,
    STYLES,
    StudyFigure,
    Style,
    check_counted,
    dress,
    exponent_text,
    flops_axis,
    flops_label,
    hold_limits,
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


_TITLES = ("parameters N at the optimum", "tokens D at the optimum", "tokens per parameter D/N")


def optimum(fits: StudyFits, convention: Convention = "6nd") -> StudyFigure:
    """N_opt, D_opt and tokens per parameter against the budget, both objectives.

    IsoFLOP optima are points with 95 % intervals (those outside of the grid are left out), the lines their power laws;
    the bands with a dotted middle are the parametric frontier and its 95 %, over the budgets that it was fitted on.

    Raises:
        UserError: the table lacks the FLOPs of this convention.
    """
    check_counted(fits, convention)
    figure = new_figure(11.4, 3.6)
    panels = figure.subplots(1, 3)
    for objective, fit in fits.objectives.items():
        _draw_isoflop(panels, _interior(fit, convention), fit.isoflop[convention], STYLES[objective])
        if fit.parametric is not None and _has_frontier(fit, convention):
            _draw_frontier(panels, fit.parametric, STYLES[objective], convention)
    for panel, title in zip(panels, _TITLES, strict=True):
        panel.set_title(title, fontsize=10, color=INK)
        panel.set_yscale("log")
        flops_axis(panel)
        hold_limits(panel, np.concatenate([np.ravel(line.get_ydata()) for line in panel.get_lines()]), 10)
        label_counts(panel.yaxis, panel.get_ylim())
        dress(panel)
    figure.supxlabel(flops_label(convention), fontsize=10, color=INK)
    side_legend(figure, _legend(fits, convention))
    return figure


def has_optimum(fits: StudyFits, convention: Convention) -> bool:
    """Whether there is anything to draw: an IsoFLOP optimum inside of its grid, or a frontier over some budgets."""
    return any(_interior(fit, convention) or _has_frontier(fit, convention) for fit in fits.objectives.values())


def _interior(fit: ObjectiveFits, convention: Convention) -> list[IsoflopBudget]:
    return [budget for budget in fit.isoflop[convention].budgets if budget.interior]


def _has_frontier(fit: ObjectiveFits, convention: Convention) -> bool:
    """A frontier over the budgets fitted on is a line only where they differ, and known only where the fit is."""
    if fit.parametric is None or not fit.parametric.identified:
        return False
    low, high = fit.parametric.flops_ranges[convention]
    return high > low * BUDGET_TOLERANCE


def _draw_isoflop(panels: Sequence[Axes], budgets: list[IsoflopBudget], fit: IsoflopFit, style: Style) -> None:
    if not budgets:
        return
    flops = np.array([budget.flops for budget in budgets])
    for panel, name in zip(panels, ("n_opt", "d_opt", "tokens_per_param"), strict=True):
        estimates = [getattr(budget, name) for budget in budgets]
        values = [estimate.value for estimate in estimates]
        lows, highs = [estimate.low for estimate in estimates], [estimate.high for estimate in estimates]
        panel.errorbar(
            flops,
            values,
            yerr=interval_bars(values, lows, highs),
            fmt=style.marker,
            color=style.color,
            markerfacecolor=style.face,
            markersize=5,
            elinewidth=1.1,
            capsize=3,
            zorder=4,
        )
    if fit.n_law is None or fit.d_law is None:
        return
    line = np.geomspace(flops.min(), flops.max(), 50)
    n, d = fit.n_law.value(line), fit.d_law.value(line)
    for panel, optima in zip(panels, (n, d, d / n), strict=True):
        panel.plot(line, optima, style.line, color=style.color, linewidth=1.6, zorder=3)


def _draw_frontier(panels: Sequence[Axes], fit: ParametricFit, style: Style, convention: Convention) -> None:
    flops = np.geomspace(*fit.flops_ranges[convention], 50)
    frontier = fit.frontier(convention, flops)
    bands = [
        (frontier.n_opt, frontier.n_low, frontier.n_high),
        (frontier.d_opt, frontier.d_low, frontier.d_high),
        # At given FLOPs more parameters are fewer tokens: the ends of N and D belong together crosswise.
        (frontier.d_opt / frontier.n_opt, frontier.d_low / frontier.n_high, frontier.d_high / frontier.n_low),
    ]
    for panel, (middle, low, high) in zip(panels, bands, strict=True):
        panel.plot(flops, middle, ":", color=style.color, linewidth=1.6, zorder=2)
        panel.fill_between(flops, low, high, color=style.color, alpha=0.16, linewidth=0, zorder=1)


def _legend(fits: StudyFits, convention: Convention) -> list[list[Artist]]:
    groups: list[list[Artist]] = []
    for objective, fit in fits.objectives.items():
        fitted = fit.isoflop[convention]
        texts = [
            exponent_text(symbol, law.exponent)
            for symbol, law in (("N", fitted.n_law), ("D", fitted.d_law))
            if law is not None
        ]
        style = STYLES[objective]
        marker = style.marker if _interior(fit, convention) else ""
        groups.append([style.handle("\n".join([objective, *texts]), marker=marker)])
    members = fits.objectives.values()
    isoflop = any(_interior(fit, convention) for fit in members)
    frontier = any(_has_frontier(fit, convention) for fit in members)
    middle = Line2D([], [], color=GREY, linestyle=":", linewidth=1.6, label="parametric frontier")
    band = Patch(color=GREY, alpha=0.3, linewidth=0, label="its 95 %")
    laws = any(fit.isoflop[convention].n_law is not None for fit in members)
    points = note("points, lines: IsoFLOP" if laws else "points: IsoFLOP")
    ends = note("bars and [ ]: 95 %" if laws else "bars: 95 %")
    return [*groups, [points, ends] if isoflop else [], [middle, band] if frontier else []]
