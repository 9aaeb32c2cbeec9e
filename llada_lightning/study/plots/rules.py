"""The figure of a tuning study: losses against rate by batch and budget, and the laws of rate and batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from llada_lightning.study.fits.least_squares import Estimate, PowerLaw
from llada_lightning.study.fits.quadratic import TuningOptimum
from llada_lightning.study.fits.rules import ObjectiveRules, TuningFits
from llada_lightning.study.plots.style import (
    INK,
    StudyFigure,
    Style,
    dress,
    exponent_text,
    flops_axis,
    hold_limits,
    interval_bars,
    label_counts,
    label_plain,
    label_powers,
    marker_handle,
    new_figure,
    note,
    objective_styles,
    power_of_ten,
    shades,
    side_legend,
)


def tuning_figure(fits: TuningFits) -> StudyFigure:
    """A row for each objective, with a panel for each budget and shape, and below them the two laws.

    In a panel of a budget, points are runs, darker for larger batches; each line is the fitted quadratic at one batch,
    and the star its lowest point over both. The bands of the laws are their 95 %, drawn over the budgets fitted on.
    """
    rows = [own for own in fits.objectives.values() if own.optima]
    styles = objective_styles(fits.objectives)
    columns = max(2, *(len(own.optima) for own in rows))
    figure = new_figure(2.7 * columns + 2.6, 2.6 * len(rows) + 3.0)
    above, below = np.asarray(figure.subfigures(2, 1, height_ratios=[2.6 * len(rows), 3.0]))
    panels = above.subplots(len(rows), columns, squeeze=False)
    for line, own in zip(panels, rows, strict=True):
        for panel, optimum in zip(line, own.optima, strict=False):
            _draw_budget(panel, optimum, styles[own.name], fits.sequence_length)
        for panel in line[len(own.optima) :]:
            panel.set_visible(False)
        line[0].set_ylabel(f"{own.name}: nats/token", color=INK)
    above.supxlabel("learning rate", fontsize=10, color=INK)
    laws = below.subplots(1, 2)
    _draw_laws(laws, rows, styles, fits.sequence_length)
    side_legend(below, _legend(rows, styles))
    return figure


def _draw_budget(axes: Axes, optimum: TuningOptimum, style: Style, sequence_length: int) -> None:
    rates, losses = np.exp(optimum.log_rates), np.exp(optimum.log_losses)
    batches = np.unique(optimum.log_batches.round(9))
    line = np.geomspace(rates.min() / 1.1, rates.max() * 1.1, 60)
    for batch, color in zip(batches, shades(style.color, len(batches)), strict=True):
        here = np.isclose(optimum.log_batches, batch)
        label = f"{np.exp(batch) / sequence_length:.3g}"
        axes.plot(rates[here], losses[here], style.marker, color=color, markersize=4.5, zorder=3, label=label)
        axes.plot(line, optimum.curve(line, float(np.exp(batch))), "-", color=color, linewidth=1.2, zorder=2)
    lr = optimum.lr
    axes.errorbar(
        lr.value, optimum.loss.value, xerr=interval_bars([lr.value], [lr.low], [lr.high]), fmt="*", color=INK,
        markerfacecolor=INK if optimum.inside else "white", markersize=9, elinewidth=1.1, capsize=3, zorder=5,
    )  # fmt: skip
    axes.set_xscale("log")
    axes.set_xlim(line[0] / 1.15, line[-1] * 1.15)
    span = np.ptp(losses)
    axes.set_ylim(min(losses.min(), optimum.loss.value) - 0.1 * span, losses.max() + 0.15 * span)
    label_powers(axes.xaxis, axes.get_xlim())
    label_plain(axes.yaxis, 5)
    axes.set_title(f"{power_of_ten(optimum.flops)} FLOPs, {optimum.shape}", fontsize=9, color=INK)
    axes.legend(title="batch", fontsize=7, title_fontsize=7, frameon=False, handlelength=1.0, labelcolor=INK)
    dress(axes)


def _draw_laws(
    panels: Sequence[Axes], rows: Sequence[ObjectiveRules], styles: dict[str, Style], sequence_length: int
) -> None:
    """The optima inside of their grids with 95 % intervals, and the laws through them."""
    rate, batch = panels
    for own in rows:
        style = styles[own.name]
        _draw_law(rate, own.inside, "flops", [each.lr for each in own.inside], own.lr_law, style, 1)
        varied = [each for each in own.inside if each.batch_varied]
        _draw_law(batch, varied, "tokens", [each.batch for each in varied], own.batch_law, style, sequence_length)
    rate.set_xlabel("training FLOPs (6ND)", color=INK)
    rate.set_ylabel("best learning rate", color=INK)
    batch.set_xlabel("training tokens D", color=INK)
    batch.set_ylabel("best batch (sequences)", color=INK)
    for panel in panels:
        panel.set_yscale("log")
        values = [np.ravel(line.get_ydata()) for line in panel.get_lines()]
        if values:
            hold_limits(panel, np.concatenate(values), 3)
            flops_axis(panel)
            label_powers(panel.yaxis, panel.get_ylim())
        dress(panel)
    if batch.get_lines():
        label_counts(batch.xaxis, batch.get_xlim())
        label_counts(batch.yaxis, batch.get_ylim())


def _draw_law(
    axes: Axes,
    optima: Sequence[TuningOptimum],
    size: str,
    estimates: Sequence[Estimate],
    law: PowerLaw | None,
    style: Style,
    unit: float,
) -> None:
    if not optima:
        return
    x = np.array([getattr(each, size) for each in optima])
    values, lows, highs = (
        np.array([getattr(own, end) / unit for own in estimates]) for end in ("value", "low", "high")
    )
    axes.errorbar(
        x, values, yerr=interval_bars(values, lows, highs), fmt=style.marker, color=style.color,
        markerfacecolor=style.face, markersize=5.5, elinewidth=1.1, capsize=3, zorder=4,
    )  # fmt: skip
    if law is not None:
        line = np.geomspace(x.min(), x.max(), 50)
        low, high = law.band(line)
        axes.plot(line, law.value(line) / unit, style.line, color=style.color, linewidth=1.6, zorder=3)
        axes.fill_between(line, low / unit, high / unit, color=style.color, alpha=0.16, linewidth=0, zorder=1)


def _legend(rows: Sequence[ObjectiveRules], styles: dict[str, Style]) -> list[list[Line2D]]:
    lines = []
    for own in rows:
        laws = (("rate", own.lr_law), ("batch", own.batch_law))
        text = "".join("\n" + exponent_text(name, law.exponent) for name, law in laws if law is not None)
        lines.append(
            styles[own.name].handle(own.name + text.replace("batch ∝ C", "batch ∝ D"), marker=styles[own.name].marker)
        )
    stars = [marker_handle("*", "lowest loss, inside of the grid")]
    if any(not optimum.inside for own in rows for optimum in own.optima):
        stars.append(marker_handle("*", "not inside of the grid", filled=False))
    bands = [note("bars, band and [ ]: 95 %")]
    return [lines, stars, bands]
