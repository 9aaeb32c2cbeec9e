"""Scores of a run's checkpoints on tasks: a file in the run's folder, and columns of the results table.

``evaluations.csv`` in a run's folder has a row for each step and task. A results table takes from it, for the step of
each of its rows, the columns ``task_<name>`` (percent) and ``task_<name>_stderr``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from llada_lightning.files import is_there, written_atomically
from llada_lightning.scaling.results import read_typed_csv

EVALUATIONS_FILE = "evaluations.csv"
EVALUATION_COLUMNS = ("steps", "task", "score", "stderr", "n", "metric", "settings")
"""``score`` and ``stderr`` are in percent; ``settings`` say how it was measured."""


def write_evaluations(folder: Path | str, rows: Sequence[dict[str, Any]]) -> Path:
    """Adds rows to a run's evaluations; those of the same step and task replace the ones before. Atomic.

    Args:
        folder: the run's folder.
        rows: with exactly the keys ``EVALUATION_COLUMNS``.

    Raises:
        UserError: the file that is there is damaged.
    """
    path = Path(folder) / EVALUATIONS_FILE
    table = pd.DataFrame(rows, columns=list(EVALUATION_COLUMNS))
    if is_there(path):
        table = pd.concat([read_evaluations(folder), table])
    table = table.drop_duplicates(["steps", "task"], keep="last").sort_values(["steps", "task"])
    with written_atomically(path) as temporary:
        table.to_csv(temporary, index=False)
    return path


def read_evaluations(folder: Path | str) -> pd.DataFrame:
    """The columns ``EVALUATION_COLUMNS``; no rows where a run has no evaluations.

    Raises:
        UserError: the file is damaged.
    """
    path = Path(folder) / EVALUATIONS_FILE
    if not is_there(path):
        return pd.DataFrame(columns=list(EVALUATION_COLUMNS))
    types = dict(zip(EVALUATION_COLUMNS, ("int64", str, "float64", "float64", "int64", str, str), strict=True))
    return read_typed_csv(path, types, "delete it and evaluate again")


def task_columns(folder: Path | str, steps: Any) -> dict[str, float]:
    """The columns of a results table that the evaluations at a step give; none where a run has no evaluations.

    Raises:
        UserError: the file is damaged.
    """
    columns: dict[str, float] = {}
    if not is_there(Path(folder) / EVALUATIONS_FILE):
        return columns
    table = read_evaluations(folder)
    for row in table[table["steps"] == steps].to_dict("records"):
        columns[f"task_{row['task']}"] = float(row["score"])
        columns[f"task_{row['task']}_stderr"] = float(row["stderr"])
    return columns
