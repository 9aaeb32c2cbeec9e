"""The loss of one run by noise level, from its `metrics.csv`: at which mask ratios it became better, and when."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from llada_lightning.identity import stable_name
from llada_lightning.objectives import OBJECTIVES, Objective
from llada_lightning.records import CONFIG_FILE, METRICS_FILE, NOISE_LEVELS, level_columns, metrics_rows
from llada_lightning.study.fits.uncertainty import Array
from llada_lightning.support.errors import UserError
from llada_lightning.support.files import is_there
from llada_lightning.support.printing import shortened
from llada_lightning.support.reading import read_text, read_yaml

MOST_WINDOWS = 8
"""The largest number of parts that a training is divided into, and of validations that are shown."""

SPLITS: tuple[Literal["train", "val"], ...] = ("train", "val")

MIDDLES = (np.arange(NOISE_LEVELS) + 0.5) / NOISE_LEVELS
"""(T,): the middle of each bin of the noise level."""


@dataclass(frozen=True)
class LevelCurves:
    """The losses of some windows of a run.

    Attributes:
        steps: The last step of each window.
        nats_WT: (W, T), nats per scored token; NaN where a bin had none.
    """

    steps: list[int]
    nats_WT: Array


@dataclass(frozen=True)
class RunLevels:
    """The losses of a run by noise level.

    Attributes:
        run: The name of the run's folder.
        objective: The run's row of the table of objectives; None where its configuration names none of them.
        curves: `train`: the mean over each of equal parts of the training, in which each row of the log counts alike;
            `val`: single validations. A split that has no value is left out.
    """

    run: str
    objective: Objective | None
    curves: dict[str, LevelCurves]

    @property
    def unit(self) -> str:
        """What the losses are of: of masked tokens, or of all tokens where none is masked and some are replaced."""
        if self.objective is None:
            return "nats per scored token"
        return "nats per token, of all positions" if self.objective.replaces else "nats per masked token"

    def as_dict(self) -> dict[str, Any]:
        """The same for JSON; null where a bin had no token."""
        windows = {
            split: {"steps": own.steps, "nats_per_scored_token": own.nats_WT.tolist()}
            for split, own in self.curves.items()
        }
        name = None if self.objective is None else self.objective.name
        return {"run": self.run, "objective": name, "levels": MIDDLES.tolist(), **windows}


def read_levels(folder: Path) -> RunLevels:
    """The losses by noise level that a run has logged.

    Args:
        folder: The folder of a run, or of one of its branches.

    Raises:
        UserError: There is no `metrics.csv`, it is damaged, or it has no loss by noise level.
    """
    path = folder / METRICS_FILE
    if not is_there(path):
        raise UserError(
            f"curves: '{shortened(folder)}' has no {METRICS_FILE}; --by-level needs the folder of a run, or of one of "
            "its branches"
        )
    try:
        rows = metrics_rows(io.StringIO(read_text(path), newline=""))
        found = {split: _curves(rows, split) for split in SPLITS}
    except (csv.Error, KeyError, ValueError) as error:
        raise UserError(f"'{shortened(path)}' is damaged ({shortened(error)}); it cannot be drawn") from error
    curves: dict[str, LevelCurves] = {split: own for split, own in found.items() if own.steps}
    if not curves:
        raise UserError(
            f"'{shortened(path)}' has no loss by noise level; a run has one that an objective with noise has trained "
            "and whose log began with its columns"
        )
    return RunLevels(folder.resolve().name, _objective(folder), curves)


def _curves(rows: list[dict[str, str]], split: Literal["train", "val"]) -> LevelCurves:
    columns = level_columns(split)
    found = [row for row in rows if not row.keys().isdisjoint(columns)]
    if not found:
        return LevelCurves([], np.empty((0, NOISE_LEVELS)))
    steps_R = np.array([int(row["step"]) for row in found])
    nats_RT = np.array([[float(row.get(column, "nan")) for column in columns] for row in found])
    windows = min(MOST_WINDOWS, len(found))
    if split == "val":
        chosen = np.linspace(0, len(found) - 1, windows).round().astype(int)
        return LevelCurves(steps_R[chosen].tolist(), nats_RT[chosen])
    parts = np.array_split(np.arange(len(found)), windows)
    return LevelCurves([int(steps_R[part[-1]]) for part in parts], np.stack([_mean(nats_RT[part]) for part in parts]))


def _mean(nats_RT: Array) -> Array:
    """(T,): the mean over the rows that have a number; NaN where none has."""
    known_RT = np.isfinite(nats_RT)
    counts_T = known_RT.sum(axis=0)
    return np.where(counts_T > 0, np.where(known_RT, nats_RT, 0).sum(axis=0) / counts_T.clip(min=1), np.nan)


def _objective(folder: Path) -> Objective | None:
    """The objective whose module the configuration names; a branch's lies two folders above it."""
    config = next((path for path in (folder, folder.resolve().parent.parent) if is_there(path / CONFIG_FILE)), None)
    settings = None if config is None else read_yaml(config / CONFIG_FILE)
    model = settings.get("model") if isinstance(settings, dict) else None
    named = model.get("class_path") if isinstance(model, dict) else None
    return OBJECTIVES.get(stable_name(named) or "")
