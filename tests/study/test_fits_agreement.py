"""The headline of a study, where methods differ, and what is withheld."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from helpers.studies import CHINCHILLA, simulated_study
from llada_lightning.study.fits import HeldOut, Multiplier, StudyFits, disagreements, fit_table, headline
from llada_lightning.study.fits.multiplier import judged


@pytest.fixture(scope="module")
def fits() -> StudyFits:
    table, covariance = simulated_study(CHINCHILLA)
    return fit_table(table, samples=400, conventions=("6nd",), covariance=covariance)


def entry(method: str = "isoflop", value: float = 10.0, spread: float = 0.1, **other: object) -> Multiplier:
    """A multiplier at 1e18 FLOPs with draws about it."""
    draws = value * np.exp(spread * np.random.default_rng(0).standard_normal(2000))
    low, high = np.percentile(draws, (2.5, 97.5))
    found = Multiplier("llada", "arm", "6nd", method, 1e18, value, low, high, False, draws=draws)  # type: ignore[arg-type]
    return replace(found, **other)  # type: ignore[arg-type]


def test_the_headline_is_the_read_off_with_the_joint_law_and_the_spread(fits: StudyFits) -> None:
    (found,) = fits.headlines
    entries = [own for own in fits.compute_multiplier if own.shown]
    read = max((own for own in entries if own.method == "read-off"), key=lambda own: own.reference_flops)
    there = [own for own in entries if own.reference_flops == read.reference_flops]
    (joint,) = (own for own in there if own.method == "joint")
    assert found.read_off == read.estimate
    assert found.joint == joint.estimate
    assert found.spread == (min(own.multiplier for own in there), max(own.multiplier for own in there))
    for number in (f"{read.reference_flops:.3g} FLOPs (6ND)", f"{read.multiplier:.3g} ({read.low:.3g} to"):
        assert number in found.words
    assert "(bound against exact)" in found.words
    assert fits.as_dict()["headlines"][0]["read_off"]["value"] == read.multiplier


def test_without_a_common_loss_the_headline_says_so() -> None:
    table, _ = simulated_study(CHINCHILLA)
    apart = table[(table["objective"] == "llada") == (table["flops_6nd"] < 1e18)]
    (found,) = fit_table(apart, samples=200, conventions=("6nd",)).headlines
    assert found.read_off is None
    assert found.words == (
        "The compute multiplier of llada over arm is not measured: their best losses have no value in common."
    )


def test_without_a_shown_read_off_the_headline_says_why() -> None:
    opened = replace(entry("read-off"), high=np.inf, withheld="its interval is open")
    found = headline("llada", "arm", "6nd", [opened, entry("joint")], [replace(opened, high=2.0)], None, None)
    assert found.words.endswith("is not measured: read off at 1e+18 FLOPs it is about 10, but its interval is open.")


def test_without_a_shown_read_off_at_the_references_budgets_the_headline_is_that_at_the_objectives() -> None:
    opened = replace(entry("read-off"), high=np.inf, withheld="its interval is open")
    at_own = [entry("read-off", value) for value in (12.0, 11.0)] + [entry("joint", 20.0)]
    found = headline("llada", "arm", "6nd", [opened], at_own, None, None)
    assert found.words.startswith("At the loss that llada reaches with 1.2e+19 FLOPs (6ND), it needs 12 (")
    assert "times the compute of arm, read off" in found.words and "at the budgets of arm nothing is" in found.words
    assert found.reference_flops == 1e18 and found.read_off is not None and found.read_off.value == 12.0


def test_an_interval_that_is_not_known_is_said_to_be_so() -> None:
    found = headline("llada", "arm", "6nd", [entry("read-off", low=np.nan, high=np.nan)], [], None, None)
    assert "needs 10 (its interval is not known) times the compute" in found.words


def test_methods_are_compared_draw_by_draw() -> None:
    """Both see the same errors, so a difference that is small against each interval can be certain."""
    own = entry("isoflop")
    assert own.draws is not None
    near = entry("parametric", 11.0, draws=own.draws * 1.1)
    assert own.low < near.multiplier < own.high
    (found,) = disagreements([], [own, near])
    assert (found.quantity, found.methods, found.values) == ("compute multiplier", ("isoflop", "parametric"), (10, 11))
    close = entry("parametric", 10.3, draws=own.draws * 1.03)
    assert disagreements([], [own, close]) == []
    apart = entry("parametric", 11.0, draws=1.1 * own.draws[::-1])
    assert disagreements([], [own, apart]) == []


def held(objective: str, inside: bool, method: str = "isoflop", beside: str | None = None) -> HeldOut:
    return HeldOut(objective, "6nd", method, 1e19, 3.0, 3.0, 2.9, 3.1, 0.0, inside, beside)  # type: ignore[arg-type]


def test_beyond_its_budgets_a_method_is_shown_only_where_it_passed_both_tests() -> None:
    beyond = entry(extrapolated=True)
    fine = lambda *_: np.nan  # noqa: E731
    for tests, missing in (
        ([], "llada and arm"),
        ([held("llada", True)], "arm"),
        ([held("llada", True), held("arm", False)], "arm"),
        ([held("llada", True), held("arm", True, "parametric")], "arm"),
    ):
        (found,) = judged([beyond], tests, fine)
        assert found.withheld == f"beyond its budgets, where the held-out test of {missing} was not passed"
    both = [held("llada", True), held("arm", True)]
    assert judged([beyond], both, fine)[0].shown
    of_other_pair = [held("llada", True, "joint", "arm"), held("arm", True, "joint", "block")]
    assert not judged([replace(beyond, method="joint")], of_other_pair, fine)[0].shown


def test_beyond_the_budgets_an_interval_holds_the_other_methods() -> None:
    tests = [held(name, True, method) for name in ("llada", "arm") for method in ("isoflop", "parametric")]
    entries = [entry(extrapolated=True), entry("parametric", 30.0), entry("envelope", 99.0, doubt="rejected")]
    misfit = lambda _, own: 0.001 if own.method == "envelope" else np.nan  # noqa: E731
    found, within, doubted = judged(entries, tests, misfit)
    assert (found.low, found.high) == (entries[0].low, 30.0)
    assert (within.low, within.high) == (entries[1].low, entries[1].high)
    assert doubted.doubt == "llada's fit is rejected (p 0.001); arm's fit is rejected (p 0.001)"
