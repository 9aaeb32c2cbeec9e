"""Synthetic studies: results tables whose law is known."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pandas as pd

from llada_lightning.scaling.flops import Objective, flops_per_token
from llada_lightning.scaling.results import table_of_records
from llada_lightning.scaling.shapes import get_shape

VOCAB_SIZE, LENGTH, BATCH = 1024, 128, 2048
NATS_TO_BITS_PER_BYTE = 0.45
LAWS = {"arm": (4.0, 0.08), "llada": (4.6, 0.08)}
"""a and b of loss = a (C / 1e12)^-b at the best shape."""


def record(objective: Objective, shape: str, budget: float, loss: float, **other: Any) -> dict[str, Any]:
    """A finished run with consistent counts; ``other`` overrides keys."""
    per_token = flops_per_token(get_shape(shape), VOCAB_SIZE, LENGTH, objective)
    steps = round(budget / (per_token.flops_6nd * BATCH))
    tokens = steps * BATCH
    flops = per_token * tokens
    values = {
        "run": f"{objective}-{shape}-{budget:.0e}",
        "objective": objective,
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
        "val_kind": "exact" if objective == "arm" else "bound",
        "val_bits_per_byte": loss * NATS_TO_BITS_PER_BYTE,
        "tokens_per_second": 7400.0,
        "mfu": None,
        "device": "cpu",
        "precision": "bf16-mixed",
        "wall_seconds": 12.5,
        "versions": {"torch": "2.13.0", "python": "3.11.7"},
        "git_commit": "0123abc",
        "status": "done",
    }
    return {**values, **other}


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
