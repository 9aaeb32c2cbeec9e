"""The grid of a planned study: which sizes at which budgets."""

from __future__ import annotations

import pandas as pd

from llada_lightning.study.fits import OBJECTIVES
from llada_lightning.study.plots.style import (
    INK,
    STYLES,
    StudyFigure,
    dress,
    label_counts,
    label_powers,
    new_figure,
    note,
    side_legend,
)

_DODGE = {"arm": 1 / 1.03, "llada": 1.03}
"""Two objectives of one size stand side by side."""


def plan_grid(table: pd.DataFrame) -> StudyFigure:
    """Sizes and tokens per parameter of a plan against its budgets; a line joins the budgets that one trunk serves.

    Args:
        table: of ``Plan.table()``: ``objective``, ``budget``, ``params_nonembedding``, ``tokens_per_param``, ``trunk``.
    """
    figure = new_figure(9.0, 3.6)
    panels = figure.subplots(1, 2)
    objectives = [name for name in OBJECTIVES if (table["objective"] == name).any()]
    for panel, column in zip(panels, ("params_nonembedding", "tokens_per_param"), strict=True):
        for (objective, _), members in table.sort_values("budget").groupby(["objective", "trunk"], observed=True):
            style = STYLES[str(objective)]
            panel.plot(
                members["budget"] * _DODGE[str(objective)],
                members[column],
                style.line,
                marker=style.marker,
                color=style.color,
                markerfacecolor=style.face,
                markersize=5,
                linewidth=0.8,
            )
        panel.set_xscale("log")
        panel.set_yscale("log")
        panel.margins(x=0.1)
        label_powers(panel.xaxis, panel.get_xlim())
        label_counts(panel.yaxis, panel.get_ylim())
        dress(panel)
    panels[0].set_title("non-embedding parameters N", fontsize=10, color=INK)
    panels[1].set_title("tokens per parameter D/N", fontsize=10, color=INK)
    figure.supxlabel("budget (training FLOPs)", fontsize=10, color=INK)
    handles = [STYLES[name].handle(name, marker=STYLES[name].marker) for name in objectives]
    side_legend(figure, [handles, [note("a line: one trunk")] if table["trunk"].duplicated().any() else []])
    return figure
