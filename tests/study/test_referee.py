"""Three tables that an independent check of the estimators made from known laws (`referee/`).

`a`: L(N, D) with E = 1.70 for both objectives, almost without noise; the multiplier is 16 at every budget. `b`: `llada`
leaves a plateau at 6.9 nats as 1/(1 + (D/6M)^1.5). `c`: both objectives at the same budgets over a factor of 4, true
multiplier 16, so that they share no loss.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest

from llada_lightning.study.fits import StudyFits, fit_table
from llada_lightning.study.results import read_results

CASES = Path(__file__).parent / "referee"

PLATEAU = dict(zip(1e12 * (308 ** (np.arange(7) / 6)), (19.4, 18.7, 18.0, 17.4, 17.0, 16.6, 16.4), strict=True))
"""The true multiplier of the second table at the budgets of `arm`."""


@cache
def fits(name: str) -> StudyFits:
    return fit_table(read_results(CASES / f"{name}.csv"), samples=500, conventions=("6nd",))


def test_a_constant_multiplier_is_told_as_constant() -> None:
    """A power law told 20.3 to 8.1 here."""
    shown = [entry for entry in fits("a").compute_multiplier if entry.shown]
    assert len({entry.reference_flops for entry in shown}) == 5
    for entry in shown:
        assert entry.low <= 16 <= entry.high or entry.multiplier == pytest.approx(16, rel=0.02), entry


def test_under_a_plateau_the_read_off_holds_the_truth() -> None:
    shown = [entry for entry in fits("b").compute_multiplier if entry.shown and entry.method == "read-off"]
    assert shown
    for entry in shown:
        flops = min(PLATEAU, key=lambda own: abs(np.log(own / entry.reference_flops)))
        assert entry.low <= PLATEAU[flops] <= entry.high, entry
    assert fits("b").joint["llada"].misfit < 0.05  # a plateau is no law of N and D


def test_without_a_common_loss_nothing_is_measured_and_the_laws_reach_beyond() -> None:
    found = fits("c")
    assert found.headlines[0].read_off is None
    assert found.notes[0].startswith("no common loss by 6ND")
    for entry in found.compute_multiplier:
        assert entry.extrapolated
        if entry.shown:
            assert entry.low <= 16 <= entry.high, entry
