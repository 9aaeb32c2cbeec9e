"""Twelve kinds of synthetic studies, whose compute multiplier is known.

Each world has two objectives with a law of N and D each, a noise of its runs, and a plan of the study. The laws are of
the size of Hoffmann et al. 2022: E = 1.7, alpha = 0.34, beta = 0.28. A parameter of `llada` is worth half of one of
`arm`, and a token an eighth of one: where the limits are equal the multiplier by 6ND is 16 at every budget.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pandas as pd

from llada_lightning.compute.flops import Convention
from llada_lightning.objectives import get_objective
from llada_lightning.study.results import table_of_records

Array = npt.NDArray[np.float64]
Loss = Callable[[Array, Array], Array]
"""N and D -> the loss without noise."""

ALPHA, BETA = 0.34, 0.28
LENGTH, BATCH = 1024, 65_536
BUDGETS = {"arm": tuple(np.geomspace(3e16, 3.1e18, 5)), "llada": tuple(np.geomspace(2e17, 2.1e19, 5))}


@dataclass(frozen=True)
class Law:
    """E + (sum of powers of the terms A / N^alpha and B / D^beta), with a plateau above it."""

    E: float = 1.7
    A: float = 406.0
    B: float = 411.0
    mixing: float = 1.0
    """k of ((A / N^alpha)^(1/k) + (B / D^beta)^(1/k))^k; 1: the terms are added."""
    plateau_tokens: float = 0.0
    """D where half of the way from the plateau of 6.9 nats to the law is gone; 0: there is none."""

    def __call__(self, n: Array, d: Array) -> Array:
        terms = (self.A / n**ALPHA) ** (1 / self.mixing) + (self.B / d**BETA) ** (1 / self.mixing)
        loss = self.E + terms**self.mixing
        return loss + (6.9 - loss) * self.held(d)

    def held(self, d: Array) -> Array:
        """The share of the way to the law that is still to go."""
        return 1 / (1 + (d / self.plateau_tokens) ** 1.5) if self.plateau_tokens else np.zeros_like(d)


LLADA = {"A": 406.0 * 2**ALPHA, "B": 411.0 * 8**BETA}


@dataclass(frozen=True)
class World:
    """The laws of both objectives, the noise of a run, and the plan of a study."""

    laws: dict[str, Law] = field(default_factory=lambda: {"arm": Law(), "llada": Law(**LLADA)})
    noise: float = 0.004
    """Relative standard deviation of a loss between runs."""
    stderr: float = 0.001
    """Relative standard error that the table states; 0: it states none."""
    common: float = 0.0
    """Relative error of the validation set, the same in all runs, which the stated errors contain."""
    growing: bool = False
    """Whether the noise is five times as large on the plateau."""
    heavy: bool = False
    """Whether the noise has the tails of Student's t of 3 degrees of freedom."""
    trunks: bool = False
    """Whether runs of one size are branches of one trunk, which have 80 % of the variance of their noise in common."""
    shapes: int = 5
    missing: float = 0.0
    """The share of cells of the grid that are missing."""
    drift: float = 0.0
    """By how much log N of the grid's centre is off at the first budget, and as much the other way at the last."""
    convention: Convention = "6nd"
    """By which the budgets are equal."""
    replicated: float = 0.0
    """The share of cells with a second seed."""


PLATEAU = {"arm": Law(), "llada": Law(**LLADA, plateau_tokens=4e8)}
WORLDS = {
    "equal law": World(),
    "different E": World({"arm": Law(), "llada": Law(1.85, **LLADA)}),
    "interaction": World({"arm": Law(mixing=1.4), "llada": Law(**LLADA, mixing=1.4)}),
    "plateau": World(PLATEAU),
    "plateau, growing noise": World(PLATEAU, growing=True),
    "heavy tails": World(heavy=True),
    "trunk-shared noise": World(trunks=True),
    "off-centre, missing cells": World(drift=0.8, missing=0.2),
    "equal by total FLOPs": World(convention="total"),
    "few shapes": World(shapes=3),
    "no covariance": World(common=0.005, stderr=0.002),
    "few seeds": World(noise=0.01, stderr=0.0005, replicated=0.3),
}


def log_cost(log_n: Array, objective: str, convention: Convention) -> Array:
    """log training FLOPs of a token; attention and head are a larger part of small models, and of `llada`."""
    parameters = 6 * np.exp(log_n)
    other = 6 * 4000 * np.exp(0.55 * log_n) * (1.0 if objective == "arm" else 1.5)
    return np.log(parameters if convention == "6nd" else parameters + other)


