"""Figures of what the fits give: the optimum of a budget, and the compute multiplier."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from llada_lightning.compute.flops import Convention
from llada_lightning.study.fits import (
    BUDGET_TOLERANCE,
    Estimate,
    IsoflopBudget,
    IsoflopFit,
    Multiplier,
    ObjectiveFits,
    ParametricFit,
    StudyFits,
)
from llada_lightning.study.plots.style import (
    GREY,
    INK,
    METHODS,
    StudyFigure,
    Style,
    broken,
    dress,
    exponent_text,
    flops_axis,
    flops_label,
    hold_limits,
    interval_bars,
    label_counts,
    new_figure,
    note,
    objective_styles,
    plain,
    side_legend,
)
from llada_lightning.support.errors import UserError

_PANELS = {
    "n_opt": "parameters N at the optimum",
    "d_opt": "tokens D at the optimum",
    "tokens_per_param": "tokens per parameter D/N",
}
"""The attribute of a budget that a panel shows, and the panel's title."""


def optimum(fits: StudyFits, convention: Convention = "6nd") -> StudyFigure:
    """N_opt, D_opt and tokens per parameter against the budget, all objectives.

    IsoFLOP optima are points with 95 % intervals (those outside of the grid are left out), the lines their power laws;
    the bands with a dotted middle are the parametric frontier and its 95 %, over the budgets that it was fitted on.

    Raises:
        UserError: The table lacks the FLOPs of this convention.
    """
    fits.check_counted(convention)
    figure = new_figure(11.4, 3.6)
    panels = figure.subplots(1, 3)
    styles = objective_styles(fits.objectives, fits.yardstick)
    for objective, fit in fits.objectives.items():
        _draw_isoflop(panels, _interior(fit, convention), fit.isoflop[convention], styles[objective])
        if fit.parametric is not None and _has_frontier(fit, convention):
            _draw_frontier(panels, fit.parametric, styles[objective], convention)
    for panel, title in zip(panels, _PANELS.values(), strict=True):
        panel.set_title(title, fontsize=10, color=INK)
        panel.set_yscale("log")
        flops_axis(panel)
        hold_limits(panel, np.concatenate([np.ravel(line.get_ydata()) for line in panel.get_lines()]), 10)
        label_counts(panel.yaxis, panel.get_ylim())
        dress(panel)
    figure.supxlabel(flops_label(convention), fontsize=10, color=INK)
    side_legend(figure, _optimum_legend(fits, convention))
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
    flops = [budget.flops for budget in budgets]
    for panel, name in zip(panels, _PANELS, strict=True):
        _draw_estimates(panel, flops, [getattr(budget, name) for budget in budgets], style, style.face)
    if fit.n_law is None or fit.d_law is None:
        return
    line = np.geomspace(min(flops), max(flops), 50)
    n, d = fit.n_law.value(line), fit.d_law.value(line)
    for panel, optima in zip(panels, (n, d, d / n), strict=True):
        panel.plot(line, optima, style.line, color=style.color, linewidth=1.6, zorder=3)


def _draw_estimates(axes: Axes, flops: list[float], estimates: list[Estimate], style: Style, face: str) -> None:
    """Points with their 95 % intervals."""
    values, lows, highs = zip(*((own.value, own.low, own.high) for own in estimates), strict=True)
    axes.errorbar(
        flops,
        values,
        yerr=interval_bars(values, lows, highs),
        fmt=style.marker,
        color=style.color,
        markerfacecolor=face,
        markersize=5,
        elinewidth=1.1,
        capsize=3,
        zorder=4,
    )


def _draw_frontier(panels: Sequence[Axes], fit: ParametricFit, style: Style, convention: Convention) -> None:
    flops = np.geomspace(*fit.flops_ranges[convention], 50)
    frontier = fit.frontier(convention, flops)
    bands = [
        frontier.n,
        frontier.d,
        frontier.d / frontier.n[[0, 2, 1]],  # more parameters are fewer tokens: their ends belong together crosswise
    ]
    for panel, (middle, low, high) in zip(panels, bands, strict=True):
        panel.plot(flops, middle, ":", color=style.color, linewidth=1.6, zorder=2)
        panel.fill_between(flops, low, high, color=style.color, alpha=0.16, linewidth=0, zorder=1)


