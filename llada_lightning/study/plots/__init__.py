"""Figures of a scaling study: each function returns a figure; ``write_figure`` writes one, ``draw_study`` all."""

from __future__ import annotations

from llada_lightning.study.plots.isoflop import isoflop_curves, optimum
from llada_lightning.study.plots.multiplier import compute_multiplier
from llada_lightning.study.plots.parametric import parametric_residuals
from llada_lightning.study.plots.plan import plan_grid
from llada_lightning.study.plots.scaling import scaling_curve
from llada_lightning.study.plots.study import draw_study, study_figures
from llada_lightning.study.plots.style import write_figure
from llada_lightning.study.plots.tasks import paper_figure3, task_accuracy

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
