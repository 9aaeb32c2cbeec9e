"""What a run has left, in a form that can be compared: curves row by row, hashes of weights and optimizer, results."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llada_lightning.checkpoints.run_folder import (
    BRANCHES,
    CHECKPOINTS,
    checkpoints_by_step,
    content_hash,
    digest,
    is_sharded,
    last_checkpoint,
    read_sharded,
)
from llada_lightning.records import RESULT_COLUMNS, VALIDATION_FILE, read_records

CLOCK_COLUMNS = frozenset({"seconds", "mfu", "peak_memory_bytes"})
"""Of metrics.csv: they depend on the machine, as do all that end with `_per_second`."""
INEXACT_KEYS = frozenset({"tokens_per_second", "mfu", "wall_seconds", "git_commit"})
"""Of result.json: the clock's, and the state of the checkout."""

Row = dict[str, str]


@dataclass(frozen=True)
class RunState:
    """What must be equal between two runs of one configuration.

    Attributes:
        curves: by phase ('' is the run or its trunk): the rows of metrics.csv without the clock's columns.
        weights: by phase: sha256 over the final weights, tensor by tensor.
        optimizer: by phase: sha256 over the optimizer's state and the schedule's.
        records: of result.json, without the inexact keys.
        validation: the text of validation.csv.
    """

    curves: dict[str, list[Row]]
    weights: dict[str, str]
    optimizer: dict[str, str]
    records: list[dict[str, Any]]
    validation: str


def read_state(folder: Path) -> RunState:
    """The state of a finished run.

    Raises:
        AssertionError: a record names another parent than the trunk's checkpoint at the branch's first step.
    """
    curves, weights, optimizer = {}, {}, {}
    for name, phase in phases(folder).items():
        curves[name] = curve(phase)
        checkpoint = last_checkpoint(phase / CHECKPOINTS)
        assert checkpoint is not None, f"{phase} has no checkpoint"
        content = read_sharded(checkpoint) if is_sharded(checkpoint) else torch.load(checkpoint, weights_only=True)
        weights[name] = digest(content["state_dict"])
        optimizer[name] = digest([content["optimizer_states"], content["lr_schedulers"]])
    records = read_records(folder)
    for record in records:
        if record["parent_checkpoint"] is not None:
            fork = checkpoints_by_step(folder / CHECKPOINTS)[record["steps"] - record["decay_steps"]]
            assert record["parent_checkpoint"] == content_hash(fork), f"{folder} names another parent than {fork}"
    exact = [key for key in RESULT_COLUMNS if key not in INEXACT_KEYS]
    return RunState(
        curves, weights, optimizer, [{k: r[k] for k in exact} for r in records], (folder / VALIDATION_FILE).read_text()
    )


def phases(folder: Path) -> dict[str, Path]:
    """The folders of a run's fits by name: its own, and its branches'."""
    branches = sorted((folder / BRANCHES).glob("*"), key=lambda path: int(path.name))
    return {"": folder, **{path.name: path for path in branches}}


def curve(phase: Path) -> list[Row]:
    """The rows of a phase's metrics.csv as they stand, without the columns that depend on the machine."""
    with (phase / "metrics.csv").open(newline="") as file:
        return [
            {key: value for key, value in row.items() if not (key in CLOCK_COLUMNS or key.endswith("_per_second"))}
            for row in csv.DictReader(file)
        ]


def differences(state: RunState, reference: RunState) -> dict[str, str]:
    """What differs, with the first place: keys among curve, weights, optimizer, result; empty: all is equal."""
    found = {}
    for name, rows in reference.curves.items():
        place = _first_difference(state.curves.get(name, []), rows)
        if place:
            found["curve"] = f"{name or 'run'}: {place}"
    if state.curves.keys() != reference.curves.keys():
        found["curve"] = f"phases {sorted(state.curves)} instead of {sorted(reference.curves)}"
    for key in ("weights", "optimizer"):
        mine, theirs = getattr(state, key), getattr(reference, key)
        if mine != theirs:
            found[key] = f"of {', '.join(name or 'run' for name in theirs if mine.get(name) != theirs[name])}"
    if state.records != reference.records:
        pairs = zip(state.records, reference.records, strict=False)
        keys = sorted({key for mine, theirs in pairs for key in theirs if mine[key] != theirs[key]})
        found["result"] = f"{len(state.records)} records, {', '.join(keys) or 'another number of them'}"
    elif state.validation != reference.validation:
        found["result"] = VALIDATION_FILE
    return found


def _first_difference(mine: list[Row], theirs: list[Row]) -> str | None:
    for row, expected in zip(mine, theirs, strict=False):
        if row != expected:
            keys = [key for key in expected if row.get(key) != expected[key]]
            return f"step {expected['step']}: {keys[0]} is {row.get(keys[0])}, not {expected[keys[0]]}" if keys else "?"
    return f"{len(mine)} rows, not {len(theirs)}" if len(mine) != len(theirs) else None
