"""Figures of measured losses: against training FLOPs, against size at equal FLOPs, and against the parametric law."""

from __future__ import annotations

from collections.abc import Sized
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.markers import CARETLEFT, CARETRIGHT, MarkerStyle

from llada_lightning.compute.flops import Convention
from llada_lightning.study.fits import (
    UNIT_NAMES,
    EnvelopeFit,
    Estimate,
    IsoflopBudget,
    IsoflopFit,
    ParametricFit,
    StudyFits,
    Unit,
    best_of_budgets,
    budget_members,
    flops_column,
    losses,
    planned_flops,
    usable_runs,
)
from llada_lightning.study.fits.runs import base_objective
from llada_lightning.study.fits.uncertainty import Array
from llada_lightning.study.plots.style import (
    GREY,
    INK,
    MARKERS,
    StudyFigure,
    Style,
    broken,
    dress,
    exponent_text,
    flops_axis,
    flops_label,
    hold_limits,
    label_counts,
    label_plain,
    loss_label,
    marker_handle,
    markers_of,
    new_figure,
    note,
    objective_styles,
    plain,
    power_of_ten,
    shades,
    side_legend,
)
from llada_lightning.support.errors import UserError

_MOST_SHAPES = 8
"""With more shapes than this, a marker tells the objective instead: nobody reads so many."""
_RATIO_TOLERANCE = 1e-3


def scaling_curve(table: pd.DataFrame, fits: StudyFits, convention: Convention = "6nd") -> StudyFigure:
    """Validation loss against training FLOPs: every finished run of a table, and each objective's envelope.

    A run is a point with ± 1 standard error, its marker the shape, or the objective where shapes are many or an
    objective has variants, filled where it is the best of its budget. The
    line is the power law of the envelope with its 95 % band, or joins the envelope where there is no fit.

    Raises:
        UserError: The table lacks the FLOPs of this convention.
    """
    fits.check_counted(convention)
    runs = usable_runs(table)
    shapes = markers_of(runs.sort_values("params_nonembedding")["shape"])
    figure = new_figure(8.2, 4.6)
    axes = figure.subplots()
    styles = objective_styles(fits.objectives, fits.yardstick)
    for objective, fit in fits.envelopes(convention).items():
        style, members = styles[objective], runs[runs["objective"] == objective]
        markers = dict.fromkeys(shapes, style.marker) if _by_objective(shapes, fits) else shapes
        _draw_envelope(axes, fit, style)
        _draw_runs(axes, members, convention, fits.unit, style, markers)
    axes.set_yscale("log")  # a power law is a straight line
    axes.margins(x=0.06, y=0.08)
    drawn = losses(runs, fits.unit)[0]
    hold_limits(axes, drawn, max(1.1, drawn.max() / drawn.min()))
    axes.set_ylabel(loss_label(fits.unit, fits.yardstick), color=INK)
    axes.set_xlabel(flops_label(convention), color=INK)
    flops_axis(axes)
    label_plain(axes.yaxis)
    dress(axes)
    if fits.unit == "nats_per_token":
        _add_bits_per_byte(axes, runs)
    side_legend(figure, _scaling_legend(runs, fits, convention, shapes))
    return figure


def _by_objective(shapes: Sized, fits: StudyFits) -> bool:
    """Whether markers tell objectives apart, not shapes: variants of an objective have but shades of one colour."""
    return len(shapes) > _MOST_SHAPES or len(set(map(base_objective, fits.objectives))) < len(fits.objectives)


