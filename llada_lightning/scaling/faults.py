"""`faults.csv`: the steps of a run whose loss or gradient was bad, and what was done about each."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from llada_lightning.files import written_atomically

FAULTS_FILE = "faults.csv"
FAULT_COLUMNS = ("step", "kind", "loss", "grad_norm", "first_ordinal", "last_ordinal", "action")
"""``kind``: `loss` or `gradient` where that is not finite, else `spike`; ``action``: `skipped` or `reported`."""
SKIPPED, REPORTED = "skipped", "reported"


def read_faults(folder: Path) -> list[dict[str, str]]:
    """The rows of a folder's file, in order of step; none where there is no file."""
    path = folder / FAULTS_FILE
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if (row.get("step") or "").isdecimal()]


def write_faults(folder: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write the file anew, whole or not at all."""
    with written_atomically(folder / FAULTS_FILE) as path, path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FAULT_COLUMNS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def skipped_updates(run: Path) -> int:
    """Updates that a run skipped, those of its branches included."""
    folders = [run, *(path.parent for path in run.glob(f"branches/*/{FAULTS_FILE}"))]
    return sum(row.get("action") == SKIPPED for folder in folders for row in read_faults(folder))
