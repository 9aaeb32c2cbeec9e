"""Figures of a scaling study: each function returns a figure; ``write_figure`` writes one, ``draw_study`` all."""

from __future__ import annotations

from llada_lightning.study.plots.draw import draw_study, plan_grid, study_figures
from llada_lightning.study.plots.loss import isoflop_curves, parametric_residuals, scaling_curve
from llada_lightning.study.plots.optima import compute_multiplier, optimum
from llada_lightning.study.plots.style import write_figure
from llada_lightning.study.plots.task_scores import paper_figure3, task_accuracy

__all__ = [
    "compute_multiplier",
    "draw_study",
    "isoflop_curves",
    "optimum",
    "paper_figure3",
    "parametric_residuals",
    "plan_grid",
    "scaling_curve",
    "study_figures",
    "task_accuracy",
    "write_figure",
]
