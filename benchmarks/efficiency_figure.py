"""The figure of the efficiency study: quality against throughput, and memory against lengths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from llada_lightning.study.plots.style import GREY, INK, dress, new_figure

LLADA_COLORS = ("#D55E00", "#E69F00", "#009E73", "#CC79A7")
LLADA_MARKERS = "sD^v"
LABEL_OFFSETS = ((-2, 6), (-2, -12), (2, 6), (2, -12))
"""Points from a marker to its steps: the curves lie close, so every other one is labelled below."""

ARM_COLOR = "#0072B2"


def efficiency_figure(result: dict[str, Any]) -> Figure:
    """Left: nats a token and entropy against tokens a second; right: memory above the weights, where measured.

    Args:
        result: as ``efficiency.json`` holds it.
    """
    memory = result["memory"]
    figure = new_figure(12.5 if memory else 8.5, 6.2)
    grid = figure.add_gridspec(2, 2 if memory else 1, height_ratios=[2.2, 1], width_ratios=[1.45, 1] if memory else [1])
    nats = figure.add_subplot(grid[0, 0])
    entropy = figure.add_subplot(grid[1, 0], sharex=nats)
    _quality(nats, entropy, result)
    figure.legend(
        *nats.get_legend_handles_labels(),
        loc="outside lower center",
        ncols=3,
        frameon=False,
        fontsize=8,
        labelcolor=INK,
    )
    if memory:
        _memory(figure.add_subplot(grid[:, 1]), memory)
    return figure


def family_styles(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """How each family of samplers is drawn; a threshold's star has the colour of the blocks it works on."""
    curves = list(dict.fromkeys(row["family"] for row in rows if row["steps"] is not None))
    styles: dict[str, dict[str, Any]] = {
        family: {"color": LLADA_COLORS[i], "marker": LLADA_MARKERS[i], "linestyle": "-", "markersize": 5.5}
        for i, family in enumerate(curves)
    }
    for family in dict.fromkeys(row["family"] for row in rows if row["steps"] is None):
        hollow: dict[str, Any] = {"markerfacecolor": "white"} if "no cache" in family else {}
        if family.startswith("arm"):
            styles[family] = {"color": ARM_COLOR, "marker": "o", "linestyle": "", "markersize": 8, **hollow}
        else:
            color = LLADA_COLORS[3 if "dual" in family else 1]
            styles[family] = {"color": color, "marker": "*", "linestyle": "", "markersize": 11}
    return styles


def _quality(nats: Axes, entropy: Axes, result: dict[str, Any]) -> None:
    rows = result["samplers"]
    for number, (family, style) in enumerate(family_styles(rows).items()):
        points = [row for row in rows if row["family"] == family]
        x = [row["tokens_per_second"] for row in points]
        for axes, value, error in ((nats, "nats_per_token", "nats_stderr"), (entropy, "entropy", "entropy_stderr")):
            errors = np.nan_to_num(np.array([row[error] for row in points], float))  # one prompt tells no error
            y = [row[value] for row in points]
            axes.errorbar(x, y, errors, fmt="none", ecolor=style["color"], elinewidth=0.8, alpha=0.5)
            axes.plot(x, y, label=family, linewidth=1.2, zorder=3, **style)
        if points[0]["steps"] is not None:
            for row in points:
                _label(nats, row, style["color"], LABEL_OFFSETS[number])
    real = result["continuations"]
    if real is not None:
        nats.axhline(real["nats_per_token"], color=GREY, linestyle=":", zorder=1, label="the true continuations")
        entropy.axhline(real["entropy"], color=GREY, linestyle=":", zorder=1)
    for axes in (nats, entropy):
        dress(axes)
    entropy.set_ylim(bottom=0)
    nats.set_xscale("log")
    nats.xaxis.set_major_locator(LogLocator(10, subs=(1.0, 2.0, 5.0), numticks=20))
    nats.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    nats.xaxis.set_minor_formatter(NullFormatter())
    nats.tick_params(labelbottom=False)
    nats.set_ylabel("nats a token under the judge\n(lower: likelier text)")
    entropy.set_ylabel("entropy of words, nats\n(low: repetition)")
    setting = result["settings"]
    entropy.set_xlabel(f"tokens a second (batch {setting['batch']}, {result['hardware']['device']})")
    nats.set_title(f"Answers of {setting['length']} tokens; small numbers: steps", fontsize=10, color=INK)


def _label(axes: Axes, row: dict[str, Any], color: str, offset: tuple[int, int]) -> None:
    axes.annotate(
        str(row["steps"]),
        (row["tokens_per_second"], row["nats_per_token"]),
        xytext=offset,
        textcoords="offset points",
        fontsize=7,
        color=color,
        zorder=4,
    )


def _memory(axes: Axes, rows: Sequence[dict[str, Any]]) -> None:
    styles: dict[str, dict[str, Any]] = {
        "llada": {"color": LLADA_COLORS[0], "marker": "s"},
        "arm, no cache": {"color": ARM_COLOR, "marker": "o", "markerfacecolor": "white"},
        "arm, cache": {"color": ARM_COLOR, "marker": "o"},
    }
    unit, size = ("GB", 1e9) if max(map(above_weights, rows)) >= 1e9 else ("MB", 1e6)
    inputs = sorted({row["input"] for row in rows})
    outputs = sorted({row["output"] for row in rows})
    lines: list[Any] = ["-", "--", ":", "-."]
    for sampler, style in styles.items():
        for number, given in enumerate(inputs):
            points = sorted(
                (r for r in rows if (r["sampler"], r["input"]) == (sampler, given)), key=lambda r: r["output"]
            )
            x, y = [row["output"] for row in points], [above_weights(row) / size for row in points]
            axes.plot(x, y, linestyle=lines[number % len(lines)], markersize=5.5, zorder=3, **style)
    dress(axes)
    axes.set_xscale("log", base=2)
    axes.set_xticks(outputs, [str(output) for output in outputs])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_ylim(0, 1.25 * max(map(above_weights, rows)) / size)  # room for the legend
    axes.set_xlabel("output, tokens")
    axes.set_ylabel(f"peak memory above the weights, {unit}")
    axes.set_title("One answer", fontsize=10, color=INK)
    handles = [Line2D([], [], label=name, linestyle="", **style) for name, style in styles.items()]
    handles += [
        Line2D([], [], color=GREY, linestyle=lines[number % len(lines)], label=f"input {given}")
        for number, given in enumerate(inputs)
    ]
    axes.legend(handles=handles, frameon=False, fontsize=8, labelcolor=INK, loc="upper left")


def above_weights(row: dict[str, Any]) -> int:
    """Bytes that writing takes beyond what was there before."""
    return int(row["peak_bytes"] - row["baseline_bytes"])
