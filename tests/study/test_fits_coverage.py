"""95 % intervals cover the truth in about 95 % of simulated studies, for every method whose model holds.

Each study is of 60 runs (2 objectives, 6 budgets, 5 shapes). What is covered: in the world of valleys (the isoFLOP
model, whose best loss is a power law) the exponents of envelope and isoFLOP and the multiplier by both; in the world of
Chinchilla alpha, beta and the exponent of N_opt of the parametric law, and the multiplier by it and by isoFLOP, which
there has to follow an irreducible loss.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
import pytest

from helpers.studies import CHINCHILLA, VALLEYS, World, simulated_study, true_multiplier
from llada_lightning.study.fits import Estimate, StudyFits, fit_table

MODES: dict[str, dict[str, Any]] = {
    "known": {"noise": 0.003},
    "unknown": {"noise": 0.003, "stderr": False},
    "shared": {"noise": 0.002, "shared": 0.01},
}

METHODS_OF = {True: ("envelope", "isoflop"), False: ("isoflop", "parametric")}
"""Whose model holds, in the world of valleys and in that of Chinchilla."""


def estimates(world: World, fits: StudyFits) -> dict[str, tuple[Estimate, float]]:
    """What is told and what is true, by name; of two objectives the names differ."""
    found: dict[str, tuple[Estimate, float]] = {}
    for name, law in world.items():
        own = fits.objectives[name]
        envelope, isoflop, parametric = own.envelope["6nd"], own.isoflop["6nd"], own.parametric
        assert envelope.law and isoflop.n_law and parametric
        if world is VALLEYS:
            found[f"{name} envelope b"] = envelope.law.exponent, law.b
            found[f"{name} isoflop a"] = isoflop.n_law.exponent, law.n_exponent
        else:
            found[f"{name} alpha"] = parametric.alpha, law.alpha
            found[f"{name} beta"] = parametric.beta, law.beta
            found[f"{name} parametric a"] = parametric.n_exponent("6nd"), law.n_exponent
    for method in METHODS_OF[world is VALLEYS]:
        entries = [e for e in fits.compute_multiplier if (e.convention, e.method) == ("6nd", method)]
        middle = entries[2]
        truth = true_multiplier(world, middle.reference_flops)
        found[f"multiplier {method}"] = middle.estimate, truth
    return found


def coverage(world: World, mode: str, studies: int, samples: int) -> dict[str, float]:
    """The share of simulated studies whose interval holds the truth."""
    hits = defaultdict(list)
    for number in range(studies):
        table, covariance = simulated_study(world, seed=1000 + number, **MODES[mode])
        given = covariance if mode == "shared" else None
        fits = fit_table(table, samples=samples, seed=number, covariance=given, conventions=("6nd",))
        for name, (estimate, truth) in estimates(world, fits).items():
            hits[name].append(estimate.covers(truth))
    return {name: float(np.mean(covered)) for name, covered in hits.items()}


@pytest.mark.parametrize(
    ("world", "mode"),
    [
        pytest.param(world, mode, id=f"{name}-{mode}", marks=[] if fast else pytest.mark.slow)
        for name, world in (("valleys", VALLEYS), ("chinchilla", CHINCHILLA))
        for mode, fast in (("known", world is VALLEYS), ("unknown", False), ("shared", world is CHINCHILLA))
    ],
)
def test_intervals_hold_the_truth_in_a_few_studies(world: World, mode: str) -> None:
    found = coverage(world, mode, studies=4, samples=200)
    # Of about 32 intervals at 95 %: fewer than 26 have a chance of 1 in 1 000, were they independent.
    assert np.mean(list(found.values())) >= 0.8, found


def small_coverage(world: World, shapes: int, studies: int, samples: int) -> dict[str, float]:
    """Of three budgets of few shapes, whose seeds scatter three times as much as the losses' own errors."""
    hits = defaultdict(list)
    budgets = tuple(np.geomspace(1e17, 1e19, 3))
    for number in range(studies):
        table, _ = simulated_study(world, 1000 + number, noise=0.001, spread=0.003, shapes=shapes, budgets=budgets)
        fits = fit_table(table, samples=samples, seed=number, conventions=("6nd",))
        for name, law in world.items():
            for budget in fits.objectives[name].isoflop["6nd"].budgets:
                hits["N_opt"].append(budget.n_opt.covers(law.n_opt(budget.flops)))
        for entry in fits.compute_multiplier:
            if entry.method in METHODS_OF[world is VALLEYS]:
                covered = entry.estimate.covers(true_multiplier(world, entry.reference_flops))
                hits[f"multiplier {entry.method}"].append(covered)
    return {name: float(np.mean(covered)) for name, covered in hits.items()}


@pytest.mark.slow
@pytest.mark.parametrize("shapes", [3, 4])
@pytest.mark.parametrize("world", [VALLEYS, CHINCHILLA], ids=["valleys", "chinchilla"])
def test_small_studies_with_seed_spread_hold_the_truth(world: World, shapes: int) -> None:
    found = small_coverage(world, shapes, studies=10, samples=200)
    assert found["N_opt"] >= 0.75, found  # of 60; at 95 % each, and few of them independent
    assert found["multiplier isoflop"] >= 0.75, found  # of 30


@pytest.mark.slow
@pytest.mark.parametrize("shapes", [3, 4])
@pytest.mark.parametrize("world", [VALLEYS, CHINCHILLA], ids=["valleys", "chinchilla"])
def test_small_studies_with_seed_spread_hold_the_truth_in_85_percent(world: World, shapes: int) -> None:
    found = small_coverage(world, shapes, studies=100, samples=500)
    print(shapes, found)
    assert min(found.values()) >= 0.85, found


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("world", [VALLEYS, CHINCHILLA], ids=["valleys", "chinchilla"])
def test_intervals_hold_the_truth_in_90_to_99_percent_of_100_studies(world: World, mode: str) -> None:
    found = coverage(world, mode, studies=100, samples=500)
    print(mode, found)
    assert min(found.values()) >= 0.90, found
    assert max(found.values()) <= 0.99, found
