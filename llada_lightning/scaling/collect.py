"""From run folders to one results table; what is unfinished, diverged or found twice is named."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from llada_lightning.errors import UserError
from llada_lightning.scaling.results import (
    CONFIG_FILE,
    DIVERGED,
    DONE,
    RESULT_FILE,
    read_records,
    table_of_records,
)

_NOT_RUNS = frozenset({"checkpoints", "logs", "wandb", "__pycache__"})
"""Folders that hold no runs of ours; W&B's own folders hold other files named config.yaml."""


@dataclass(frozen=True)
class Duplicate:
    """One run and budget found in two folders; only the record in ``kept`` is in the table."""

    run: str
    steps: int | None
    kept: str
    dropped: str


@dataclass
class CollectReport:
    """What ``collect`` found beside sound results. Folders are written as they were found."""

    folders: int = 0
    """Run folders found."""
    records: int = 0
    """Rows of the table."""
    unfinished: dict[str, str] = field(default_factory=dict)
    """Folder -> why its run is not finished. Records that exist are in the table, with their status."""
    diverged: list[str] = field(default_factory=list)
    """Folders of finished runs whose validation loss is not finite. They are in the table."""
    duplicates: list[Duplicate] = field(default_factory=list)

    def lines(self) -> list[str]:
        """The report for people, one line a finding."""
        unfinished = [f"unfinished: {folder} ({reason})" for folder, reason in self.unfinished.items()]
        diverged = [f"diverged: {folder} (validation loss not finite)" for folder in self.diverged]
        duplicates = [f"duplicate: {twin.dropped} left out, the same run as {twin.kept}" for twin in self.duplicates]
        return unfinished + diverged + duplicates


def find_run_folders(paths: Iterable[Path | str]) -> list[Path]:
    """Folders that hold ``config.yaml`` or ``result.json``, at or below the paths, each once, in order of name.

    Raises:
        UserError: a path is not a folder.
    """
    found: dict[Path, Path] = {}
    for path in map(Path, paths):
        if not path.is_dir():
            raise UserError(f"collect: {path} is not a folder; give run folders, or folders that hold them")
        for folder, subfolders, files in os.walk(path):
            if CONFIG_FILE in files or RESULT_FILE in files:
                subfolders.clear()
                found.setdefault(Path(folder).resolve(), Path(folder))
            subfolders[:] = sorted(name for name in subfolders if name not in _NOT_RUNS and not name.startswith("."))
    return sorted(found.values())


def collect(paths: Iterable[Path | str]) -> tuple[pd.DataFrame, CollectReport]:
    """One row for each record of the run folders at or below ``paths``.

    Returns:
        The table, sorted by objective, FLOPs and size, and a report that names every run which is unfinished,
        diverged, or a duplicate. Of duplicates the table keeps one (a finished one if there is any); all other
        records are in it, whatever their status.

    Raises:
        UserError: a path is not a folder.
    """
    report = CollectReport()
    kept: dict[tuple[str, Any], tuple[Path, dict[str, Any]]] = {}
    for folder in find_run_folders(paths):
        report.folders += 1
        for record in _records_of(folder, report):
            _keep_one(kept, folder, record, report)
    for folder, record in kept.values():
        if _has_diverged(record):
            report.diverged.append(str(folder))
    report.records = len(kept)
    table = table_of_records([record for _, record in kept.values()])
    order = ["objective", "flops_6nd", "params_nonembedding", "run"]
    return table.sort_values(order, kind="stable", ignore_index=True), report


def _records_of(folder: Path, report: CollectReport) -> list[dict[str, Any]]:
    """A folder's records; notes in the report why its run is not finished."""
    try:
        records = read_records(folder)
    except UserError as error:
        report.unfinished[str(folder)] = str(error)
        return []
    open_status = [str(record.get("status")) for record in records if record.get("status") not in (DONE, DIVERGED)]
    if not records:
        report.unfinished[str(folder)] = f"no {RESULT_FILE}"
    elif open_status:
        report.unfinished[str(folder)] = f"status {', '.join(open_status)}"
    return records


def _keep_one(
    kept: dict[tuple[str, Any], tuple[Path, dict[str, Any]]],
    folder: Path,
    record: dict[str, Any],
    report: CollectReport,
) -> None:
    # A run without an identity is only equal to itself. Steps tell a run's budgets apart.
    key = (str(record.get("run") or folder), record.get("steps"))
    if key not in kept:
        kept[key] = (folder, record)
        return
    first_folder, first = kept[key]
    new_is_better = record.get("status") == DONE and first.get("status") != DONE
    winner, loser = (folder, first_folder) if new_is_better else (first_folder, folder)
    kept[key] = (folder, record) if new_is_better else kept[key]
    report.duplicates.append(Duplicate(key[0], key[1], str(winner), str(loser)))


def _has_diverged(record: dict[str, Any]) -> bool:
    loss = record.get("val_nats_per_token")
    finite = isinstance(loss, (int, float)) and math.isfinite(loss)
    return record.get("status") == DIVERGED or (record.get("status") == DONE and not finite)
