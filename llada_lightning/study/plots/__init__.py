"""Figures of a scaling study: each function returns a figure; ``write_figure`` writes one, ``draw_study`` all."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from llada_lightning.compute.flops import Convention
from llada_lightning.study.fits import StudyFits, usable_runs
from llada_lightning.study.names import with_short_names
from llada_lightning.study.plots.loss import isoflop_curves, parametric_residuals, scaling_curve
from llada_lightning.study.plots.optima import compute_multiplier, has_optimum, optimum
from llada_lightning.study.plots.style import INK, StudyFigure, write_figure
from llada_lightning.study.plots.tables import paper_figure3, plan_grid, task_accuracy, task_names

__all__ = [
    "compute_multiplier", "draw_study", "isoflop_curves", "optimum", "paper_figure3", "parametric_residuals",
    "plan_grid", "scaling_curve", "study_figures", "task_accuracy", "write_figure",
]  # fmt: skip


def study_figures(
    table: pd.DataFrame, fits: StudyFits, convention: Convention = "6nd", over_paper: bool = False
) -> dict[str, StudyFigure]:
    """The figures that a study has the data for, by name.

    A figure without its fit is left out, and the notes of ``fits`` tell why.

    ``scaling`` always; ``isoflop`` with three shapes at a budget; ``optimum`` where there is one; ``multiplier`` (its
    panels are the conventions) and ``parametric`` with such fits; ``tasks`` with columns ``task_<name>``; ``paper``,
    the same over the points of the paper, where that is asked for.

    Variants have their short names.

    Raises:
        UserError: The table lacks the FLOPs of this convention.
    """
    table, fits = with_short_names(table, fits)
    members = fits.objectives.values()
    figures = {"scaling": scaling_curve(table, fits, convention)}
    if any(fit.isoflop[convention].budgets for fit in members):
        figures["isoflop"] = isoflop_curves(table, fits, convention)
    if has_optimum(fits, convention):
        figures["optimum"] = optimum(fits, convention)
    if any(entry.shown for entry in fits.compute_multiplier + fits.multiplier_curve):
        asked_first = sorted(fits.conventions, key=lambda name: name != convention)
        figures["multiplier"] = compute_multiplier(fits, asked_first)
    if any(fit.parametric for fit in members):
        figures["parametric"] = parametric_residuals(table, fits)
    if fits.yardstick is not None:
        for figure in figures.values():
            figure.suptitle(f"yardstick: {fits.yardstick}, exact", fontsize=10, color=INK)
    if task_names(usable_runs(table)):
        figures["tasks"] = task_accuracy(usable_runs(table), convention)
    if over_paper:
        usable = usable_runs(table)["run"]
        figures["paper"] = paper_figure3(convention, table[table["run"].isin(usable)])
    return figures


def draw_study(
    table: pd.DataFrame,
    fits: StudyFits,
    folder: Path | str,
    convention: Convention = "6nd",
    over_paper: bool = False,
) -> dict[str, str]:
    """Writes each of ``study_figures`` to ``folder`` as PNG and SVG.

    Returns:
        The figure's name -> the path of its PNG; the SVG lies beside it.
    """
    figures = study_figures(table, fits, convention, over_paper)
    return {name: str(write_figure(figure, folder, name)) for name, figure in figures.items()}
