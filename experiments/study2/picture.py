"""The picture of the second study: the best losses, and how many times `arm`'s FLOPs each objective needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from llada_lightning.compute.flops import Convention
from llada_lightning.compute.rules import significant
from llada_lightning.study.fits import Multiplier, StudyFits
from llada_lightning.study.fits.envelope import ReadOff
from llada_lightning.study.plots.style import (
    INK,
    MARKERS,
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
from llada_lightning.study.tables.style import flops_text

POINTS = 60
"""Of the line between the budgets of an objective."""
FAR = 1e9
"""An end of an interval that lies beyond the panel."""
DODGE = 0.025
"""How far apart the bars of one budget are drawn, in powers of e."""


def picture(
    fits: StudyFits, names: Mapping[str, str], multipliers: Mapping[str, Sequence[Multiplier]], convention: Convention
) -> StudyFigure:
    """Two panels: the best loss of each budget, and the multipliers over the reference that are read off these losses.

    Args:
        fits: The fits of the results.
        names: The names to be drawn, by those of the fits.
        multipliers: The multipliers at the budgets of each objective but the reference, by the names of the fits.
        convention: How FLOPs are counted.
    """
    styles = {
        name: replace(own, label=names[name], marker=MARKERS[place], filled=name == "arm")
        for place, (name, own) in enumerate(objective_styles(fits.objectives).items())
    }
    figure = new_figure(10.5, 4.4)
    losses, factors = figure.subplots(1, 2, width_ratios=(1.25, 1))
    for name, own in fits.objectives.items():
        joined = own.envelope[convention].read_off
        if joined is not None:
            _draw_losses(losses, joined, styles[name])
    losses.set_xlabel(flops_label(convention), color=INK)
    losses.set_ylabel("validation loss (nats per token)", color=INK)
    flops_axis(losses)
    label_plain(losses.yaxis)
    losses.legend(frameon=False, fontsize=9)
    for place, (name, entries) in enumerate(multipliers.items()):
        _draw_multipliers(factors, entries, styles[name], float(np.exp(DODGE * (place - (len(multipliers) - 1) / 2))))
    ends = [end for entries in multipliers.values() for own in entries for end in (own.low, own.high)]
    known = [end for end in ends if 0 < end < np.inf]
    factors.set_yscale("log")
    factors.set_ylim(min(known) / 1.2, max(known) * 1.2)
    factors.yaxis.set_major_locator(LogLocator(10, subs=(1, 2, 3, 5), numticks=20))
    factors.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
    factors.yaxis.set_minor_formatter(NullFormatter())
    budgets = sorted({significant(own.objective_flops, 2) for entries in multipliers.values() for own in entries})
    factors.set_xscale("log")
    factors.set_xticks(budgets, [flops_text(own, ".1g") for own in budgets])
    factors.xaxis.set_minor_formatter(NullFormatter())
    factors.set_xlabel(flops_label(convention, "the objective's training FLOPs"), color=INK)
    factors.set_ylabel("times arm's FLOPs for the same loss", color=INK)
    for axes in (losses, factors):
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


def _draw_multipliers(axes: Axes, entries: Sequence[Multiplier], style: Style, dodge: float) -> None:
    """The multipliers of an objective with 95 % intervals, which leave the panel where they are open.

    Those of one budget stand side by side.
    """
    values = [own.multiplier for own in entries]
    bars = interval_bars(values, [own.low for own in entries], [min(own.high, FAR) for own in entries])
    axes.errorbar(
        [own.objective_flops * dodge for own in entries], values, bars, color=style.color, linestyle=style.line,
        linewidth=1.4, marker=style.marker, markerfacecolor=style.face, markersize=5, capsize=2.5,
    )  # fmt: skip
