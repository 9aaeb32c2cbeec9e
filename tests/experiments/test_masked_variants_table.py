"""The table of the variants of `llada`: the better rate of each recipe and budget, by the mean over the seeds."""

from __future__ import annotations

import runpy
from pathlib import Path

import pandas as pd
import pytest

from llada_lightning.study.sweep import read_sweep

ROOT = Path(__file__).parents[2]


def test_the_better_rate_of_each_recipe_and_budget_is_taken() -> None:
    best_of_recipes = runpy.run_path(str(ROOT / "experiments" / "masked_variants" / "table.py"))["best_of_recipes"]
    rows = []
    for variant, losses in {None: {0.1: (4.0, 3.0), 0.2: (3.9, 3.2)}, "loss_weight=ce": {0.1: (3.8, 3.1)}}.items():
        for lr, (small, large) in losses.items():
            for seed in (0, 1):
                for steps, loss in ((10, small), (40, large)):
                    rows.append({"objective": "llada", "variant": variant, "lr": lr, "seed": seed, "steps": steps,
                                 "tokens": 100 * steps, "flops_total": 1e9 * steps, "status": "done",
                                 "val_nats_per_token": loss + 0.1 * seed})  # fmt: skip
    found = best_of_recipes(pd.DataFrame(rows))
    shown = [(row.objective, row.budget, row.lr, round(row.mean, 6), row.seeds) for row in found.itertuples()]
    assert shown == [
        ("llada [loss_weight=ce]", 0, 0.1, 3.85, 2),
        ("llada", 0, 0.2, 3.95, 2),
        ("llada", 1, 0.1, 3.05, 2),
        ("llada [loss_weight=ce]", 1, 0.1, 3.15, 2),
    ]
    assert found["std"].tolist() == pytest.approx([0.1 / 2**0.5] * 4)


def test_the_sweep_has_each_recipe_once_at_every_rate_and_seed() -> None:
    points = read_sweep(ROOT / "sweeps" / "masked-variants.yaml").points
    recipes = {point["config"] for point in points}
    assert len(points) == len(recipes) * 2 * 3 == 13 * 6
    for word in ("beta", "logit_normal", "range", "curriculum", "ce", "clipped", "per_masked_token", "ArmModule"):
        assert any(word in recipe for recipe in recipes)
