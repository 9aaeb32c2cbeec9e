"""Figures of a scaling study: each function returns a figure; ``write_figure`` writes one, ``draw_study`` all."""

from __future__ import annotations

from llada_lightning.scaling.plots.scaling import scaling_curve
from llada_lightning.scaling.plots.style import write_figure
from llada_lightning.scaling.plots.tasks import paper_figure3, task_accuracy

__all__ = ["paper_figure3", "scaling_curve", "task_accuracy", "write_figure"]
