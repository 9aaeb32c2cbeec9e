"""All figures that a study has the data for."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from llada_lightning.compute.flops import Convention
from llada_lightning.study.fits import StudyFits, usable_runs
from llada_lightning.study.plots.isoflop import has_optimum, isoflop_curves, optimum
from llada_lightning.study.plots.multiplier import compute_multiplier
from llada_lightning.study.plots.parametric import parametric_residuals
from llada_lightning.study.plots.scaling import scaling_curve
from llada_lightning.study.plots.style import StudyFigure, check_counted, write_figure
from llada_lightning.study.plots.tasks import task_accuracy, task_names


def study_figures(table: pd.DataFrame, fits: StudyFits, convention: Convention = "6nd") -> dict[str, StudyFigure]:
    """The figures that a study has the data for, by name: what lacks its fit is left out, and ``fits`` says why.

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
