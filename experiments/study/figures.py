"""The report's own figures; those of each study alone are `llada curves`'s."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from llada_lightning.study.plots import write_figure
from llada_lightning.study.plots.style import (
    GREY,
    INK,
    StudyFigure,
    dress,
    flops_axis,
    interval_bars,
    label_counts,
    label_plain,
    new_figure,
    objective_styles,
)
from matched import Matched
from report_text import short_shape

SMDM = 16.0
"""Nie et al. 2024, arXiv:2410.18514: FLOPs of masked diffusion over those of autoregression at equal loss."""
SMDM_RANGE = (1e18, 1e20)
"""Its FLOPs, as the LLaDA paper tells them."""


def multipliers(studies: dict[str, Sequence[Matched]], published: Sequence[Matched]) -> StudyFigure:
    """The compute multiplier by 6ND over the FLOPs of ``arm``, read off: ours at 95 %, the published without errors."""
    figure = new_figure(8.2, 3.8)
    axes = figure.subplots()
    for (name, found), color, marker in zip(studies.items(), ("#0072B2", "#D55E00"), "os", strict=True):
        values = [one.multiplier.value for one in found]
        bars = interval_bars(values, [one.multiplier.low for one in found], [one.multiplier.high for one in found])
        flops = [one.arm_flops for one in found]
        axes.errorbar(flops, values, yerr=bars, fmt=f"{marker}-", color=color, markersize=5, capsize=3, label=name)
    values = [one.multiplier.value for one in published]
    axes.plot([one.arm_flops for one in published], values, "^-", color="#009E73", markersize=5, label="published, C4")
    axes.plot(SMDM_RANGE, (SMDM, SMDM), ":", color=GREY, linewidth=1.5, label="16, SMDM")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5), numticks=20))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_ylabel("compute multiplier of llada", color=INK)
    axes.set_xlabel("training FLOPs of arm (6ND)", color=INK)
    flops_axis(axes)
    dress(axes)
    figure.legend(loc="outside right upper", frameon=False, fontsize=9, labelcolor=INK)
    return figure


def repeats(found: pd.DataFrame) -> StudyFigure:
    """Loss against distinct tokens at one budget: at the end of the run, and the best validation on the way."""
    figure = new_figure(8.2, 3.8)
    axes = figure.subplots()
    styles = objective_styles(("arm", "llada"))
    for objective, style in styles.items():
        axes.errorbar(
            found["unique"],
            found[objective],
            yerr=found[f"{objective}_stderr"],
            fmt=style.marker + style.line,
            color=style.color,
            markerfacecolor=style.face,
            markersize=5.5,
            capsize=3,
        )
        axes.plot(found["unique"], found[f"{objective}_best"], ":", color=style.color)
    lines = [style.handle(marker=style.marker) for style in styles.values()]
    lines.append(Line2D([], [], linestyle=":", color=INK, label="best on the way"))
    axes.set_yscale("log")
    label_plain(axes.yaxis)
    axes.set_xscale("log")
    label_counts(axes.xaxis, axes.get_xlim())
    axes.set_xlabel("distinct training tokens", color=INK)
    axes.set_ylabel("validation loss (nats/token)", color=INK)
    dress(axes)
    figure.legend(handles=lines, loc="outside right upper", frameon=False, fontsize=9, labelcolor=INK)
    return figure


def plateaus(histories: dict[str, pd.DataFrame]) -> StudyFigure:
    """Training loss of the trunks of ``llada`` against tokens, a panel a study, dark the longer runs."""
    figure = new_figure(9.0, 3.6)
    for axes, (name, history) in zip(figure.subplots(1, len(histories)), histories.items(), strict=True):
        trunks = history[history["objective"] == "llada"].dropna(subset="train_nats_per_token")
        longest = trunks.groupby("shape")["tokens"].max().sort_values(ascending=False)
        for shape, color in zip(longest.index, colormaps["viridis"](np.linspace(0, 0.92, len(longest))), strict=True):
            own = trunks[trunks["shape"] == shape]
            axes.plot(own["tokens"], own["train_nats_per_token"], color=color, linewidth=1.4, label=short_shape(shape))
        axes.legend(frameon=False, fontsize=8, labelcolor=INK)
        axes.set_title(name, fontsize=10, color=INK)
        axes.set_xscale("log")
        label_counts(axes.xaxis, axes.get_xlim())
        axes.set_xlabel("training tokens", color=INK)
        label_plain(axes.yaxis)
        dress(axes)
    figure.axes[0].set_ylabel("training loss (nats/token)", color=INK)
    return figure


def draw(cpu: Any, gpu: Any, published: Sequence[Matched], folder: Path) -> None:
    """All of them into a folder, as PNG and SVG."""
    ours = {"two cores, 512 words": cpu.read_offs.at("6nd").rows, "one H100, 4,096 words": gpu.read_offs.at("6nd").rows}
    write_figure(multipliers(ours, published), folder, "multipliers")
    write_figure(repeats(cpu.repeats()), folder, "repeats")
    histories = {name: pd.read_csv(study.folder / "history.csv") for name, study in (("two cores", cpu), ("H100", gpu))}
    write_figure(plateaus(histories), folder, "plateaus")
