"""The joint law of two objectives: its exponents, efficiencies and limits, and the tests of what is shared."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from helpers.studies import Chinchilla, World, simulated_study, true_multiplier
from llada_lightning.study.fits import StudyFits, fit_table
from llada_lightning.study.fits.law import below_zero, limit, log_loss, log_loss_and_jacobian

ARM = Chinchilla(1.7, 406.0, 0.34, 411.0, 0.28)


def world(e: float = 1.7, alpha: float = 0.34, beta: float = 0.28) -> World:
    """`llada` with half of the parameters' and an eighth of the tokens' worth."""
    return {"arm": ARM, "llada": Chinchilla(e, 406.0 * 2**alpha, alpha, 411.0 * 8**beta, beta)}


def fitted(own: World, seed: int = 0, noise: float = 0.003, samples: int = 400) -> StudyFits:
    table, covariance = simulated_study(own, seed, noise=noise)
    return fit_table(table, samples=samples, conventions=("6nd",), covariance=covariance)


def test_an_exact_pair_of_laws_is_recovered() -> None:
    joint = fitted(world(), noise=1e-7).joint["llada"]
    assert joint.rho_n.value == pytest.approx(1 / 2, rel=1e-3)
    assert joint.rho_d.value == pytest.approx(1 / 8, rel=1e-3)
    assert joint.e_difference.value == pytest.approx(0.0, abs=1e-3)
    for name, law in joint.laws.items():
        assert law.alpha.value == pytest.approx(0.34, rel=1e-3), name
        assert law.E.value == pytest.approx(1.7, rel=1e-3)
        assert law.A.value == pytest.approx(world()[name].A, rel=0.01)  # type: ignore[union-attr]


def test_the_multiplier_is_16_wherever_it_is_told() -> None:
    """An irreducible loss bends the envelope: a power law through it told 8 at the largest budget, for 16."""
    fits = fitted(world(), noise=3e-5)
    entries = [entry for entry in fits.compute_multiplier if entry.shown]
    assert {entry.method for entry in entries} == {"read-off", "joint", "isoflop", "parametric", "envelope"}
    for entry in entries:
        assert entry.multiplier == pytest.approx(16, rel=0.05 if entry.extrapolated else 0.03), entry
        if entry.method in ("joint", "parametric"):
            assert entry.multiplier == pytest.approx(16, rel=0.01)


def test_noise_leaves_the_efficiencies_within_their_intervals() -> None:
    joint = fitted(world()).joint["llada"]
    assert joint.converged
    assert joint.rho_n.covers(1 / 2)
    assert joint.rho_d.covers(1 / 8)
    assert joint.e_difference.covers(0.0)
    assert min(joint.misfit, joint.same_exponents, joint.same_e) > 0.01


@pytest.mark.parametrize(
    ("own", "rejected", "accepted"),
    [(world(e=2.2), "same_e", "same_exponents"), (world(alpha=0.5), "same_exponents", None)],
)
def test_what_is_not_shared_is_rejected(own: World, rejected: str, accepted: str | None) -> None:
    fits = fitted(own)
    joint = fits.joint["llada"]
    assert getattr(joint, rejected) < 0.01
    doubts = {str(entry.doubt) for entry in fits.compute_multiplier if entry.method == "joint"}
    assert any("the joint fit is rejected (p" in doubt for doubt in doubts) == (rejected == "same_exponents")
    if accepted:
        assert getattr(joint, accepted) > 0.05


@pytest.mark.slow
def test_the_tests_reject_what_is_true_as_often_as_they_say() -> None:
    """Their p-values are uniform: of 100 studies about 5 are below 0.05, and half below a half."""
    found = [fitted(world(), seed, samples=300).joint["llada"] for seed in range(100)]
    for name in ("misfit", "same_exponents", "same_e"):
        p_values = np.array([getattr(joint, name) for joint in found])
        assert np.mean(p_values < 0.05) <= 0.12, name
        assert 0.35 <= np.mean(p_values < 0.5) <= 0.65, name


def test_too_few_runs_have_no_joint_law() -> None:
    table, _ = simulated_study(world())
    arm = table[table["objective"] == "arm"]
    few = pd.concat([arm, table[table["objective"] == "llada"].head(5)])
    fits = fit_table(few, samples=200, conventions=("6nd",))
    assert fits.joint == {}
    assert not [entry for entry in fits.compute_multiplier if entry.method == "joint"]


def test_a_multiplier_by_the_joint_law_holds_the_truth_where_limits_differ() -> None:
    own = world(e=1.85)
    fits = fitted(own)
    entries = [entry for entry in fits.compute_multiplier if entry.method == "joint" and not entry.extrapolated]
    assert len(entries) >= 2
    held = [entry.low <= true_multiplier(own, entry.reference_flops) <= entry.high for entry in entries]
    assert np.mean(held) >= 0.5, entries


def test_derivatives_are_those_of_the_law_and_of_its_limit() -> None:
    generator = np.random.default_rng(0)
    x, z = generator.normal(size=(2, 8))
    for theta in generator.normal([1.0, -0.5, -0.5, -0.5, -0.5], 0.4, (6, 5)):
        _, jacobian = log_loss_and_jacobian(theta[None], x, z)
        for value, slopes in ((limit, limit(theta[None])[1]), (below_zero, below_zero(theta[None])[1])):
            for column, step in enumerate(1e-6 * np.eye(5)):
                up, down = (value((theta + sign * step)[None])[0][0] for sign in (1, -1))
                assert slopes[0, column] == pytest.approx((up - down) / 2e-6, abs=1e-6)
        for column, step in enumerate(1e-6 * np.eye(5)):
            slope = (log_loss(theta + step, x, z) - log_loss(theta - step, x, z)) / 2e-6
            np.testing.assert_allclose(jacobian[0, :, column], slope, atol=1e-6)
