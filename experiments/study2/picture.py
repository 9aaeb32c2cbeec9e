"""The picture of the second study: the best losses, and how many times `arm`'s FLOPs each objective needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullFormatter

from llada_lightning.compute.flops import Convention
from llada_lightning.study.fits import Multiplier, StudyFits
from llada_lightning.study.fits.envelope import ReadOff
from llada_lightning.study.plots.style import (
    INK,
    StudyFigure,
    Style,
    dress,
    flops_axis,
    flops_label,
    interval_bars,
    label_plain,
    new_figure,
    objective_styles,
)

POINTS = 60
"""Of the line between the budgets of an objective."""
DODGE = 0.025
"""How far apart the bars of one budget are drawn, in powers of e."""


def picture(fits: StudyFits, names: Mapping[str, str], convention: Convention) -> StudyFigure:
    """Two panels: the best loss of each budget, and the multipliers over the reference that are read off these losses.

    Args:
        fits: The fits of the results.
        names: The names to be drawn, by those of the fits.
        convention: How FLOPs are counted.
    """
    styles = {name: replace(own, label=names[name]) for name, own in objective_styles(fits.objectives).items()}
    figure = new_figure(10.5, 4.4)
    losses, multipliers = figure.subplots(1, 2, width_ratios=(1.25, 1))
    for name, own in fits.objectives.items():
        joined = own.envelope[convention].read_off
        if joined is not None:
            _draw_losses(losses, joined, styles[name])
    losses.set_xlabel(flops_label(convention), color=INK)
    losses.set_ylabel("validation loss (nats per token)", color=INK)
    flops_axis(losses)
    label_plain(losses.yaxis)
    losses.legend(frameon=False, fontsize=9)
    _draw_multipliers(multipliers, fits, styles, convention)
    multipliers.set_xlabel(flops_label(convention, "`arm`'s training FLOPs").replace("`", ""), color=INK)
    multipliers.set_ylabel("times arm's FLOPs for the same loss", color=INK)
    for axes in (losses, multipliers):
        dress(axes)
    return figure


def _draw_losses(axes: Axes, joined: ReadOff, style: Style) -> None:
    """The best losses with 95 % intervals, joined as they are read off."""
    losses, drawn = np.exp(joined.log_loss), np.exp(joined.draws)
    bars = interval_bars(losses, *np.percentile(drawn, [2.5, 97.5], axis=0))
    flops = np.exp(joined.log_c)
    axes.errorbar(
        flops, losses, bars, fmt=style.marker, color=style.color, markerfacecolor=style.face, markersize=5, capsize=2.5,
        label=style.label,
    )  # fmt: skip
    grid = np.geomspace(flops[0], flops[-1], POINTS)
    axes.plot(grid, joined.loss(grid), color=style.color, linestyle=style.line, linewidth=1.4)


def _draw_multipliers(axes: Axes, fits: StudyFits, styles: Mapping[str, Style], convention: Convention) -> None:
    """The multipliers with 95 % intervals, those of one budget side by side."""
    shown = [
        own for own in fits.compute_multiplier if (own.method, own.convention) == ("read-off", convention) and own.shown
    ]
    names = list(dict.fromkeys(own.objective for own in shown))
    for place, name in enumerate(names):
        own = sorted((one for one in shown if one.objective == name), key=lambda one: one.reference_flops)
        _draw_cells(axes, own, styles[name], float(np.exp(DODGE * (place - (len(names) - 1) / 2))))
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    ticks = [one for one in (5, 10, 20, 30, 50, 100, 200, 300, 500, 1000) if low <= one <= high]
    axes.set_yticks(ticks)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    flops_axis(axes)


def _draw_cells(axes: Axes, cells: list[Multiplier], style: Style, dodge: float) -> None:
    flops = [own.reference_flops * dodge for own in cells]
    values = [own.multiplier for own in cells]
    bars = interval_bars(values, [own.low for own in cells], [own.high for own in cells])
    axes.errorbar(
        flops, values, bars, color=style.color, linestyle=style.line, linewidth=1.4, marker=style.marker,
        markerfacecolor=style.face, markersize=5, capsize=2.5,
    )  # fmt: skip
