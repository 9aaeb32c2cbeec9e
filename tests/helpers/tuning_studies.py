"""Synthetic tuning studies: results tables of a grid of rates and batches whose optima follow known laws."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from helpers.studies import record
from llada_lightning.commands.sweep import run_folder
from llada_lightning.compute.shapes import get_shape
from llada_lightning.data.manifest import read_data_facts
from llada_lightning.records import write_records
from llada_lightning.study.plan.tuning import BATCHES, RATES
from llada_lightning.study.results import table_of_records
from llada_lightning.study.sweep import planned_run, read_sweep

SHAPE = "107k"
N = get_shape(SHAPE).params_nonembedding
BUDGETS = (1e12, 4e12, 1.6e13)


@dataclass(frozen=True)
class Bowl:
    """log loss = log(loss at the best) + a quadratic form of the distances from the optimum in log rate and log batch.

    lr* = lr (C / 1e12)^lr_exponent; B* = batch (D / 1e6)^batch_exponent tokens.
    """

    lr: float = 4e-3
    lr_exponent: float = -0.15
    batch: float = 2048.0
    batch_exponent: float = 0.35
    loss: float = 4.0
    curvatures: tuple[float, float, float] = (0.012, -0.006, 0.008)
    """Of x^2, x y and y^2."""

    def best_lr(self, flops: float) -> float:
        return float(self.lr * (flops / 1e12) ** self.lr_exponent)

    def best_batch(self, tokens: float) -> float:
        return float(self.batch * (tokens / 1e6) ** self.batch_exponent)

    def log_loss(self, flops: float, lr: float, batch: float) -> float:
        x, y = np.log(lr / self.best_lr(flops)), np.log(batch / self.best_batch(flops / 6 / N))
        xx, xy, yy = self.curvatures
        return float(np.log(self.loss) - 0.05 * np.log(flops / 1e12) + xx * x * x + xy * x * y + yy * y * y)


BOWLS = {"arm": Bowl(), "llada": Bowl(lr=1.5e-3, batch=4096.0, loss=5.0)}


def tuning_study(
    bowls: Mapping[str, Bowl] = BOWLS,
    seed: int = 0,
    *,
    noise: float = 0.001,
    shared: float = 0.0,
    budgets: Sequence[float] = BUDGETS,
    rates: Sequence[float] = RATES,
    batches: Sequence[float] = BATCHES,
    off: tuple[float, float] = (1.15, 0.85),
    **other: Any,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """A results table of a tuning study and the covariance of its losses.

    Args:
        bowls: The losses of each objective.
        seed: The seed of the noise.
        noise: The relative scatter of each loss by itself.
        shared: The relative error that all runs have in common.
        budgets: In FLOPs by 6ND.
        rates: Factors on the rate at the grid's centre.
        batches: Factors on the batch at the grid's centre.
        off: The factors by which the grid's centre misses the best rate and the best batch.
        other: Keys of every record.
    """
    generator = np.random.default_rng(seed)
    common = shared * generator.standard_normal()
    records = []
    for (name, bowl), budget in itertools.product(bowls.items(), budgets):
        tokens = budget / 6 / N
        for rate, batch in itertools.product(rates, batches):
            lr, size = bowl.best_lr(budget) * off[0] * rate, bowl.best_batch(tokens) * off[1] * batch
            loss = np.exp(bowl.log_loss(budget, lr, size) + common + noise * generator.standard_normal())
            records.append(
                record(name, SHAPE, budget, float(loss), run=f"{name}-{budget:g}-{lr:.3g}-{size:.4g}", lr=lr,
                       global_batch_tokens=round(size), tokens=round(tokens), flops_6nd=budget, **other)
            )  # fmt: skip
    table = table_of_records(records)
    loss = table["val_nats_per_token"].to_numpy()
    relative = noise**2 * np.eye(len(table)) + shared**2
    names = [f"{run}@{steps}" for run, steps in zip(table["run"], table["steps"], strict=True)]
    return table, pd.DataFrame(relative * np.outer(loss, loss), names, names)


def finish_tuning_runs(file: Path | str, bowls: Mapping[str, Bowl]) -> int:
    """Write the results of a tuning sweep's runs in place of training them: their losses are those of bowls.

    Args:
        file: The sweep.
        bowls: The losses of each objective, at the rates, batches and budgets of the sweep.

    Returns:
        The number of runs.
    """
    sweep = read_sweep(str(file))
    generator = np.random.default_rng(0)
    for point in sweep.points:
        folder = planned_run(sweep, point, run_folder, []).folder
        config = yaml.safe_load(str(point["config"]))
        model, data = config["model"]["init_args"], config["data"]["init_args"]
        name = config["model"]["class_path"].removesuffix("Module").lower()
        budget, lr = config["budget"]["flops"], model["schedule"]["lr"]
        size, n = data["global_batch"] * data["sequence_length"], get_shape(model["shape"]).params_nonembedding
        tokens = budget / 6 / n
        log_loss = bowls[name].log_loss(budget, lr, size) + 0.0005 * generator.standard_normal()
        given = {
            "run": folder.name,
            "lr": lr,
            "global_batch_tokens": size,
            "tokens": round(tokens),
            "steps": round(tokens / size),
            "flops_6nd": budget,
            "sequence_length": data["sequence_length"],
            "vocab_size": 512,
            "tokenizer": read_data_facts(data["path"], data["sequence_length"]).tokenizer,
        }
        write_records(folder, [record(name, model["shape"], budget, float(np.exp(log_loss)), **given)])
    return len(sweep.points)
