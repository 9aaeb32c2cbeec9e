"""The parts of a step, side by side."""

from __future__ import annotations

from collections.abc import Mapping

from llada_lightning.study.plots.style import GREY, INK, StudyFigure, new_figure

_COLORS = ("#F0E442", "#CC79A7", "#56B4E9", "#E69F00", "#009E73", "#D55E00", GREY)
"""Okabe and Ito's, none used twice."""
_NAMED_FROM = 0.05
"""The smallest share of the step whose percentage is written on its bar."""


def step_phases(milliseconds: Mapping[str, float], labels: Mapping[str, str]) -> StudyFigure:
    """One bar: a step, each of its phases as long as it takes.

    Args:
        milliseconds: The duration of each phase, in the order of a step.
        labels: The label of each phase.
    """
    figure = new_figure(8.0, 1.9)
    axes = figure.subplots()
    step, left = sum(milliseconds.values()), 0.0
    for (name, length), color in zip(milliseconds.items(), _COLORS, strict=True):
        label = f"{labels[name]}: {length:.3g} ms"
        axes.barh(0, length, left=left, color=color, edgecolor="white", linewidth=0.8, label=label)
        if length >= _NAMED_FROM * step:
            axes.text(left + length / 2, 0, f"{length / step:.0%}", ha="center", va="center", fontsize=9, color=INK)
        left += length
    axes.set_xlim(0, step)
    axes.set_yticks([])
    axes.set_xlabel("milliseconds of a step", fontsize=10, color=INK)
    axes.spines[["left", "right", "top"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=8, labelcolor=INK)
    return figure