def _draw_runs(
    axes: Axes, runs: pd.DataFrame, convention: Convention, unit: Unit, style: Style, markers: dict[str, str]
) -> None:
    best = set(best_of_budgets(runs, unit))
    flops = runs[flops_column(convention)].to_numpy(float)
    loss, stderr = losses(runs, unit)
    for row, shape in enumerate(runs["shape"]):
        axes.errorbar(
            flops[row],
            loss[row],
            yerr=np.nan_to_num(stderr[row]),
            fmt=markers[shape],
            color=style.color,
            markerfacecolor=style.color if row in best else "white",
            markersize=5.5 if len(runs) <= 20 else 4.5,
            markeredgewidth=1.1,
            elinewidth=1.1,
            capsize=4 if np.isfinite(stderr[row]) else 0,  # wider than the marker, to be seen beside it
            zorder=4 if row in best else 3,
        )


def _draw_envelope(axes: Axes, fit: EnvelopeFit, style: Style) -> None:
    if fit.law is None:
        flops, loss = [point.flops for point in fit.points], [point.loss for point in fit.points]
        axes.plot(flops, loss, style.line, color=style.color, linewidth=1, alpha=0.6, zorder=2)
        return
    flops_line = np.geomspace(*fit.flops_range, 200)
    axes.plot(flops_line, fit.law.loss(flops_line), style.line, color=style.color, linewidth=1.8, zorder=2)
    axes.fill_between(flops_line, *fit.law.band(flops_line), color=style.color, alpha=0.16, linewidth=0, zorder=1)


def _add_bits_per_byte(axes: Axes, runs: pd.DataFrame) -> None:
    """A second scale on the right, where one factor converts all runs (the same data and tokenizer)."""
    ratio = (runs["val_bits_per_byte"] / runs["val_nats_per_token"]).to_numpy(float, na_value=np.nan)
    if not np.all(np.isfinite(ratio)) or np.ptp(ratio) > _RATIO_TOLERANCE * ratio.mean():
        return
    factor = float(ratio.mean())
    to_bits, to_nats = partial(np.multiply, factor), partial(np.multiply, 1 / factor)
    right = axes.secondary_yaxis("right", functions=(to_bits, to_nats))
    right.set_ylabel(UNIT_NAMES["bits_per_byte"], color=GREY)
    label_plain(right.yaxis)
    right.tick_params(which="both", color=GREY, labelcolor=GREY)
    right.spines["right"].set_color(GREY)


def _scaling_legend(
    runs: pd.DataFrame, fits: StudyFits, convention: Convention, shapes: dict[str, str]
) -> list[list[Line2D]]:
    envelopes, many = fits.envelopes(convention), _by_objective(shapes, fits)
    lines = []
    for fit, style in zip(envelopes.values(), objective_styles(envelopes, fits.yardstick).values(), strict=True):
        law = "" if fit.law is None else "\n" + exponent_text("loss", fit.law.exponent, fit.law.sign)
        lines.append(style.handle(style.label + law, marker=style.marker if many else "", face=style.color))
    shape_handles = [marker_handle(marker, plain(str(name))) for name, marker in shapes.items()]
    if many:
        shape_handles = [note(f"{len(shapes)} shapes,\nnot told apart")] if len(shapes) > 1 else []
    others = any(
        len(best_of_budgets(members, fits.unit)) < len(members)
        for _, members in runs.groupby("objective", observed=True)
    )
    kinds = [marker_handle("o", "best of its budget"), marker_handle("o", "other run", filled=False)] if others else []
    notes = _error_note(runs, fits.unit)
    if any(fit.law is not None for fit in envelopes.values()):
        notes.append(note("band and [ ]: 95 %"))
    return [lines, shape_handles, kinds, notes]


def _error_note(runs: pd.DataFrame, unit: Unit) -> list[Line2D]:
    return [note("bars: ± 1 s.e.")] if np.isfinite(losses(runs, unit)[1]).any() else []


# --- isoFLOP curves --------------------------------------------------------------------------------------------------

_SAME_BUDGET = 1e-6

_NAME = (48, 11)
"""Room for a budget's name, points."""


