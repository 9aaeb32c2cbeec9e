"""What fits say in words: a plateau, budgets that lack runs, single seeds, scatter, exponents that are not shared."""

from __future__ import annotations

import numpy as np
import pandas as pd

from helpers.studies import CHINCHILLA, Chinchilla, World, independent_errors, simulated_study
from llada_lightning.study.fits import fit_table


def notes_of(table: pd.DataFrame) -> list[str]:
    return fit_table(table, samples=200, conventions=("6nd",), covariance=independent_errors(table)).notes


def study(world: World = CHINCHILLA, **options: object) -> pd.DataFrame:
    return simulated_study(world, **options)[0]  # type: ignore[arg-type]


def test_a_plateau_is_named() -> None:
    table = study()
    own = table["objective"] == "llada"
    share = 1 / (1 + (table["tokens"] / 3e10) ** 1.5)
    held = table["val_nats_per_token"] + (7 - table["val_nats_per_token"]) * share
    table.loc[own, "val_nats_per_token"] = held[own]
    (note,) = (note for note in notes_of(table) if "plateau" in note)
    assert note.startswith("llada is leaving a plateau at these budgets")
    assert not any("plateau" in note for note in notes_of(study()))


def test_a_budget_with_fewer_sizes_is_named() -> None:
    table = study()
    arm = table.index[(table["objective"] == "arm") & np.isclose(table["flops_6nd"], 1e17, rtol=0.05)]
    assert "arm: budget 1e+17 has 4 sizes, most have 5" in notes_of(table.drop(arm[0]))
    assert not any("most have" in note for note in notes_of(table))


def test_single_seeds_are_named_and_seconds_are_not() -> None:
    table = study(spread=0.003)
    found = [note for note in notes_of(table) if "every loss is of one seed" in note]
    assert [note.split(":")[0] for note in found] == ["arm", "llada"]
    second = table[table["objective"] == "arm"].iloc[[0]].assign(run="second", seed=1, val_nats_per_token=4.4)
    found = [note for note in notes_of(pd.concat([table, second], ignore_index=True)) if "one seed" in note]
    assert [note.split(":")[0] for note in found] == ["llada"]


def test_scatter_beyond_the_runs_own_errors_is_named() -> None:
    found = [note for note in notes_of(study(noise=0.0005, spread=0.005)) if "times the runs' own errors" in note]
    assert [note.split(",")[0] for note in found] == ["arm", "llada"]
    assert not any("times the runs' own errors" in note for note in notes_of(study()))


def test_exponents_that_are_not_shared_are_named() -> None:
    apart = {"arm": CHINCHILLA["arm"], "llada": Chinchilla(2.0, 4000.0, 0.5, 1500.0, 0.32)}
    (note,) = (note for note in notes_of(study(apart)) if "reject shared exponents" in note)
    assert note.startswith("joint law of llada and arm: the runs reject shared exponents (p 0")
    assert not any("reject shared exponents" in note for note in notes_of(study()))
