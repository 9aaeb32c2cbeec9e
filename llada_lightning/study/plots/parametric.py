"""How well the parametric law L(N, D) fits."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from llada_lightning.study.fits import UNIT_NAMES, ParametricFit, StudyFits, Unit, losses, usable_runs
from llada_lightning.study.fits.runs import budget_members, planned_flops
from llada_lightning.study.plots.style import (
    GREY,
    INK,
    MARKERS,
    STYLES,
    StudyFigure,
    dress,
    label_plain,
    marker_handle,
    new_figure,
    note,
    power_of_ten,
    shades,
    side_legend,
)
from llada_lightning.support.errors import UserError


def parametric_residuals(table: pd.DataFrame, fits: StudyFits) -> StudyFigure:
    """Observed loss against the law's, in percent, over the predicted loss; one panel an objective.

    Runs of one budget share a marker and a shade: a pattern within a budget is what the law cannot follow.

    Args:
        table: a results table.
        fits: its fits.

    Raises:
        UserError: no objective has a parametric fit.
    """
    laws = {name: fit.parametric for name, fit in fits.objectives.items() if fit.parametric is not None}
    if not laws:
        raise UserError("figure: no parametric fit; it needs six runs or more, of three sizes and three token counts")
    runs = usable_runs(table)
    figure = new_figure(3.6 * len(laws) + 1.8, 3.9)
    panels = figure.subplots(1, len(laws), sharey=True, squeeze=False)[0]
    budgets: dict[str, str] = {}
    for panel, (objective, law) in zip(panels, laws.items(), strict=True):
        members = runs[runs["objective"] == objective].reset_index(drop=True)
        budgets |= _draw_residuals(panel, members, law, objective, fits.unit)
        panel.axhline(0, color=GREY, linewidth=1, zorder=1)
        panel.set_title(f"{STYLES[objective].label}\n{_describe(law)}", fontsize=9, color=INK)
        panel.set_xlabel(f"predicted loss ({UNIT_NAMES[fits.unit]})", color=INK)
        panel.margins(x=0.08, y=0.1)
        label_plain(panel.xaxis, 6)
        label_plain(panel.yaxis)
        dress(panel)
    panels[0].set_ylabel("observed over predicted − 1 (%)", color=INK)
    shown = [note("6ND"), *(marker_handle(marker, label) for label, marker in budgets.items())]
    errors = [note("bars: ± 1 s.e.")] if np.isfinite(losses(runs, fits.unit)[1]).any() else []
    side_legend(figure, [shown, errors])
    return figure


def _draw_residuals(axes: Axes, runs: pd.DataFrame, law: ParametricFit, objective: str, unit: Unit) -> dict[str, str]:
    """Draws one objective's runs and returns the marker of each budget by its label."""
    predicted = law.loss(runs["params_nonembedding"].to_numpy(float), runs["tokens"].to_numpy(float))
    observed, stderr = losses(runs, unit)
    flops = planned_flops(runs)
    groups = budget_members(flops)
    labels: dict[str, str] = {}
    for number, (members, color) in enumerate(zip(groups, shades(STYLES[objective].color, len(groups)), strict=True)):
        marker = MARKERS[number % len(MARKERS)]
        labels[power_of_ten(float(np.exp(np.log(flops[members]).mean())))] = marker
        axes.errorbar(
            predicted[members],
            100 * (observed[members] / predicted[members] - 1),
            yerr=100 * np.nan_to_num(stderr[members] / predicted[members]),
            fmt=marker,
            color=color,
            markersize=5,
            elinewidth=1,
            zorder=3,
        )
    return labels


def _describe(law: ParametricFit) -> str:
    fit = f"rms {100 * law.rms_residual:.2f} %, R² {law.r_squared:.4f}"
    chi = "" if law.reduced_chi_square is None else f", χ²/dof {law.reduced_chi_square:.2f}"
    return fit + chi + ("" if law.identified else "\nnot identified")
