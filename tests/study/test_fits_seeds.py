"""The spread between seeds over the runs of an objective: told by points of several seeds, and by nothing else."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from helpers.studies import CHINCHILLA, simulated_study
from llada_lightning.study.fits import fit_table
from llada_lightning.study.fits.runs import noise_of_runs
from llada_lightning.study.fits.seeds import seed_scales, tokens_by_steps


def replicated(seeds: int, growth: float, seed: int = 0) -> pd.DataFrame:
    """A study whose runs all have so many seeds; the deviation grows with the height above the best loss."""
    table, _ = simulated_study(CHINCHILLA, seed, noise=1e-9)
    generator = np.random.default_rng(seed)
    loss = table["val_nats_per_token"].to_numpy()
    height = np.log(loss / table.groupby("objective")["val_nats_per_token"].transform("min").to_numpy())
    deviation = 0.002 * np.exp(growth * height)
    parts = [
        table.assign(
            run=table["run"] + f"-s{number}",
            seed=number,
            val_nats_per_token=loss * np.exp(deviation * generator.standard_normal(len(table))),
            val_stderr=1e-4 * loss,
        )
        for number in range(seeds)
    ]
    return pd.concat(parts, ignore_index=True)


def test_without_seeds_all_runs_have_one_spread() -> None:
    table, _ = simulated_study(CHINCHILLA)
    assert np.all(seed_scales(table) == 1)
    two_points = pd.concat([table, table.iloc[[0, 7]].assign(seed=2, val_nats_per_token=4.0)], ignore_index=True)
    assert np.all(seed_scales(two_points) == 1)


@pytest.mark.parametrize("growth", [0.0, 3.0])
def test_many_seeds_tell_how_the_spread_grows(growth: float) -> None:
    table = replicated(6, growth)
    arm = table["objective"] == "arm"
    scales = seed_scales(table)[arm]
    height = np.log(table["val_nats_per_token"] / table.loc[arm, "val_nats_per_token"].min())[arm]
    slope = np.polyfit(height, np.log(scales), 1)[0]
    assert slope == pytest.approx(growth, abs=0.8)
    assert np.mean(scales**2) == pytest.approx(1.0)


def test_two_seeds_at_three_points_change_little() -> None:
    """Of equal noise; a likelihood without a prior would see factors of ten."""
    found = []
    for seed in range(20):
        table = replicated(2, 0.0, seed)
        points = table.drop_duplicates(["objective", "params_nonembedding", "tokens"])
        arm = points[points["objective"] == "arm"].iloc[:3]
        second = table[(table["seed"] == 1) & table["tokens"].isin(arm["tokens"])]
        scales = seed_scales(pd.concat([table[table["seed"] == 0], second], ignore_index=True))
        found.append(scales.max() / scales.min())
    assert np.median(found) < 2.5


def test_the_spread_of_draws_follows() -> None:
    table = replicated(3, 3.0)
    noise, scales = noise_of_runs(table, None, 4000, 0), seed_scales(table)
    np.testing.assert_allclose(noise.shares, scales**2)
    fits = fit_table(table, samples=200, conventions=("6nd",))
    spread = fits.objectives["arm"].spread
    drawn = noise.draws(spread).std(axis=0)
    assert np.corrcoef(drawn, scales)[0, 1] > 0.95
    assert any("seeds tell a spread" in note for note in fits.notes)


def test_seeds_with_sequences_of_random_length_are_of_one_point() -> None:
    """A hundredth of the sequences is shorter, by the seed: the tokens differ, and the steps do not."""
    runs = pd.DataFrame(
        {
            "tokens": pd.array([11_494, 11_574, 23_000, 11_500, 30_000], dtype="Int64"),
            "steps": pd.array([90, 90, 180, pd.NA, 90], dtype="Int64"),
            "global_batch_tokens": [128.0] * 5,
        }
    )
    # The fourth does not say its steps; the fifth has the tokens of other weights, too.
    assert tokens_by_steps(runs).tolist() == [11_520, 11_520, 23_040, 11_500, 30_000]