def _optimum_legend(fits: StudyFits, convention: Convention) -> list[list[Artist]]:
    groups: list[list[Artist]] = []
    isoflop = laws = frontier = False
    for objective, style in objective_styles(fits.objectives, fits.yardstick).items():
        fit = fits.objectives[objective]
        fitted, points = fit.isoflop[convention], bool(_interior(fit, convention))
        texts = [exponent_text(name, law.exponent) for name, law in (("N", fitted.n_law), ("D", fitted.d_law)) if law]
        groups.append([style.handle("\n".join([plain(objective), *texts]), marker=style.marker if points else "")])
        isoflop, laws = isoflop or points, laws or fitted.n_law is not None
        frontier = frontier or _has_frontier(fit, convention)
    if isoflop and laws:
        groups.append([note("points, lines: IsoFLOP"), note("bars and [ ]: 95 %")])
    elif isoflop:
        groups.append([note("points: IsoFLOP"), note("bars: 95 %")])
    if frontier:
        middle = Line2D([], [], color=GREY, linestyle=":", linewidth=1.6, label="parametric frontier")
        groups.append([middle, Patch(color=GREY, alpha=0.3, linewidth=0, label="its 95 %")])
    return groups


# --- the compute multiplier ------------------------------------------------------------------------------------------

_DODGE = 0.015
"""By what share of the x axis points of one budget are set side by side, or their bars would hide each other."""

_FEW_ROWS = 3
"""More objectives than this have lower panels."""


def compute_multiplier(fits: StudyFits, conventions: Sequence[Convention] | None = None) -> StudyFigure:
    """FLOPs that an objective needs over FLOPs that the reference needs for equal loss, by method.

    Points are at the reference's budgets, with 95 % intervals; lines and bands go between, dashed and without a band's
    fill where one of the two reaches the loss only outside of the budgets of its fit. What is not to be relied on (a
    fit that is rejected, or fails its held-out test) is grey and hollow. One row an objective, one panel a convention;
    a panel without a multiplier says so.

    Args:
        fits: The fits of a study with the reference and another objective.
        conventions: The conventions of the panels; all that have a multiplier by default.

    Raises:
        UserError: No method gives a multiplier.
    """
    entries = [entry for entry in fits.compute_multiplier + fits.multiplier_curve if entry.shown]
    present = [name for name in fits.conventions if any(entry.convention == name for entry in entries)]
    drawn = [name for name in conventions or present if name in present]
    shown = [entry for entry in entries if entry.convention in drawn]
    names = [name for name in fits.compared if any(entry.objective == name for entry in shown)]
    if not names:
        raise UserError("figure: no compute multiplier; it needs two objectives, each with three budgets or more")
    height = 4.0 if len(names) <= _FEW_ROWS else 2.6
    figure = new_figure(3.9 * len(drawn) + 2.4, height * len(names))
    rows = figure.subplots(len(names), len(drawn), sharey="row", squeeze=False)
    for panels, name in zip(rows, names, strict=True):
        own = [entry for entry in shown if entry.objective == name]
        for panel, convention in zip(panels, drawn, strict=True):
            here = [entry for entry in own if entry.convention == convention]
            if not here:
                where = {"transform": panel.transAxes, "ha": "center", "va": "center"}
                panel.text(0.5, 0.5, "no multiplier\nby this count", color=INK, fontsize=9, **where)
            shifts = _shifts(here)
            for method, style in METHODS.items():
                curve, points = (
                    _of(kept, name, convention, method) for kept in (fits.multiplier_curve, fits.compute_multiplier)
                )
                if not all(entry.trusted for entry in curve + points):
                    style = replace(style, color=GREY, filled=False)
                _draw_multipliers(panel, curve, style)
                _draw_points(panel, points, style, shifts.get(method, 1.0))
            panel.set_xlabel(flops_label(convention, f"training FLOPs of {plain(str(fits.reference))}"), color=INK)
            flops_axis(panel)
            dress(panel)
        panels[0].set_yscale("log")
        panels[0].set_ylim(*_limits(own))
        panels[0].yaxis.set_major_locator(LogLocator(10, subs=(1, 2, 3, 5), numticks=20))
        panels[0].yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
        panels[0].yaxis.set_minor_formatter(NullFormatter())
        panels[0].set_ylabel(broken(f"compute multiplier of {plain(name)}", int(10 * height)), color=INK)
        for panel in panels:
            if panel.get_ylim()[0] < 1:
                panel.axhline(1, color=GREY, linewidth=1, zorder=1)
    side_legend(figure, _multiplier_legend(shown))
    return figure


