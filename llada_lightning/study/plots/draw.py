"""The figure of a planned study, and all figures that a finished study has the data for."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from llada_lightning.compute.flops import Convention
from llada_lightning.study.fits import StudyFits, objective_names, usable_runs
from llada_lightning.study.plots.loss import isoflop_curves, parametric_residuals, scaling_curve
from llada_lightning.study.plots.optima import compute_multiplier, has_optimum, optimum
from llada_lightning.study.plots.style import (
    INK,
    StudyFigure,
    check_counted,
    dress,
    label_counts,
    label_powers,
    new_figure,
    note,
    objective_styles,
    side_legend,
    write_figure,
)
from llada_lightning.study.plots.task_scores import task_accuracy, task_names


def study_figures(table: pd.DataFrame, fits: StudyFits, convention: Convention = "6nd") -> dict[str, StudyFigure]:
    """The figures that a study has the data for, by name.

    A figure without its fit is left out, and the notes of ``fits`` tell why.

    ``scaling`` always; ``isoflop`` with three shapes at a budget; ``optimum`` where there is one; ``multiplier`` (its
    panels are the conventions) and ``parametric`` with such fits; ``tasks`` with columns ``task_<name>``.

    Raises:
        UserError: the table lacks the FLOPs of this convention.
    """
    check_counted(fits, convention)
    budgets = [budget for fit in fits.objectives.values() for budget in fit.isoflop[convention].budgets]
    laws = [fit.parametric for fit in fits.objectives.values() if fit.parametric is not None]
    figures = {"scaling": scaling_curve(table, fits, convention)}
    if budgets:
        figures["isoflop"] = isoflop_curves(table, fits, convention)
    if has_optimum(fits, convention):
        figures["optimum"] = optimum(fits, convention)
    if any(entry.shown for entry in fits.compute_multiplier + fits.multiplier_curve):
        figures["multiplier"] = compute_multiplier(fits)
    if laws:
        figures["parametric"] = parametric_residuals(table, fits)
    if task_names(usable_runs(table)):
        figures["tasks"] = task_accuracy(usable_runs(table), convention)
    return figures


def draw_study(
    table: pd.DataFrame, fits: StudyFits, folder: Path | str, convention: Convention = "6nd"
) -> dict[str, str]:
    """Writes each of ``study_figures`` to ``folder`` as PNG and SVG.

    Returns:
        The figure's name -> the path of its PNG; the SVG lies beside it.
    """
    figures = study_figures(table, fits, convention)
    return {name: str(write_figure(figure, folder, name)) for name, figure in figures.items()}


# --- a plan ----------------------------------------------------------------------------------------------------------

_DODGE = 1.06
"""The factor between objectives of one size, which are set side by side."""


def plan_grid(table: pd.DataFrame) -> StudyFigure:
    """Sizes and tokens per parameter of a plan against its budgets; a line joins the budgets that one trunk serves.

    Args:
        table: The table of ``Plan.table()``: ``objective``, ``budget``, ``params_nonembedding``, ``tokens_per_param``,
            ``trunk``.
    """
    figure = new_figure(9.0, 3.6)
    panels = figure.subplots(1, 2)
    styles = objective_styles(objective_names(table))
    dodges = {name: _DODGE ** (number - (len(styles) - 1) / 2) for number, name in enumerate(styles)}
    for panel, column in zip(panels, ("params_nonembedding", "tokens_per_param"), strict=True):
        for (objective, _), members in table.sort_values("budget").groupby(["objective", "trunk"], observed=True):
            style = styles[str(objective)]
            panel.plot(
                members["budget"] * dodges[str(objective)],
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
    handles = [style.handle(name, marker=style.marker) for name, style in styles.items()]
    side_legend(figure, [handles, [note("a line: one trunk")] if table["trunk"].duplicated().any() else []])
    return figure
