"""Loss against training FLOPs: every run, and each objective's envelope with its power law."""

from __future__ import annotations

from functools import partial

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from llada_lightning.compute.flops import Convention
from llada_lightning.study.fits import (
    UNIT_NAMES,
    EnvelopeFit,
    StudyFits,
    Unit,
    best_of_budgets,
    flops_column,
    losses,
    usable_runs,
)
from llada_lightning.study.plots.style import (
    GREY,
    INK,
    STYLES,
    StudyFigure,
    Style,
    check_counted,
    dress,
    exponent_text,
    flops_axis,
    flops_label,
    hold_limits,
    label_plain,
    marker_handle,
    markers_of,
    new_figure,
    note,
    side_legend,
)

_MOST_SHAPES = 8
"""With more shapes than this, a marker tells the objective instead: nobody reads so many."""
_RATIO_TOLERANCE = 1e-3


def scaling_curve(table: pd.DataFrame, fits: StudyFits, convention: Convention = "6nd") -> StudyFigure:
    """Validation loss against training FLOPs: every finished run, and each objective's envelope with its fit.

    A run is a point with ± 1 standard error, its marker the shape, filled where it is the best of its budget. The
    line is the power law of the envelope with its 95 % band, or joins the envelope where there is no fit.

    Args:
        table: a results table.
        fits: its fits.
        convention: which FLOPs the x axis counts.

    Raises:
        UserError: the table lacks the FLOPs of this convention.
    """
    check_counted(fits, convention)
    runs = usable_runs(table)
    shapes = markers_of(runs.sort_values("params_nonembedding")["shape"])
    figure = new_figure(8.2, 4.6)
    axes = figure.subplots()
    for objective, fit in fits.envelopes(convention).items():
        style, members = STYLES[objective], runs[runs["objective"] == objective]
        markers = shapes if len(shapes) <= _MOST_SHAPES else dict.fromkeys(shapes, style.marker)
        _draw_envelope(axes, fit, style)
        _draw_runs(axes, members, convention, fits.unit, style, markers)
    axes.set_yscale("log")  # a power law is a straight line
    axes.margins(x=0.06, y=0.08)
    drawn = losses(runs, fits.unit)[0]
    hold_limits(axes, drawn, max(1.1, drawn.max() / drawn.min()))
    axes.set_ylabel(f"validation loss ({UNIT_NAMES[fits.unit]})", color=INK)
    axes.set_xlabel(flops_label(convention), color=INK)
    flops_axis(axes)
    label_plain(axes.yaxis)
    dress(axes)
    if fits.unit == "nats_per_token":
        _add_bits_per_byte(axes, runs)
    side_legend(figure, _legend(runs, fits, convention, shapes))
    return figure


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


def _legend(runs: pd.DataFrame, fits: StudyFits, convention: Convention, shapes: dict[str, str]) -> list[list[Line2D]]:
    envelopes = fits.envelopes(convention)
    many = len(shapes) > _MOST_SHAPES
    lines = [
        STYLES[name].handle(
            STYLES[name].label
            + ("" if fit.law is None else "\n" + exponent_text("loss", fit.law.exponent, fit.law.sign)),
            marker=STYLES[name].marker if many else "",
            face=STYLES[name].color,
        )
        for name, fit in envelopes.items()
    ]
    shape_handles = (
        [note(f"{len(shapes)} shapes,\nnot told apart")]
        if many
        else [marker_handle(marker, name) for name, marker in shapes.items()]
    )
    others = any(
        len(best_of_budgets(members, fits.unit)) < len(members)
        for _, members in runs.groupby("objective", observed=True)
    )
    kinds = [marker_handle("o", "best of its budget"), marker_handle("o", "other run", filled=False)] if others else []
    notes = [note("bars: ± 1 s.e.")] if np.isfinite(losses(runs, fits.unit)[1]).any() else []
    if any(fit.law is not None for fit in envelopes.values()):
        notes.append(note("band and [ ]: 95 %"))
    return [lines, shape_handles, kinds, notes]