def isoflop_curves(table: pd.DataFrame, fits: StudyFits, convention: Convention = "6nd") -> StudyFigure:
    """Loss against non-embedding parameters at each budget, one panel an objective.

    A budget with enough shapes has its parabola and its optimum (a star, with N's 95 % interval, of which an open end
    is a caret at the grid's edge). Where the optimum is not inside of the shapes tried, the parabola is dotted and an
    arrow head at the grid's edge points to it.

    Raises:
        UserError: The table lacks the FLOPs of this convention.
    """
    fits.check_counted(convention)
    runs = usable_runs(table)
    figure = new_figure(3.6 * len(fits.objectives) + 2.6, 4.4)
    panels = figure.subplots(1, len(fits.objectives), sharex=True, sharey=True, squeeze=False)[0]
    names, styles = [], objective_styles(fits.objectives, fits.yardstick)
    for panel, (objective, fit) in zip(panels, fits.objectives.items(), strict=True):
        members = runs[runs["objective"] == objective].reset_index(drop=True)
        names.append(_draw_budgets(panel, members, fit.isoflop[convention], fits, convention, styles[objective]))
        panel.set_title(broken(styles[objective].label), fontsize=11, color=INK)
        panel.set_xlabel("non-embedding parameters N", color=INK)
        dress(panel)
    panels[0].set_xscale("log")
    panels[0].set_yscale("log")
    panels[0].margins(x=0.08, y=0.06)
    low, high = panels[0].get_xlim()
    panels[0].set_xlim(low, high * (high / low) ** 0.09)  # room for the budgets' names
    panels[0].set_ylabel(loss_label(fits.unit, fits.yardstick), color=INK)
    label_counts(panels[0].xaxis, panels[0].get_xlim())
    label_plain(panels[0].yaxis)
    for panel, own in zip(panels, names, strict=True):
        _name_budgets(panel, own)
    side_legend(figure, _curves_legend(runs, fits, convention))
    return figure


def _draw_budgets(
    axes: Axes, runs: pd.DataFrame, fit: IsoflopFit, fits: StudyFits, convention: Convention, style: Style
) -> list[tuple[str, float, float]]:
    """Returns: the budgets' names and the coordinates of their last points."""
    flops = runs[flops_column(convention)].to_numpy(float)
    sizes = runs["params_nonembedding"].to_numpy(float)
    loss, stderr = losses(runs, fits.unit)
    groups, names = budget_members(flops), []
    for number, (members, color) in enumerate(zip(groups, shades(style.color, len(groups)), strict=True)):
        values = (sizes[members], loss[members], stderr[members])
        _draw_group(axes, *values, MARKERS[number % len(MARKERS)], color, 4.5)
        middle = float(np.exp(np.log(flops[members]).mean()))
        budget = next((one for one in fit.budgets if abs(one.flops / middle - 1) < _SAME_BUDGET), None)
        if budget is not None:
            _draw_parabola(axes, budget, color)
        right = members[np.argmax(sizes[members])]
        names.append((power_of_ten(middle), float(sizes[right]), float(loss[right])))
    return names


def _draw_group(axes: Axes, x: Array, y: Array, stderr: Array, marker: str, color: Any, size: float) -> None:
    """The runs of one budget, with their standard errors where these are known."""
    error = np.nan_to_num(stderr)
    axes.errorbar(x, y, yerr=error, fmt=marker, color=color, markersize=size, elinewidth=1, zorder=3)


