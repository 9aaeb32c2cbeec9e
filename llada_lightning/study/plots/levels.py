"""The loss of one run by noise level, over its training."""

from __future__ import annotations

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize

from llada_lightning.study.levels import MIDDLES, RunLevels
from llada_lightning.study.plots.style import GREY, INK, StudyFigure, dress, label_plain, new_figure, shades

_TITLES = {"train": "training, mean over each part", "val": "validation"}


def loss_by_level(levels: RunLevels) -> StudyFigure:
    """Loss against noise level: a line for each part of the training, and for each validation, darker the later."""
    color, marker = ("#0072B2", "o") if levels.objective is None else (levels.objective.colour, levels.objective.marker)
    last = max(own.steps[-1] for own in levels.curves.values())
    cmap = LinearSegmentedColormap.from_list("steps", shades(color, 2))
    figure = new_figure(3.9 * len(levels.curves) + 1.0, 3.9)
    panels = figure.subplots(1, len(levels.curves), sharey=True, squeeze=False)[0]
    for panel, (split, own) in zip(panels, levels.curves.items(), strict=True):
        for step, nats_T in zip(own.steps, own.nats_WT, strict=True):
            known_T = np.isfinite(nats_T)
            panel.plot(
                MIDDLES[known_T], nats_T[known_T], marker=marker, color=cmap(step / last), markersize=3.5, linewidth=1.4
            )
        panel.set_title(_TITLES[split], fontsize=9, color=INK)
        panel.set_xlabel("noise level t", color=INK)
        panel.set_xlim(0, 1)
        label_plain(panel.xaxis)
        label_plain(panel.yaxis)
        dress(panel)
    panels[0].set_ylabel(f"loss ({levels.unit})", color=INK)
    bar = figure.colorbar(ScalarMappable(Normalize(0, last), cmap), ax=list(panels), pad=0.02)
    bar.set_label("step", color=INK)
    bar.outline.set_visible(False)
    bar.ax.tick_params(color=GREY, labelcolor=INK)
    name = levels.run if levels.objective is None else f"{levels.run}: {levels.objective.name}"
    figure.suptitle(name, fontsize=10, color=INK)
    return figure