def _of(entries: Sequence[Multiplier], objective: str, convention: Convention, method: str) -> list[Multiplier]:
    wanted = (objective, convention, method)
    chosen = [own for own in entries if (own.objective, own.convention, own.method) == wanted and own.shown]
    return sorted(chosen, key=lambda entry: entry.reference_flops)


def _shifts(entries: Sequence[Multiplier]) -> dict[str, float]:
    """The factor of FLOPs by which the points of each method are set aside: so little that they stay on their curve."""
    flops = [entry.reference_flops for entry in entries]
    present = [name for name in METHODS if any(entry.method == name for entry in entries)]
    width = _DODGE * np.log(max(flops) / min(flops)) if flops else 0.0
    return {name: float(np.exp(width * (place - (len(present) - 1) / 2))) for place, name in enumerate(present)}


def _draw_points(axes: Axes, entries: list[Multiplier], style: Style, dodge: float) -> None:
    for extrapolated, face in ((False, style.face), (True, "white")):
        members = [entry for entry in entries if entry.extrapolated == extrapolated]
        if members:
            estimates = [replace(entry.estimate, high=_drawn_end(entry.high)) for entry in members]
            _draw_estimates(axes, [entry.reference_flops * dodge for entry in members], estimates, style, face)


def _drawn_end(high: float) -> float:
    """The end of an interval, beyond every panel where it is open; NaN, which is not drawn, where it is not known."""
    return 1e12 if math.isinf(high) else high


def _draw_multipliers(axes: Axes, entries: list[Multiplier], style: Style) -> None:
    if not entries:
        return
    flops, values, lows = (
        np.array([getattr(entry, name) for entry in entries]) for name in ("reference_flops", "multiplier", "low")
    )
    highs, inside = [_drawn_end(entry.high) for entry in entries], np.array([not own.extrapolated for own in entries])
    axes.plot(flops, values, "--", color=style.color, linewidth=1, zorder=2)
    axes.plot(flops, np.where(inside, values, np.nan), "-", color=style.color, linewidth=1.8, zorder=3)
    axes.fill_between(flops, lows, highs, where=inside.tolist(), color=style.color, alpha=0.14, linewidth=0, zorder=1)


def _limits(entries: Sequence[Multiplier]) -> tuple[float, float]:
    """The limits of y: around all that is finite, at most a factor of 3 from the points. Open ends leave the panel."""
    values = np.array([entry.multiplier for entry in entries])
    ends = np.array([[entry.low, entry.high] for entry in entries]).ravel()
    ends = ends[np.isfinite(ends) & (ends > 0)]
    low, high = values.min(), values.max()
    return max(min(low, ends.min(initial=low)), low / 3) / 1.15, min(max(high, ends.max(initial=high)), high * 3) * 1.15


def _multiplier_legend(entries: Sequence[Multiplier]) -> list[list[Line2D]]:
    present = {entry.method for entry in entries}
    methods = [
        Line2D([], [], color=style.color, linewidth=1.8, marker=style.marker, markersize=5, label=style.label)
        for name, style in METHODS.items()
        if name in present
    ]
    grey = partial(Line2D, [], [], color=GREY, marker="o", markerfacecolor="white", markersize=5)
    marks = []
    if any(entry.extrapolated for entry in entries):
        marks.append(grey(linewidth=1, linestyle="--", label="beyond a fit's\nbudgets"))
    if any(not entry.trusted for entry in entries):
        marks.append(grey(linewidth=1.8, label="grey: fit rejected, or\nheld-out test failed"))
    return [methods, marks, [note("bars, bands: 95 %")]]
