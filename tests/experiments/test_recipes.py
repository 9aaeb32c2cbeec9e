"""The study of recipes: the best rate of each, its multiplier read off the losses of `arm`, and the sweeps."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

from llada_lightning.study.results import read_results
from llada_lightning.study.sweep import read_sweep

ROOT = Path(__file__).parents[2]


REPORT = runpy.run_path(str(ROOT / "experiments" / "recipes" / "report.py"))


def run(objective: str, variant: str | None, lr: float, seed: int, flops: float, loss: float) -> dict[str, object]:
    return {"objective": objective, "variant": variant, "lr": lr, "seed": seed, "tokens": flops / 5e5,
            "flops_total": flops, "status": "done", "val_nats_per_token": loss}  # fmt: skip


def test_the_best_rate_of_each_recipe_and_budget_is_taken_of_those_with_most_seeds() -> None:
    rows = []
    for variant, losses in {None: {0.1: (4.0, 3.0), 0.2: (3.9, 3.2)}, "loss_weight=ce": {0.1: (3.8, 3.1)}}.items():
        for lr, (small, large) in losses.items():
            for seed in (0, 1):
                for flops, loss in ((1e9, small), (4.01e9, large)):
                    rows.append(run("llada", variant, lr, seed, flops * (1 + lr / 100), loss + 0.1 * seed))
    rows.append(run("llada", None, 0.4, 0, 1e9, 1.0))  # one seed alone is not compared with two
    found = REPORT["best_of_recipes"](pd.DataFrame(rows))
    shown = [(row.objective, row.budget, row.lr, round(row.mean, 6), row.seeds) for row in found.itertuples()]
    assert shown == [
        ("llada [loss_weight=ce]", 9.0, 0.1, 3.85, 2),
        ("llada", 9.0, 0.2, 3.95, 2),
        ("llada", 9.6, 0.1, 3.05, 2),
        ("llada [loss_weight=ce]", 9.6, 0.1, 3.15, 2),
    ]
    assert found["std"].tolist() == pytest.approx([0.1 / 2**0.5] * 4)


def test_the_multiplier_is_read_off_the_losses_of_arm() -> None:
    """`arm` follows a power law, and `llada` needs 10 times the FLOPs. A loss beyond `arm`'s has no multiplier."""

    def loss(flops: float) -> float:
        return 4.0 * (flops / 1e9) ** -0.05

    rows = [run("arm", None, 0.1, seed, c, loss(c)) for c in (1e9, 2e9, 4e9, 8e9, 1.6e10) for seed in (0, 1)]
    rows += [run("llada", None, 0.1, seed, c, loss(c / 10)) for c in (2e9, 4e10) for seed in (0, 1)]
    exact = REPORT["with_multipliers"](REPORT["best_of_recipes"](pd.DataFrame(rows)))
    found = exact.set_index(["objective", "budget"])["multiplier"]
    assert found["llada", 10.6] == pytest.approx(10, rel=0.01)
    assert pd.isna(found["llada", 9.3])
    assert found["arm", 9.6] == pytest.approx(1, rel=1e-6)
    noisy = [{**row, "val_nats_per_token": row["val_nats_per_token"] + 0.02 * row["seed"]} for row in rows]
    wide = REPORT["with_multipliers"](REPORT["best_of_recipes"](pd.DataFrame(noisy)))
    low, value, high = wide.set_index(["objective", "budget"]).loc[("llada", 10.6), ["low", "multiplier", "high"]]
    assert low < value < high and low < 10 < high
    # The error of each loss is 0.02 / 2: of both, in nats over the slope of the law, 0.05 times the loss.
    assert np.log(high / low) == pytest.approx(2 * 1.96 * 2**0.5 * 0.01 / (0.05 * loss(4e9)), rel=0.25)


def test_the_sweep_has_each_recipe_once_at_every_rate() -> None:
    points = read_sweep(ROOT / "sweeps" / "recipes.yaml").points
    recipes = {point["config"] for point in points}
    assert len(points) == len(recipes) * 2 == 16 * 2
    for word in (
        "beta",
        "logit_normal",
        "range",
        "curriculum",
        "ce",
        "clipped",
        "per_masked_token",
        "block_length: 16",
    ):
        assert any(word in recipe for recipe in recipes)
    assert len(read_sweep(ROOT / "sweeps" / "recipes-arm.yaml").points) == 2 * 2 * 3


def test_further_seeds_are_of_every_recipe_at_one_of_its_rates() -> None:
    def without_rate(point: dict[str, Any]) -> str:
        config = yaml.safe_load(point["config"])
        config["model"].get("init_args", {}).pop("schedule", None)
        config["model"] = {"init_args": {}, **config["model"]}
        return str([*sorted(config["model"].items()), config.get("data")])

    first, further = (read_sweep(ROOT / "sweeps" / f"{name}.yaml").points for name in ("recipes", "recipes-seeds"))
    assert {without_rate(point) for point in first} == {without_rate(point) for point in further}
    assert len(further) == 16 * 2
    assert {point["seed_everything"] for point in further} == {1, 2}
    assert all(yaml.safe_load(p["config"])["model"]["init_args"]["schedule"]["lr"] in (0.002, 0.004) for p in further)


def test_the_committed_table_holds_three_seeds_of_every_recipe() -> None:
    best = REPORT["best_of_recipes"](read_results(ROOT / "experiments" / "recipes" / "results.csv"))
    assert set(best["seeds"]) == {3}
    diffusion = best[best["objective"] != "arm"]
    assert diffusion.groupby("objective")["budget"].nunique().tolist() == [2] * 16


def test_blocks_are_ordered_by_their_length_with_the_default_and_llada_among_them() -> None:
    names = ["llada", "block [block_length=4]", "arm", "block", "uniform", "block [block_length=2]"]
    found = REPORT["_blocks"](pd.DataFrame({"objective": names}), 64)
    assert found["length"].tolist() == [2, 4, 16, 64]
