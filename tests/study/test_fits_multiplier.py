"""The compute multiplier: inverted right, open where it is open, marked where it is extrapolated."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from helpers.studies import CHINCHILLA, VALLEYS, independent_errors, simulated_study, true_multiplier
from llada_lightning.study.fits import METHODS, Multiplier, StudyFits, compute_multipliers, fit_table


@dataclass(frozen=True)
class Straight:
    """A known line: loss = a (C / 1e18)^-b with draws of log a."""

    a: float
    b: float
    errors: np.ndarray
    flops_range: tuple[float, float] = (1e17, 1e19)
    decades: float = 3.0

    def loss(self, flops: np.ndarray) -> np.ndarray:
        return self.a * (np.asarray(flops) / 1e18) ** -self.b

    def drawn(self, flops: np.ndarray) -> np.ndarray:
        return self.loss(flops) * np.exp(self.errors)[:, None]


ERRORS = 0.01 * np.random.default_rng(0).standard_normal(2000)


def between(arm: Straight, llada: Straight, *flops: float) -> list[Multiplier]:
    return compute_multipliers("llada", "arm", "6nd", "envelope", (llada, arm), list(flops))


def test_two_lines_have_the_ratio_that_algebra_gives() -> None:
    arm, llada = Straight(3.0, 0.1, np.zeros(2000)), Straight(3.3, 0.1, ERRORS)
    for entry in between(arm, llada, 1e17, 1e18):
        assert entry.multiplier == pytest.approx(1.1**10)
        assert entry.low == pytest.approx(1.1**10 * np.exp(10 * np.percentile(ERRORS, 2.5)), rel=0.01)
        assert entry.high == pytest.approx(1.1**10 * np.exp(10 * np.percentile(ERRORS, 97.5)), rel=0.01)
        assert not entry.extrapolated


def test_an_error_that_both_share_cancels() -> None:
    arm, alone, shared = (
        Straight(3.0, 0.1, ERRORS), Straight(3.3, 0.1, ERRORS[::-1]), Straight(3.3, 0.1, ERRORS)
    )  # fmt: skip
    (wide,), (narrow,) = between(arm, alone, 1e18), between(arm, shared, 1e18)
    assert narrow.high - narrow.low < 1e-6
    assert wide.high - wide.low > 0.5


def test_beyond_lladas_budgets_is_marked_and_beyond_a_decade_left_out() -> None:
    arm, llada = Straight(3.0, 0.1, ERRORS), Straight(3.3, 0.1, ERRORS)
    inside, marked = between(arm, llada, 1e18, 8e18, 8e19)
    assert (inside.extrapolated, marked.extrapolated) == (False, True)
    assert marked.reference_flops == 8e18
    (below,) = between(llada, arm, 2e17)
    assert below.multiplier == pytest.approx(1.1**-10)
    assert below.extrapolated


def test_beyond_arms_budgets_is_marked_and_beyond_a_decade_left_out() -> None:
    arm, llada = Straight(3.0, 0.1, ERRORS, (1e18, 2e18)), Straight(3.0, 0.1, ERRORS, (1e15, 1e21))
    found = between(arm, llada, 5e16, 3e17, 1.5e18, 1e19, 3e19)
    assert [(entry.reference_flops, entry.extrapolated) for entry in found] == [
        (3e17, True),
        (1.5e18, False),
        (1e19, True),
    ]


def test_draws_that_never_get_there_leave_the_end_open() -> None:
    arm, llada = Straight(3.0, 0.1, np.zeros(2000)), Straight(3.0, 0.1, 100 * ERRORS)
    (entry,) = between(arm, llada, 1e18)
    assert entry.high == np.inf
    assert entry.low == 0


def test_the_inverse_is_the_reference_over_the_objective_at_the_same_loss() -> None:
    arm, llada = Straight(3.0, 0.1, ERRORS), Straight(3.3, 0.08, 2 * ERRORS[::-1])
    (entry,) = between(arm, llada, 3e17)
    own = entry.inverse()
    assert (own.objective, own.reference) == ("arm", "llada")
    assert llada.loss(np.array(own.reference_flops)) == pytest.approx(arm.loss(np.array(3e17)))
    assert own.objective_flops == pytest.approx(3e17)
    assert [own.multiplier, own.low, own.high] == pytest.approx([1 / entry.multiplier, 1 / entry.high, 1 / entry.low])
    again = own.inverse()
    assert again.objective == "llada" and again.estimate.value == pytest.approx(entry.multiplier)


def test_the_inverse_of_an_open_end_is_open() -> None:
    arm, llada = Straight(3.0, 0.1, np.zeros(2000)), Straight(3.0, 0.1, 100 * ERRORS)
    (entry,) = between(arm, llada, 1e18)
    assert (entry.inverse().low, entry.inverse().high) == (0, np.inf)


def test_at_the_budgets_of_the_objective_its_losses_are_held_equal() -> None:
    fits = fit_table(simulated_study(VALLEYS, noise=1e-6)[0], samples=200)
    budgets = [point.flops for point in fits.objectives["llada"].envelope["6nd"].points]
    for method in ("read-off", "envelope", "isoflop"):
        found = [
            e for e in fits.multiplier_at_own_budgets
            if (e.convention, e.method, e.extrapolated) == ("6nd", method, False)
        ]  # fmt: skip
        assert len(found) >= 4
        for entry in found:
            assert (entry.objective, entry.reference) == ("llada", "arm")
            assert min(abs(entry.objective_flops / own - 1) for own in budgets) < 1e-9
            truth = 1 / true_multiplier(VALLEYS, entry.objective_flops, "arm", "llada")
            assert entry.multiplier == pytest.approx(truth, rel=0.02), (method, entry)


def entries(fits: StudyFits, convention: str = "6nd") -> dict[str, list[Multiplier]]:
    return {
        method: [e for e in fits.compute_multiplier if (e.method, e.convention) == (method, convention)]
        for method in METHODS
    }


def test_exact_losses_give_the_true_multiplier_by_the_methods_whose_model_holds() -> None:
    for world, methods in ((VALLEYS, ("envelope", "isoflop")), (CHINCHILLA, ("isoflop", "parametric"))):
        found = entries(fit_table(simulated_study(world, noise=1e-6)[0], samples=200))
        for method in methods:
            assert len(found[method]) >= 4
            for entry in found[method]:
                truth = true_multiplier(world, entry.reference_flops)
                if not entry.extrapolated:
                    assert entry.multiplier == pytest.approx(truth, rel=0.02), (method, entry)


def test_by_the_total_convention_the_multiplier_is_that_of_total_flops() -> None:
    found = entries(fit_table(simulated_study(CHINCHILLA, noise=1e-6)[0], samples=200), "total")
    assert found["isoflop"] == []
    assert len(found["parametric"]) >= 4
    by_6nd = entries(fit_table(simulated_study(CHINCHILLA, noise=1e-6)[0], samples=200))
    # llada's other FLOPs are 1.5 times arm's, at about the same N: more than by 6ND, and by less than 1.5.
    for total, own in zip(found["parametric"], by_6nd["parametric"], strict=False):
        assert 1.0 < total.multiplier / own.multiplier < 1.5


@pytest.mark.parametrize("spread", [0.0, 0.01])
def test_without_its_covariance_a_study_has_the_same_answer(spread: float) -> None:
    """Runs share their validation set. An error that is common to all must not explain how they scatter."""
    table, covariance = simulated_study(VALLEYS, noise=0.002, shared=0.03, spread=spread)
    alone, beside = fit_table(table, samples=500), fit_table(table, samples=500, covariance=covariance)
    for method in ("read-off", "envelope", "isoflop"):
        for one, other in zip(entries(alone)[method], entries(beside)[method], strict=True):
            assert one.multiplier == pytest.approx(other.multiplier, rel=0.05)
            assert one.shown == other.shown
            if one.shown and not one.extrapolated:
                assert 0.5 < (one.high - one.low) / (other.high - other.low) < 2
    for name, own in alone.objectives.items():
        assert own.spread.tau == pytest.approx(beside.objectives[name].spread.tau, abs=0.003)


def test_a_covariance_narrows_exponents_and_multipliers() -> None:
    table, covariance = simulated_study(VALLEYS, noise=0.002, shared=0.01)
    independent, joint = (
        fit_table(table, samples=500, covariance=errors) for errors in (independent_errors(table), covariance)
    )
    for method in ("envelope", "isoflop"):
        for one, other in zip(entries(independent)[method], entries(joint)[method], strict=True):
            assert one.multiplier == pytest.approx(other.multiplier, rel=0.02)
            if not one.extrapolated:
                assert other.high - other.low < 0.4 * (one.high - one.low)
    laws = [fits.objectives["arm"].isoflop["6nd"].n_law for fits in (independent, joint)]
    widths = [law.interval_b[1] - law.interval_b[0] for law in laws if law]
    assert widths[1] < 0.4 * widths[0]