def _name_budgets(axes: Axes, names: list[tuple[str, float, float]]) -> None:
    """Each name right of its point, lower where it would cover another; the axes' limits are final by now."""
    taken: list[Array] = []
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
    interior = [budget for budget in budgets if budget.interior]
    handles = []
    line = partial(Line2D, [], [])
    if interior:
        handles.append(line(color=GREY, linewidth=1.4, label="parabola in log N"))
        handles.append(line(color=INK, linestyle="", marker="*", markersize=8, label="optimum, 95 %"))
    if any(budget.n_opt.interval == "open" for budget in interior):
        caret = MarkerStyle(CARETRIGHT)
        handles.append(line(color=INK, linewidth=1.2, marker=caret, markersize=7, label="interval with\nan open end"))
    if len(interior) < len(budgets):
        arrow = partial(line, marker=">", markerfacecolor=INK, markeredgecolor=INK, markersize=7)
        label = "optimum outside\nof the shapes tried"
        handles.append(arrow(color=GREY, linewidth=1.4, linestyle=":", label=label))
    counted = "6ND" if convention == "6nd" else "total"
    notes = [note(f"numbers: training\nFLOPs ({counted})"), *_error_note(runs, fits.unit)]
    if not budgets:
        notes.append(note("no budget has\nenough shapes"))
    return [handles, notes]


# --- the parametric law ----------------------------------------------------------------------------------------------


def parametric_residuals(table: pd.DataFrame, fits: StudyFits) -> StudyFigure:
    """Observed loss against the law's, in percent, over the predicted loss; one panel an objective.

    Runs of one budget share a marker and a shade: a pattern within a budget is what the law cannot follow.

    Raises:
        UserError: No objective has a parametric fit.
    """
    laws = {name: fit.parametric for name, fit in fits.objectives.items() if fit.parametric is not None}
    if not laws:
        raise UserError("figure: no parametric fit; it needs six runs or more, of three sizes and three token counts")
    runs = usable_runs(table)
    figure = new_figure(3.6 * len(laws) + 1.8, 3.9)
    panels = figure.subplots(1, len(laws), sharey=True, squeeze=False)[0]
    budgets: dict[str, str] = {}
    styles = objective_styles(fits.objectives, fits.yardstick)
    for panel, (objective, law) in zip(panels, laws.items(), strict=True):
        members = runs[runs["objective"] == objective].reset_index(drop=True)
        budgets |= _draw_residuals(panel, members, law, styles[objective].color, fits.unit)
        panel.axhline(0, color=GREY, linewidth=1, zorder=1)
        panel.set_title(f"{broken(styles[objective].label)}\n{_describe(law)}", fontsize=9, color=INK)
        panel.set_xlabel(f"predicted {loss_label(fits.unit, fits.yardstick).removeprefix('validation ')}", color=INK)
        panel.margins(x=0.08, y=0.1)
        label_plain(panel.xaxis, 6)
        label_plain(panel.yaxis)
        dress(panel)
    panels[0].set_ylabel("observed over predicted − 1 (%)", color=INK)
    shown = [note("6ND"), *(marker_handle(marker, label) for label, marker in budgets.items())]
    side_legend(figure, [shown, _error_note(runs, fits.unit)])
    return figure


def _draw_residuals(axes: Axes, runs: pd.DataFrame, law: ParametricFit, color: str, unit: Unit) -> dict[str, str]:
    """Draws one objective's runs and returns the marker of each budget by its label."""
    predicted = law.loss(runs["params_nonembedding"].to_numpy(float), runs["tokens"].to_numpy(float))
    observed, stderr = losses(runs, unit)
    flops = planned_flops(runs)
    groups = budget_members(flops)
    labels: dict[str, str] = {}
    for number, (members, shade) in enumerate(zip(groups, shades(color, len(groups)), strict=True)):
        marker = MARKERS[number % len(MARKERS)]
        labels[power_of_ten(float(np.exp(np.log(flops[members]).mean())))] = marker
        middle = predicted[members]
        percent, error = 100 * (observed[members] / middle - 1), 100 * (stderr[members] / middle)
        _draw_group(axes, middle, percent, error, marker, shade, 5)
    return labels


def _describe(law: ParametricFit) -> str:
    fit = f"rms {100 * law.rms_residual:.2f} %, R² {law.r_squared:.4f}"
    chi = "" if law.reduced_chi_square is None else f", χ²/dof {law.reduced_chi_square:.2f}"
    return fit + chi + ("" if law.identified else "\nnot identified")
