"""The read-off: the measured losses joined, nothing beyond them, and no law."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.studies import CHINCHILLA, simulated_study, true_multiplier
from llada_lightning.study.fits import StudyFits, compute_multipliers, fit_table
from llada_lightning.study.fits.envelope import ReadOff
from llada_lightning.study.fits.multiplier import judged


def read_off(log_c: list[float], log_loss: list[float]) -> ReadOff:
    return ReadOff(np.array(log_c), np.array(log_loss), np.tile(log_loss, (3, 1)))


steps = st.lists(st.tuples(st.floats(0.1, 3.0), st.floats(0.0, 1.0)), min_size=1, max_size=6)


@given(steps)
def test_it_goes_through_its_points_and_never_rises(moves: list[tuple[float, float]]) -> None:
    log_c = np.cumsum([40.0, *(step for step, _ in moves)])
    log_loss = np.cumsum([2.0, *(-drop for _, drop in moves)])
    joined = read_off(log_c.tolist(), log_loss.tolist())
    np.testing.assert_allclose(np.log(joined.loss(np.exp(log_c))), log_loss, atol=1e-9)
    grid = np.exp(np.linspace(log_c[0], log_c[-1], 200))
    assert np.all(np.diff(joined.loss(grid)) <= 1e-9)


def test_it_tells_nothing_beyond_its_points() -> None:
    joined = read_off([10.0, 11.0, 12.0], [1.0, 0.9, 0.85])
    assert np.isnan(joined.loss(np.exp([9.9, 12.1]))).all()
    assert np.isnan(joined.drawn(np.exp([9.9, 12.1]))).all()
    assert joined.line().decades == 0


def fits_of(noise: float = 0.003, **study: object) -> StudyFits:
    return fit_table(simulated_study(CHINCHILLA, noise=noise, **study)[0], samples=400, conventions=("6nd",))  # type: ignore[arg-type]


def test_it_is_told_only_where_the_other_has_measured_the_loss() -> None:
    fits = fits_of()
    entries = [entry for entry in fits.compute_multiplier if entry.method == "read-off"]
    points = fits.objectives["llada"].envelope["6nd"].points
    assert entries
    assert not any(entry.extrapolated for entry in entries)
    for entry in entries:
        assert points[0].flops <= entry.reference_flops * entry.multiplier <= points[-1].flops
        assert entry.low <= true_multiplier(CHINCHILLA, entry.reference_flops) <= entry.high
    told = {entry.reference_flops for entry in entries}
    for point in fits.objectives["arm"].envelope["6nd"].points:
        within = points[-1].loss < point.loss < points[0].loss
        assert (point.flops in told) == within


def test_where_draws_leave_the_measured_losses_its_interval_is_open_and_it_is_not_shown() -> None:
    errors = 0.02 * np.random.default_rng(0).standard_normal((2000, 1))
    losses = np.array([1.2, 1.1, 1.0])
    own = ReadOff(np.array([40.0, 42.0, 44.0]), losses, losses + errors)
    for goal, end in ((1.1, "known"), (1.01, "open")):
        exact = np.array([1.3, goal])
        reference = ReadOff(np.array([36.0, 38.0]), exact, np.tile(exact, (2000, 1)))
        lines = own.line(), reference.line()
        found = compute_multipliers("llada", "arm", "6nd", "read-off", lines, [np.exp(38.0)])
        (entry,) = judged(found, [], lambda *_: np.nan)
        assert entry.estimate.interval == end
        assert entry.withheld == (None if end == "known" else "its interval is open")
        assert entry.high == np.inf or end == "known"


def test_two_budgets_are_enough() -> None:
    fits = fits_of(budgets=(1e17, 1e18))
    own = fits.objectives["arm"].envelope["6nd"]
    assert own.law is None
    assert own.read_off is not None
    assert own.read_off.loss([3e17])[0] == pytest.approx(CHINCHILLA["arm"].best(3e17), rel=0.02)
