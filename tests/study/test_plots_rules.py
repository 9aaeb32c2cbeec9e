"""The figure of a tuning study: what is in its panels."""

from __future__ import annotations

import numpy as np
import pytest

from helpers.tuning_studies import BOWLS, BUDGETS, tuning_study
from llada_lightning.study.fits.rules import fit_rules
from llada_lightning.study.plots.rules import tuning_figure


def test_each_budget_has_its_runs_their_quadratics_and_the_optimum() -> None:
    fits = fit_rules(tuning_study()[0], samples=100)
    panels = [axes for axes in tuning_figure(fits).axes if axes.get_visible()]
    assert len(panels) == 2 * len(BUDGETS) + 2
    first, optimum = panels[0], fits.objectives["arm"].optima[0]
    markers = [line for line in first.get_lines() if line.get_marker() == "o"]
    assert sorted(np.concatenate([np.asarray(line.get_ydata()) for line in markers])) == pytest.approx(
        sorted(np.exp(optimum.log_losses))
    )
    (star,) = (line for line in first.get_lines() if line.get_marker() == "*")
    assert (star.get_xdata()[0], star.get_ydata()[0]) == (optimum.lr.value, optimum.loss.value)
    rate, batch = panels[-2:]
    assert "FLOPs" in rate.get_xlabel() and "tokens" in batch.get_xlabel()
    assert len(rate.collections) >= 2  # bands


def test_an_optimum_at_an_edge_is_hollow_and_no_law_is_drawn() -> None:
    fits = fit_rules(tuning_study({"arm": BOWLS["arm"]}, noise=0.0, off=(8.0, 1.0))[0], samples=100)
    *budgets, rate, batch = [axes for axes in tuning_figure(fits).axes if axes.get_visible()]
    for axes in budgets:
        (star,) = (line for line in axes.get_lines() if line.get_marker() == "*")
        assert star.get_markerfacecolor() == "white"
    assert not rate.get_lines() and not batch.get_lines()