def frontier(law: Loss, objective: str, convention: Convention, log_c: Array) -> tuple[Array, Array]:
    """log N_opt and the loss there at log FLOPs (k,)."""
    log_n = np.linspace(9, 27, 3001)
    log_d = log_c[:, None] - log_cost(log_n, objective, convention)
    loss = law(np.exp(log_n), np.exp(log_d))
    best = np.argmin(loss, axis=1)
    return log_n[best], loss[np.arange(len(log_c)), best]


def true_multipliers(world: World, reference_flops: npt.ArrayLike) -> Array:
    """The compute multiplier of `llada` over `arm` at FLOPs of `arm` (k,), by the convention of the plan."""
    log_c = np.log(np.asarray(reference_flops, float))
    _, goals = frontier(world.laws["arm"], "arm", world.convention, log_c)
    grid = np.linspace(np.log(1e15), np.log(1e23), 2001)
    _, losses = frontier(world.laws["llada"], "llada", world.convention, grid)
    reached = np.interp(-goals, -np.minimum.accumulate(losses), grid)
    return np.exp(reached - log_c)


def study(world: World, seed: int) -> pd.DataFrame:
    """The results table of one study of a world."""
    generator = np.random.default_rng(seed)
    common = world.common * generator.standard_normal()
    records = []
    for objective, law in world.laws.items():
        budgets = np.array(BUDGETS[objective])
        if world.convention == "total":
            budgets = budgets * 2
        centres, _ = frontier(law, objective, world.convention, np.log(budgets))
        spacing = 2 * np.log(4) / (world.shapes - 1)
        of_trunks: dict[float, float] = {}
        for number, (budget, centre) in enumerate(zip(budgets, centres, strict=True)):
            drift = world.drift * (1 - 2 * number / (len(budgets) - 1))
            if world.trunks:  # sizes on one grid, so that each is trained to several budgets
                centre = np.round(centre / spacing) * spacing
            places = centre + drift + spacing * (np.arange(world.shapes) - (world.shapes - 1) / 2)
            kept = generator.uniform(size=world.shapes) >= world.missing
            for log_n in places[kept] if kept.sum() > 1 else places:
                own = of_trunks.setdefault(round(float(log_n), 6), generator.standard_normal())
                for replicate in range(1 + (generator.uniform() < world.replicated)):
                    tokens = np.exp(np.log(budget) - log_cost(log_n, objective, world.convention))
                    noise = _noise(world, generator, own) * (1 + 4 * float(law.held(tokens)) * world.growing)
                    loss = float(law(np.exp(log_n), tokens)) * np.exp(common + noise)
                    records.append(_record(world, objective, float(log_n), float(tokens), loss, replicate))
    return table_of_records(records)


def covariance(world: World, table: pd.DataFrame) -> pd.DataFrame | None:
    """The covariance of the losses' stated errors, which have nothing in common; None where an error is common."""
    if world.common:
        return None
    names = [f"{run}@{steps}" for run, steps in zip(table["run"], table["steps"], strict=True)]
    return pd.DataFrame(np.diag(table["val_stderr"].to_numpy(float) ** 2), index=names, columns=names)


def _noise(world: World, generator: np.random.Generator, of_trunk: float) -> float:
    own = generator.standard_t(3) / np.sqrt(3) if world.heavy else generator.standard_normal()
    if world.trunks:
        own = np.sqrt(0.8) * of_trunk + np.sqrt(0.2) * own
    return float(np.hypot(world.noise, world.stderr) * own)


def _record(world: World, objective: str, log_n: float, tokens: float, loss: float, seed: int) -> dict[str, object]:
    flops = {name: float(np.exp(log_cost(np.array(log_n), objective, name)) * tokens) for name in ("6nd", "total")}
    trunk = f"{objective}-{np.exp(log_n):.4g}-s{seed}"
    return {
        "run": trunk if world.trunks else f"{trunk}-{tokens:.4g}",
        "objective": objective,
        "shape": f"{np.exp(log_n):.4g}",
        "params_nonembedding": round(np.exp(log_n)),
        "tokens": round(tokens),
        "steps": max(1, round(tokens / BATCH)),
        "global_batch_tokens": BATCH,
        "sequence_length": LENGTH,
        "flops_6nd": flops["6nd"],
        "flops_attention": (flops["total"] - flops["6nd"]) / 2,
        "flops_head": (flops["total"] - flops["6nd"]) / 2,
        "flops_total": flops["total"],
        "lr": 1e-3,
        "seed": seed,
        "data_fingerprint": "0",
        "tokenizer": "bpe",
        "val_nats_per_token": loss,
        "val_stderr": float(np.hypot(world.stderr, world.common)) * loss or None,
        "val_kind": get_objective(objective).val_kind,
        "val_bits_per_byte": 0.4 * loss,
        "status": "done",
    }
