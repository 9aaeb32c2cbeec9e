"""The synthetic worlds are what they say, and the intervals of the estimators hold the truth in them."""

from __future__ import annotations

from pathlib import Path

import calibration
import numpy as np
import pandas as pd
import pytest
import worlds
from worlds import WORLDS, frontier, study, true_multipliers

from llada_lightning.study.fits.runs import trunks_of

ROOT = Path(__file__).parents[2]
FLOPS = np.geomspace(5e16, 5e17, 3)


def test_the_true_multiplier_is_what_the_laws_say() -> None:
    for name in ("equal law", "heavy tails", "trunk-shared noise", "few seeds"):
        np.testing.assert_allclose(true_multipliers(WORLDS[name], FLOPS), 16, rtol=2e-3)
    assert np.all(np.diff(true_multipliers(WORLDS["different E"], FLOPS)) > 0)  # the gap of the limits grows in weight
    plateau = true_multipliers(WORLDS["plateau"], FLOPS)
    assert np.all(np.diff(plateau) < 0)
    assert np.all(plateau > 16)


@pytest.mark.parametrize("name", WORLDS)
def test_a_study_is_planned_as_its_world_says(name: str) -> None:
    world, table = WORLDS[name], study(WORLDS[name], 0)
    column = "flops_6nd" if world.convention == "6nd" else "flops_total"
    budgets = {objective: len(np.unique(np.log(own[column]).round(2))) for objective, own in table.groupby("objective")}
    assert budgets == {"arm": 5, "llada": 5}
    cells = table.drop_duplicates(["objective", "params_nonembedding", "tokens"])
    assert (len(table) > len(cells)) == bool(world.replicated)
    assert (len(cells) == 10 * world.shapes) == (not world.missing)
    assert (len(np.unique(trunks_of(table))) < len(table)) == world.trunks
    if not world.trunks:
        for objective, law in world.laws.items():
            own = table[table["objective"] == objective]
            _, best = frontier(law, objective, world.convention, np.log(own[column].to_numpy(float)))
            assert np.all(own["val_nats_per_token"] > best * (1 - 6 * np.hypot(0.01, 0.005)))


def test_seeds_of_a_trunk_move_its_runs_together() -> None:
    world = WORLDS["trunk-shared noise"]
    correlations = []
    for seed in range(40):
        table = study(world, seed)
        own = table[table["objective"] == "arm"]
        loss = world.laws["arm"](own["params_nonembedding"].to_numpy(float), own["tokens"].to_numpy(float))
        noise = np.log(own["val_nats_per_token"].to_numpy(float) / loss)
        trunks = trunks_of(own)
        pairs = (trunks[:, None] == trunks) & ~np.eye(len(trunks), dtype=bool)
        correlations.append(np.sum(noise[:, None] * noise * pairs) / pairs.sum() / np.mean(noise**2))
    assert np.mean(correlations) == pytest.approx(0.8, abs=0.15)


def test_the_summary_counts_what_is_told() -> None:
    rows = pd.DataFrame({
        "world": "plateau", "method": ["read-off"] * 4, "seed": [0, 0, 1, 1], "beyond": False,
        "told": [True, True, True, False], "trusted": [True, False, True, True], "held": [True, False, True, False],
        "error": [0.1, 0.3, -0.1, 9.0], "width": [1.0, 2.0, 3.0, np.nan],
    })  # fmt: skip
    (found,) = calibration.summary(rows).to_dict("records")
    expected = {"told": 0.75, "coverage": 2 / 3, "bias": 0.1, "width": 2.0}
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert found["coverage_stderr"] == pytest.approx(0.25)


def test_intervals_hold_the_truth_in_a_study_of_each_world() -> None:
    """Over all worlds: in single ones a study tells too little."""
    rows = pd.DataFrame([
        row for name in WORLDS for seed in (500,) for row in calibration.told(name, seed, samples=200)
    ])  # fmt: skip
    shown = rows[rows["told"] & rows["trusted"] & ~rows["beyond"]].groupby("method")["held"].mean()
    assert shown["read-off"] >= 0.85, shown
    assert shown.min() >= 0.75, shown


def test_the_page_shows_the_committed_table() -> None:
    table = pd.read_csv(ROOT / "experiments" / "estimators" / "coverage.csv")
    page = (ROOT / "docs" / "estimators.md").read_text()
    for place in ("within", "beyond"):
        assert calibration.markdown(table, place) in page
    assert set(table["world"]) == set(WORLDS)


@pytest.mark.slow
def test_the_headline_method_holds_the_truth_in_90_to_99_percent_of_every_world() -> None:
    found = calibration.summary(calibration.run(100, 500, 2, list(WORLDS)))
    print(found.to_string())
    read = found[(found["method"] == "read-off") & (found["place"] == "within")].set_index("world")
    assert set(read.index) == set(worlds.WORLDS)
    margin = 2 * read["coverage_stderr"]
    assert (read["coverage"] + margin >= 0.90).all(), read
