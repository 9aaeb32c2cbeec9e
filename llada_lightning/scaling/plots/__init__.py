"""Figures of a scaling study: each function returns a figure; ``write_figure`` writes one, ``draw_study`` all."""

from __future__ import annotations

from llada_lightning.scaling.plots.isoflop import isoflop_curves
from llada_lightning.scaling.plots.multiplier import compute_multiplier
from llada_lightning.scaling.plots.optimum import optimum
from llada_lightning.scaling.plots.parametric import parametric_residuals
from llada_lightning.scaling.plots.plan import plan_grid
from llada_lightning.scaling.plots.scaling import scaling_curve
from llada_lightning.scaling.plots.study import draw_study, study_figures
from llada_lightning.scaling.plots.style import write_figure
from llada_lightning.scaling.plots.tasks import paper_figure3, task_accuracy

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
