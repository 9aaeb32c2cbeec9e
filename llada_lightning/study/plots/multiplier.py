"""The compute multiplier of ``llada`` against ``arm``, by method and convention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from llada_lightning.compute.flops import Convention
from llada_lightning.study.fits import Multiplier, StudyFits
from llada_lightning.study.plots.style import (
    GREY,
    INK,
    METHODS,
    StudyFigure,
    Style,
    dress,
    flops_axis,
    flops_label,
    interval_bars,
    new_figure,
    note,
    side_legend,
)
from llada_lightning.support.errors import UserError

_DODGE = {"envelope": 1 / 1.05, "isoflop": 1.0, "parametric": 1.05}
"""Points of one budget stand side by side, or their bars would hide each other."""


def compute_multiplier(fits: StudyFits, conventions: Sequence[Convention] | None = None) -> StudyFigure:
    """FLOPs that ``llada`` needs over FLOPs that ``arm`` needs for equal loss, against ``arm``'s, by method.

    Points are at ``arm``'s budgets, with 95 % intervals; lines and bands go between, dashed and without a band's fill
    where one of them reaches the loss only outside of the budgets of its fit. What is not to be relied on (a fit that
    is rejected, or fails its held-out test) is grey and hollow. One panel a convention.

    Args:
        fits: of a study with both objectives.
        conventions: the panels; all that have a multiplier by default.

    Raises:
        UserError: no method gives a multiplier.
    """
    entries = [entry for entry in fits.compute_multiplier + fits.multiplier_curve if entry.shown]
    present = [name for name in fits.conventions if any(entry.convention == name for entry in entries)]
    drawn = [name for name in conventions or present if name in present]
    if not drawn:
        raise UserError("figure: no compute multiplier; it needs both objectives, each with three budgets or more")
    figure = new_figure(3.9 * len(drawn) + 2.4, 4.0)
    panels = figure.subplots(1, len(drawn), sharey=True, squeeze=False)[0]
    for panel, convention in zip(panels, drawn, strict=True):
        for method, style in METHODS.items():
            curve, points = (_of(own, convention, method) for own in (fits.multiplier_curve, fits.compute_multiplier))
            if not all(entry.trusted for entry in curve + points):
                style = replace(style, color=GREY, filled=False)
            _draw_curve(panel, curve, style)
            _draw_points(panel, points, style, _DODGE[method])
        panel.set_xlabel(flops_label(convention, "training FLOPs of arm"), color=INK)
        flops_axis(panel)
        dress(panel)
    shown = [entry for entry in entries if entry.convention in drawn]
    panels[0].set_yscale("log")
    panels[0].set_ylim(*_limits(shown))
    panels[0].yaxis.set_major_locator(LogLocator(10, subs=(1, 2, 3, 5), numticks=20))
    panels[0].yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
    panels[0].yaxis.set_minor_formatter(NullFormatter())
    panels[0].set_ylabel("compute multiplier of llada", color=INK)
    for panel in panels:
        if panel.get_ylim()[0] < 1:
            panel.axhline(1, color=GREY, linewidth=1, zorder=1)
    side_legend(figure, _legend(shown))
    return figure


def _of(entries: Sequence[Multiplier], convention: Convention, method: str) -> list[Multiplier]:
    chosen = [entry for entry in entries if (entry.convention, entry.method) == (convention, method) and entry.shown]
    return sorted(chosen, key=lambda entry: entry.arm_flops)


def _draw_points(axes: Axes, entries: list[Multiplier], style: Style, dodge: float) -> None:
    for extrapolated in (False, True):
        members = [entry for entry in entries if entry.extrapolated == extrapolated]
        if not members:
            continue
        values = [entry.multiplier for entry in members]
        lows, highs = [entry.low for entry in members], [entry.high for entry in members]
        axes.errorbar(
            [entry.arm_flops * dodge for entry in members],
            values,
            yerr=interval_bars(values, lows, np.where(np.isfinite(highs), highs, 1e12)),
            fmt=style.marker,
            color=style.color,
            markerfacecolor="white" if extrapolated else style.face,
            markersize=5,
            elinewidth=1.1,
            capsize=3,
            zorder=4,
        )


def _draw_curve(axes: Axes, entries: list[Multiplier], style: Style) -> None:
    if not entries:
        return
    flops, values = (np.array([getattr(entry, name) for entry in entries]) for name in ("arm_flops", "multiplier"))
    lows, highs = (np.array([getattr(entry, name) for entry in entries]) for name in ("low", "high"))
    inside = np.array([not entry.extrapolated for entry in entries])
    highs = np.where(np.isfinite(highs), highs, 1e12)
    axes.plot(flops, values, "--", color=style.color, linewidth=1, zorder=2)
    axes.plot(flops, np.where(inside, values, np.nan), "-", color=style.color, linewidth=1.8, zorder=3)
    axes.fill_between(flops, lows, highs, where=inside.tolist(), color=style.color, alpha=0.14, linewidth=0, zorder=1)


def _limits(entries: Sequence[Multiplier]) -> tuple[float, float]:
    """Around everything finite, but no further than a factor of 3 from the points: open intervals leave the panel."""
    values = np.array([entry.multiplier for entry in entries])
    ends = np.array([[entry.low, entry.high] for entry in entries]).ravel()
    ends = ends[np.isfinite(ends) & (ends > 0)]
    low, high = values.min(), values.max()
    return max(min(low, ends.min(initial=low)), low / 3) / 1.15, min(max(high, ends.max(initial=high)), high * 3) * 1.15


def _legend(entries: Sequence[Multiplier]) -> list[list[Line2D]]:
    present = {entry.method for entry in entries}
    methods = [
        Line2D([], [], color=style.color, linewidth=1.8, marker=style.marker, markersize=5, label=style.label)
        for name, style in METHODS.items()
        if name in present
    ]
    beyond = [Line2D([], [], color=GREY, linewidth=1, linestyle="--", marker="o", markerfacecolor="white",
                     markersize=5, label="beyond a fit's\nbudgets")]  # fmt: skip
    doubted = [Line2D([], [], color=GREY, linewidth=1.8, marker="o", markerfacecolor="white", markersize=5,
                      label="grey: fit rejected, or\nheld-out test failed")]  # fmt: skip
    extrapolated, doubt = any(entry.extrapolated for entry in entries), any(not entry.trusted for entry in entries)
    return [methods, (beyond if extrapolated else []) + (doubted if doubt else []), [note("bars, bands: 95 %")]]
