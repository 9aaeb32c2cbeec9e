"""`faults.csv`: the steps of a run whose loss or gradient was bad, and what was done about each."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from llada_lightning.errors import UserError
from llada_lightning.files import is_there, written_atomically
from llada_lightning.printing import shortened
from llada_lightning.reading import read_text

FAULTS_FILE = "faults.csv"
FAULT_COLUMNS = ("step", "kind", "loss", "grad_norm", "first_ordinal", "last_ordinal", "action")
"""``kind``: `loss` or `gradient` where that is not finite, else `spike`; ``action``: `skipped` or `reported`."""
SKIPPED, REPORTED = "skipped", "reported"


def read_faults(folder: Path) -> list[dict[str, str]]:
    """The rows of a folder's file, in order of step; none where there is no file.

    Raises:
        UserError: the file cannot be read, or is damaged.
    """
    path = folder / FAULTS_FILE
    if not is_there(path):
        return []
    text = read_text(path)
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        rows = list(reader)
    except csv.Error as error:
        raise UserError(f"'{shortened(path)}' is damaged ({error}); delete it") from error
    if not {"step", "action"} <= set(reader.fieldnames or []):
        raise UserError(f"'{shortened(path)}' is damaged (it lacks the columns step and action); delete it")
    for row in rows:
        if None in row or None in row.values() or not re.fullmatch(r"\d{1,18}", row["step"]):
            raise UserError(f"'{shortened(path)}' is damaged (step {shortened(row['step'], 40)}); delete it")
    return rows


def write_faults(folder: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write the file anew, whole or not at all."""
    with written_atomically(folder / FAULTS_FILE) as path, path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FAULT_COLUMNS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def skipped_updates(run: Path) -> int:
    """Updates that a run skipped, those of its branches included.

    Raises:
        UserError: as :func:`read_faults`.
    """
    folders = [run, *(path.parent for path in run.glob(f"branches/*/{FAULTS_FILE}"))]
    return sum(row.get("action") == SKIPPED for folder in folders for row in read_faults(folder))
