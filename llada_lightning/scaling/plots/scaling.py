"""Figures of a scaling study. Colours are Okabe and Ito's (2008), told apart by the colour-blind; line styles and
fillings carry the same information, so that a figure is readable in grey."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from llada_lightning.files import written_atomically
from llada_lightning.scaling.fits import (
    UNIT_NAMES,
    EnvelopeFit,
    Fits,
    Unit,
    best_of_budgets,
    flops_column,
    losses,
    usable_runs,
)
from llada_lightning.scaling.flops import CONVENTION_NAMES, Convention


@dataclass(frozen=True)
class _Style:
    label: str
    color: str
    line: Literal["-", "--"]


STYLES = {
    "arm": _Style("arm (exact)", "#0072B2", "-"),
    "llada": _Style("llada (bound, NELBO)", "#D55E00", "--"),
}
"""How each objective looks, and what the legend says of its loss."""

_MARKERS = "osD^vPX*<>phd8"
_INK, _GREY = "#222222", "#8A8A8A"
_RATIO_TOLERANCE = 1e-3


def scaling_curve(
    table: pd.DataFrame,
    fits: Fits,
    path: Path | str,
    convention: Convention = "6nd",
    unit: Unit = "nats_per_token",
) -> Figure:
    """Validation loss against training FLOPs: every finished run, and each objective's envelope with its fit.

    A run is a point with ± 1 standard error, its marker the shape, filled where it is the best of its budget. The
    line is the power law of the envelope with its 95 % band, or joins the envelope where there is no fit.

    Args:
        table: a results table.
        fits: its fits, under the same convention and unit.
        path: where the figure is written; the suffix chooses the format (``.png``, ``.svg``, ``.pdf``).
        convention: which FLOPs the x axis counts.
        unit: of the loss.

    Raises:
        ValueError: the fits are of another convention or unit.
    """
    if (fits.convention, fits.unit) != (convention, unit):
        raise ValueError(f"fits are by {fits.convention} in {fits.unit}, the figure by {convention} in {unit}")
    runs = usable_runs(table)
    markers = _markers_of_shapes(runs)
    figure = Figure(figsize=(8.0, 4.6), dpi=200, layout="constrained")
    axes = figure.subplots()
    for objective, fit in fits.envelopes.items():
        style, members = STYLES[objective], runs[runs["objective"] == objective]
        _draw_envelope(axes, fit, style)
        _draw_runs(axes, members, convention, unit, style, markers)
    _dress(axes, convention, unit)
    if unit == "nats_per_token":
        _add_bits_per_byte(axes, runs)
    _add_legends(figure, fits, markers)
    path = Path(path)
    with written_atomically(path) as temporary:
        figure.savefig(temporary)
    return figure


def _markers_of_shapes(runs: pd.DataFrame) -> dict[str, str]:
    """A marker for each shape, smallest first."""
    shapes = runs.sort_values("params_nonembedding")["shape"].unique()
    return {shape: _MARKERS[number % len(_MARKERS)] for number, shape in enumerate(shapes)}


def _draw_runs(
    axes: Axes, runs: pd.DataFrame, convention: Convention, unit: Unit, style: _Style, markers: dict[str, str]
) -> None:
    best = set(best_of_budgets(runs, convention, unit))
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
            markersize=5.5,
            markeredgewidth=1.1,
            elinewidth=1.1,
            capsize=4,  # wider than the marker, to be seen beside it
            zorder=4 if row in best else 3,
        )


def _draw_envelope(axes: Axes, fit: EnvelopeFit, style: _Style) -> None:
    if fit.law is None:
        flops, loss = [point.flops for point in fit.points], [point.loss for point in fit.points]
        axes.plot(flops, loss, style.line, color=style.color, linewidth=1, alpha=0.6, zorder=2)
        return
    flops_line = np.geomspace(*fit.flops_range, 200)
    axes.plot(flops_line, fit.law.loss(flops_line), style.line, color=style.color, linewidth=1.8, zorder=2)
    axes.fill_between(flops_line, *fit.law.band(flops_line), color=style.color, alpha=0.16, linewidth=0, zorder=1)


def _dress(axes: Axes, convention: Convention, unit: Unit) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")  # a power law is a straight line
    axes.margins(x=0.06, y=0.08)
    axes.set_xlabel(f"training FLOPs ({CONVENTION_NAMES[convention]})", color=_INK)
    axes.set_ylabel(f"validation loss ({UNIT_NAMES[unit]})", color=_INK)
    _label_flops(axes)
    _label_losses(axes.yaxis)
    axes.grid(True, which="major", color="#E4E4E4", linewidth=0.7, zorder=0)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(_GREY)
    axes.tick_params(which="both", color=_GREY, labelcolor=_INK)


def _label_flops(axes: Axes) -> None:
    """Powers of ten, with 3 in between where the axis spans less than four decades."""
    low, high = axes.get_xlim()
    subs = (1.0, 3.0) if high / low < 1e4 else (1.0,)
    axes.xaxis.set_major_locator(LogLocator(10, subs=subs, numticks=20))
    axes.xaxis.set_major_formatter(FuncFormatter(_power_of_ten))
    axes.xaxis.set_minor_locator(LogLocator(10, subs="all", numticks=100))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _power_of_ten(value: float, _position: Any) -> str:
    exponent = int(np.floor(np.log10(value) + 1e-9))
    mantissa = round(value / 10**exponent)
    return f"$10^{{{exponent}}}$" if mantissa == 1 else f"${mantissa}\\times10^{{{exponent}}}$"


def _label_losses(axis: Any) -> None:
    """Plain round numbers: a loss axis rarely spans a power of ten."""
    axis.set_major_locator(MaxNLocator(nbins=7, steps=[1, 2, 2.5, 5, 10]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def _add_bits_per_byte(axes: Axes, runs: pd.DataFrame) -> None:
    """A second scale on the right, where one factor converts all runs (the same data and tokenizer)."""
    ratio = (runs["val_bits_per_byte"] / runs["val_nats_per_token"]).to_numpy(float, na_value=np.nan)
    if not np.all(np.isfinite(ratio)) or np.ptp(ratio) > _RATIO_TOLERANCE * ratio.mean():
        return
    factor = float(ratio.mean())
    to_bits, to_nats = partial(np.multiply, factor), partial(np.multiply, 1 / factor)
    right = axes.secondary_yaxis("right", functions=(to_bits, to_nats))
    right.set_ylabel(UNIT_NAMES["bits_per_byte"], color=_GREY)
    _label_losses(right.yaxis)
    right.tick_params(which="both", color=_GREY, labelcolor=_GREY)
    right.spines["right"].set_color(_GREY)


def _add_legends(figure: Figure, fits: Fits, markers: dict[str, str]) -> None:
    lines = [_objective_handle(objective, fit) for objective, fit in fits.envelopes.items()]
    shapes = [
        Line2D([], [], linestyle="", marker=marker, color=_GREY, markersize=5.5, label=shape)
        for shape, marker in markers.items()
    ]
    kinds = [
        Line2D([], [], linestyle="", marker="o", color=_GREY, label="best of its budget"),
        Line2D([], [], linestyle="", marker="o", color=_GREY, markerfacecolor="white", label="other run"),
    ]
    spacer = Line2D([], [], linestyle="", label=" ")
    notes = [_note("error bars: ± 1 s.e.")]
    if any(fit.law is not None for fit in fits.envelopes.values()):
        notes.append(_note("band: 95 % of the fit"))
    figure.legend(
        handles=[*lines, spacer, *shapes, spacer, *kinds, spacer, *notes],
        loc="outside right upper",
        frameon=False,
        fontsize=9,
        labelcolor=_INK,
        handlelength=2.2,
    )


def _note(text: str) -> Line2D:
    return Line2D([], [], linestyle="", label=text)


def _objective_handle(objective: str, fit: EnvelopeFit) -> Line2D:
    style = STYLES[objective]
    exponent = "" if fit.law is None else f"\n  loss ∝ C$^{{{-fit.law.b:.3f}}}$"
    return Line2D([], [], color=style.color, linestyle=style.line, linewidth=1.8, label=style.label + exponent)
