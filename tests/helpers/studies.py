"""Synthetic studies: results tables whose law is known."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy.optimize import brentq

from llada_lightning.compute.flops import flops_per_token
from llada_lightning.compute.shapes import get_shape
from llada_lightning.objectives import get_objective
from llada_lightning.study.results import table_of_records

VOCAB_SIZE, LENGTH, BATCH = 1024, 128, 2048
NATS_TO_BITS_PER_BYTE = 0.45
LAWS = {"arm": (4.0, 0.08), "llada": (4.6, 0.08)}
"""a and b of loss = a (C / 1e12)^-b at the best shape."""


def record(objective: str, shape: str, budget: float, loss: float, **other: Any) -> dict[str, Any]:
    """A finished run with consistent counts; ``other`` overrides keys."""
    per_token = flops_per_token(get_shape(shape), VOCAB_SIZE, LENGTH, causal=get_objective(objective).causal)
    steps = round(budget / (per_token.flops_6nd * BATCH))
    tokens = steps * BATCH
    flops = per_token * tokens
    values = {
        "run": f"{objective}-{shape}-{budget:.0e}",
        "objective": objective,
        "variant": None,
        "shape": shape,
        "params_total": get_shape(shape).params_total(VOCAB_SIZE),
        "params_nonembedding": get_shape(shape).params_nonembedding,
        "tokens": tokens,
        "unique_tokens": tokens,
        "epochs": 1.0,
        "steps": steps,
        "global_batch_tokens": BATCH,
        "sequence_length": LENGTH,
        "flops_6nd": flops.flops_6nd,
        "flops_attention": flops.flops_attention,
        "flops_head": flops.flops_head,
        "flops_total": flops.flops_total,
        "lr": 1e-3,
        "schedule": "wsd",
        "warmup_steps": 10,
        "decay_steps": None,
        "seed": 1,
        "parent_checkpoint": None,
        "data_fingerprint": "d41d8cd9",
        "tokenizer": "bpe-1024",
        "vocab_size": VOCAB_SIZE,
        "val_nats_per_token": loss,
        "val_stderr": 0.01 * loss,
        "val_kind": get_objective(objective).val_kind,
        "val_bits_per_byte": loss * NATS_TO_BITS_PER_BYTE,
        "tokens_per_second": 7400.0,
        "mfu": None,
        "device": "cpu",
        "precision": "bf16-mixed",
        "wall_seconds": 12.5,
        "versions": {"torch": "2.13.0", "python": "3.11.7"},
        "git_commit": "0123abc",
        "status": "done",
        "val_by_source": None,
        "val_held_out": None,
        "val_policies": None,
        "source_flops": None,
    }
    return {**values, **other}


def sound(name: str = "a", budget: float = 1e12, **other: object) -> dict[str, object]:
    """A finished run of `arm`, by name."""
    return record("arm", "107k", budget, 4.0, run=name, **other)


def study(
    budgets: tuple[float, ...] = (3e11, 1e12, 3e12),
    shapes: tuple[str, ...] = ("107k", "443k"),
    noise: float = 0.005,
    seed: int = 0,
) -> pd.DataFrame:
    """Both objectives at every budget and shape; at each budget one shape follows ``LAWS``, the others are worse."""
    generator = np.random.default_rng(seed)
    records = []
    for objective, (number, budget) in itertools.product(LAWS, enumerate(budgets)):
        a, b = LAWS[objective]
        best = number * len(shapes) // len(budgets)
        for rank, shape in enumerate(shapes):
            loss = a * (budget / 1e12) ** -b * (1 + 0.03 * (rank - best) ** 2) * (1 + noise * generator.normal())
            records.append(record(objective, shape, budget, loss, val_stderr=noise * loss))  # type: ignore[arg-type]
    return table_of_records(records)


# --- worlds whose laws are those of the fits -------------------------------------------------------------------------


@dataclass(frozen=True)
class Chinchilla:
    """L(N, D) = E + A / N^alpha + B / D^beta, with its optimum by 6ND."""

    E: float
    A: float
    alpha: float
    B: float
    beta: float

    def loss(self, n: Any, d: Any) -> Any:
        return self.E + self.A / n**self.alpha + self.B / d**self.beta

    @property
    def n_exponent(self) -> float:
        return self.beta / (self.alpha + self.beta)

    def n_opt(self, flops: Any) -> Any:
        ratio = (self.alpha * self.A / (self.beta * self.B)) ** (1 / (self.alpha + self.beta))
        return ratio * (flops / 6) ** self.n_exponent

    def best(self, flops: Any) -> Any:
        return self.loss(self.n_opt(flops), flops / 6 / self.n_opt(flops))


@dataclass(frozen=True)
class Valleys:
    """log loss = log(a (C / 1e18)^-b) + width (log N - log N_opt)^2, N_opt = n (C / 1e18)^a_n: the isoFLOP model."""

    a: float
    b: float
    n: float
    n_exponent: float
    width: float = 0.03

    def n_opt(self, flops: Any) -> Any:
        return self.n * (flops / 1e18) ** self.n_exponent

    def best(self, flops: Any) -> Any:
        return self.a * (flops / 1e18) ** -self.b

    def loss(self, n: Any, d: Any) -> Any:
        flops = 6 * n * d
        return self.best(flops) * np.exp(self.width * np.log(n / self.n_opt(flops)) ** 2)


CHINCHILLA = {
    "arm": Chinchilla(1.8, 400.0, 0.34, 1200.0, 0.32),
    "llada": Chinchilla(2.0, 420.0, 0.34, 1500.0, 0.32),
}
VALLEYS = {"arm": Valleys(3.6, 0.06, 5e7, 0.5), "llada": Valleys(3.8, 0.055, 4e7, 0.48)}
World = Mapping[str, Chinchilla | Valleys]
SIMULATED_BUDGETS = tuple(np.geomspace(1e17, 1e19, 6))


def true_multiplier(world: World, flops: float, objective: str = "llada", reference: str = "arm") -> float:
    """FLOPs by 6ND at which an objective reaches what the reference reaches at the given ones, over these."""
    goal, law = world[reference].best(flops), world[objective]
    root = brentq(lambda x: np.log(law.best(np.exp(x)) / goal), np.log(flops) - 20, np.log(flops) + 20)
    return float(np.exp(root) / flops)


def simulated_study(
    world: World,
    seed: int = 0,
    *,
    noise: float = 0.003,
    shared: float = 0.0,
    spread: float = 0.0,
    stderr: bool = True,
    budgets: tuple[float, ...] = SIMULATED_BUDGETS,
    shapes: int = 5,
    width: float = 4.0,
    drift: float = 0.0,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """A results table from a world, and the covariance of its losses.

    Args:
        world: the laws of the objectives.
        seed: of the noise.
        noise: relative standard error of each loss by itself.
        shared: relative standard error that all runs have in common.
        spread: relative scatter of the runs beyond those errors, as seeds make it.
        stderr: whether the table holds standard errors.
        budgets: in FLOPs by 6ND.
        shapes: at each budget, evenly in log N between N_opt / width and N_opt * width.
        width: see ``shapes``.
        drift: by how much log N of the grid's centre is off at the first budget, as much the other way at the last.
    """
    generator = np.random.default_rng(seed)
    common = shared * generator.standard_normal()
    records = []
    for objective, law in world.items():
        for offset, budget in zip(np.linspace(drift, -drift, len(budgets)), budgets, strict=True):
            for place in np.linspace(-1, 1, shapes):
                n = law.n_opt(budget) * width**place * np.exp(offset)
                tokens = round(budget / 6 / n)
                loss = law.loss(n, tokens) * np.exp(common + np.hypot(noise, spread) * generator.standard_normal())
                records.append(_simulated(objective, budget, n, tokens, loss, np.hypot(noise, shared) if stderr else 0))
    table = table_of_records(records)
    relative = noise**2 * np.eye(len(table)) + shared**2
    loss = table["val_nats_per_token"].to_numpy()
    names = [f"{run}@{steps}" for run, steps in zip(table["run"], table["steps"], strict=True)]
    return table, pd.DataFrame(relative * np.outer(loss, loss), index=names, columns=names)


def independent_errors(table: pd.DataFrame) -> pd.DataFrame:
    """The covariance of losses whose standard errors have nothing in common."""
    names = [f"{run}@{steps}" for run, steps in zip(table["run"], table["steps"], strict=True)]
    return pd.DataFrame(np.diag(table["val_stderr"].to_numpy(float) ** 2), index=names, columns=names)


def _simulated(objective: str, budget: float, n: float, tokens: int, loss: float, error: float) -> dict[str, Any]:
    extra = 6 * 4000 * n**0.55 * (1 if objective == "arm" else 1.5)  # small models spend more than half of it there
    return {
        "run": f"{objective}-{n:.4g}-{budget:.2g}",
        "objective": objective,
        "shape": f"{n:.3g}",
        "params_nonembedding": round(n),
        "tokens": tokens,
        "steps": max(1, tokens // BATCH),
        "flops_6nd": 6 * n * tokens,
        "flops_attention": extra * tokens / 2,
        "flops_head": extra * tokens / 2,
        "flops_total": (6 * n + extra) * tokens,
        "data_fingerprint": "d41d8cd9",
        "tokenizer": "bpe-1024",
        "sequence_length": LENGTH,
        "val_nats_per_token": loss,
        "val_stderr": error * loss or None,
        "val_kind": get_objective(objective).val_kind,
        "val_bits_per_byte": loss * NATS_TO_BITS_PER_BYTE,
        "tokens_per_second": 7400.0,
        "status": "done",
    }
