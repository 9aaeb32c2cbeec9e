"""The optimum of a budget, N_opt, D_opt and tokens per parameter, as the IsoFLOP and the parametric fit give it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from llada_lightning.scaling.fits import (
    BUDGET_TOLERANCE,
    IsoflopBudget,
    IsoflopFit,
    ObjectiveFits,
    ParametricFit,
    StudyFits,
)
from llada_lightning.scaling.flops import Convention
from llada_lightning.scaling.plots.style import (
    GREY,
    INK,
    STYLES,
    StudyFigure,
    Style,
    check_counted,
    dress,
    exponent_text,
    flops_axis,
    flops_label,
    hold_limits,
    interval_bars,
    label_counts,
    new_figure,
    note,
    side_legend,
)

_TITLES = ("parameters N at the optimum", "tokens D at the optimum", "tokens per parameter D/N")


def optimum(fits: StudyFits, convention: Convention = "6nd") -> StudyFigure:
    """N_opt, D_opt and tokens per parameter against the budget, both objectives.

    IsoFLOP optima are points with 95 % intervals (those outside of the grid are left out), the lines their power laws;
    the bands with a dotted middle are the parametric frontier and its 95 %, over the budgets that it was fitted on.

    Raises:
        UserError: the table lacks the FLOPs of this convention.
    """
    check_counted(fits, convention)
    figure = new_figure(11.4, 3.6)
    panels = figure.subplots(1, 3)
    for objective, fit in fits.objectives.items():
        _draw_isoflop(panels, _interior(fit, convention), fit.isoflop[convention], STYLES[objective])
        if fit.parametric is not None and _has_frontier(fit, convention):
            _draw_frontier(panels, fit.parametric, STYLES[objective], convention)
    for panel, title in zip(panels, _TITLES, strict=True):
        panel.set_title(title, fontsize=10, color=INK)
        panel.set_yscale("log")
        flops_axis(panel)
        hold_limits(panel, np.concatenate([np.ravel(line.get_ydata()) for line in panel.get_lines()]), 10)
        label_counts(panel.yaxis, panel.get_ylim())
        dress(panel)
    figure.supxlabel(flops_label(convention), fontsize=10, color=INK)
    side_legend(figure, _legend(fits, convention))
    return figure


def has_optimum(fits: StudyFits, convention: Convention) -> bool:
    """Whether there is anything to draw: an IsoFLOP optimum inside of its grid, or a frontier over some budgets."""
    return any(_interior(fit, convention) or _has_frontier(fit, convention) for fit in fits.objectives.values())


def _interior(fit: ObjectiveFits, convention: Convention) -> list[IsoflopBudget]:
    return [budget for budget in fit.isoflop[convention].budgets if budget.interior]


def _has_frontier(fit: ObjectiveFits, convention: Convention) -> bool:
    """A frontier over the budgets fitted on is a line only where they differ, and known only where the fit is."""
    if fit.parametric is None or not fit.parametric.identified:
        return False
    low, high = fit.parametric.flops_ranges[convention]
    return high > low * BUDGET_TOLERANCE


def _draw_isoflop(panels: Sequence[Axes], budgets: list[IsoflopBudget], fit: IsoflopFit, style: Style) -> None:
    if not budgets:
        return
    flops = np.array([budget.flops for budget in budgets])
    for panel, name in zip(panels, ("n_opt", "d_opt", "tokens_per_param"), strict=True):
        estimates = [getattr(budget, name) for budget in budgets]
        values = [estimate.value for estimate in estimates]
        lows, highs = [estimate.low for estimate in estimates], [estimate.high for estimate in estimates]
        panel.errorbar(
            flops,
            values,
            yerr=interval_bars(values, lows, highs),
            fmt=style.marker,
            color=style.color,
            markerfacecolor=style.face,
            markersize=5,
            elinewidth=1.1,
            capsize=3,
            zorder=4,
        )
    if fit.n_law is None or fit.d_law is None:
        return
    line = np.geomspace(flops.min(), flops.max(), 50)
    n, d = fit.n_law.value(line), fit.d_law.value(line)
    for panel, optima in zip(panels, (n, d, d / n), strict=True):
        panel.plot(line, optima, style.line, color=style.color, linewidth=1.6, zorder=3)


def _draw_frontier(panels: Sequence[Axes], fit: ParametricFit, style: Style, convention: Convention) -> None:
    flops = np.geomspace(*fit.flops_ranges[convention], 50)
    frontier = fit.frontier(convention, flops)
    bands = [
        (frontier.n_opt, frontier.n_low, frontier.n_high),
        (frontier.d_opt, frontier.d_low, frontier.d_high),
        # At given FLOPs more parameters are fewer tokens: the ends of N and D belong together crosswise.
        (frontier.d_opt / frontier.n_opt, frontier.d_low / frontier.n_high, frontier.d_high / frontier.n_low),
    ]
    for panel, (middle, low, high) in zip(panels, bands, strict=True):
        panel.plot(flops, middle, ":", color=style.color, linewidth=1.6, zorder=2)
        panel.fill_between(flops, low, high, color=style.color, alpha=0.16, linewidth=0, zorder=1)


def _legend(fits: StudyFits, convention: Convention) -> list[list[Artist]]:
    groups: list[list[Artist]] = []
    for objective, fit in fits.objectives.items():
        fitted = fit.isoflop[convention]
        texts = [
            exponent_text(symbol, law.exponent)
            for symbol, law in (("N", fitted.n_law), ("D", fitted.d_law))
            if law is not None
        ]
        style = STYLES[objective]
        marker = style.marker if _interior(fit, convention) else ""
        groups.append([style.handle("\n".join([objective, *texts]), marker=marker)])
    members = fits.objectives.values()
    isoflop = any(_interior(fit, convention) for fit in members)
    frontier = any(_has_frontier(fit, convention) for fit in members)
    middle = Line2D([], [], color=GREY, linestyle=":", linewidth=1.6, label="parametric frontier")
    band = Patch(color=GREY, alpha=0.3, linewidth=0, label="its 95 %")
    laws = any(fit.isoflop[convention].n_law is not None for fit in members)
    points = note("points, lines: IsoFLOP" if laws else "points: IsoFLOP")
    ends = note("bars and [ ]: 95 %" if laws else "bars: 95 %")
    return [*groups, [points, ends] if isoflop else [], [middle, band] if frontier else []]
