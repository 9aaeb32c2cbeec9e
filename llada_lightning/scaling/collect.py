"""From run folders and W&B projects to one results table; what is unfinished, diverged or found twice is named."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from llada_lightning.errors import UserError
from llada_lightning.scaling.covariance import CovarianceReport, Row
from llada_lightning.scaling.evaluations import task_columns
from llada_lightning.scaling.faults import skipped_updates
from llada_lightning.scaling.results import (
    CONFIG_FILE,
    DIVERGED,
    DONE,
    RESULT_FILE,
    expected_records,
    read_records,
    table_of_records,
    typed_record,
)
from llada_lightning.scaling.wandb_projects import FINISHED, PREFIX, ProjectRun, read_project

_NOT_RUNS = frozenset({"checkpoints", "logs", "wandb", "__pycache__"})
"""Folders that hold no runs of ours; W&B's own folders hold other files named config.yaml."""

_NAMES_A_LINE = 10
"""Names in one line for people; ``--json`` lists all."""

SAME_RUN_TOLERANCE = 1e-3
"""Relative difference of two losses of one run above which they cannot be the same run's: rounding is far below."""


@dataclass(frozen=True)
class Duplicate:
    """One run and budget found in two places; only the record in ``kept`` is in the table.

    Args:
        difference: of the two losses, without sign, in nats per token; NaN where one is not a number.
        relative: the same over the kept loss.
    """

    run: str
    steps: int | None
    kept: str
    dropped: str
    difference: float
    relative: float

    def lines(self) -> list[str]:
        said = f"duplicate: {self.dropped} left out, the same run as {self.kept}; "
        if not math.isfinite(self.difference):
            return [f"{said}the losses cannot be compared, one is not a number"]
        lines = [f"{said}losses differ by {self.difference:.1e} nats/token"]
        if self.relative > SAME_RUN_TOLERANCE:
            lines.append(
                f"warning: {self.run} at step {self.steps}: one run, two losses, {self.relative:.1%} apart; "
                "look at both before you trust either"
            )
        return lines


@dataclass
class CollectReport:
    """What ``collect`` found beside sound results. Folders and W&B runs are written as they were found."""

    folders: int = 0
    """Run folders found."""
    wandb_runs: int = 0
    """Runs of ours found in W&B projects."""
    records: int = 0
    """Rows of the table."""
    unfinished: dict[str, str] = field(default_factory=dict)
    """Folder or W&B run -> why it is not finished. Records that exist are in the table, with their status."""
    diverged: list[str] = field(default_factory=list)
    """Where the finished runs are whose validation loss is not finite. They are in the table."""
    skipped: dict[str, int] = field(default_factory=dict)
    """Folder -> updates that its run skipped, because of bad numbers."""
    duplicates: list[Duplicate] = field(default_factory=list)
    foreign: dict[str, list[str]] = field(default_factory=dict)
    """W&B project -> its runs that are not ours."""
    covariance: CovarianceReport | None = None
    """Filled in by the command, which writes the file."""

    def lines(self) -> list[str]:
        """The report for people, one line a finding."""
        unfinished = [f"unfinished: {where} ({reason})" for where, reason in self.unfinished.items()]
        diverged = [f"diverged: {where} (validation loss not finite)" for where in self.diverged]
        counts = [f"{where} ({count})" for where, count in self.skipped.items()]
        skipped = [f"skipped updates, see faults.csv: {_first_of(counts)}"] if counts else []
        duplicates = [line for twin in self.duplicates for line in twin.lines()]
        foreign = [
            f"not ours: {len(runs)} of {project}'s runs, without a record of `llada fit`: {_first_of(runs)}"
            for project, runs in self.foreign.items()
        ]
        covariance = self.covariance.lines() if self.covariance else []
        return unfinished + diverged + skipped + duplicates + foreign + covariance


@dataclass
class Collection:
    """Records by run and steps, each with where it was found, and what was found beside."""

    report: CollectReport = field(default_factory=CollectReport)
    kept: dict[tuple[str, Any], tuple[str, dict[str, Any]]] = field(default_factory=dict)

    def add(self, where: str, records: Iterable[dict[str, Any]], problems: Iterable[str]) -> None:
        """A run's records and the reasons why it is not finished. What cannot be a record is such a reason too."""
        problems = list(problems)
        for record in records:
            try:
                self._keep_one(where, typed_record(record, f"record at step {record.get('steps')}"))
            except UserError as error:
                problems.append(str(error))
        if problems:
            self.report.unfinished[where] = "; ".join(problems)

    def _keep_one(self, where: str, record: dict[str, Any]) -> None:
        # A run without an identity is only equal to itself. Steps tell a run's budgets apart.
        key = (record["run"] or where, record["steps"])
        if key not in self.kept:
            self.kept[key] = (where, record)
            return
        other, first = self.kept[key]
        new_is_better = record["status"] == DONE and first["status"] != DONE
        winner, loser = (where, other) if new_is_better else (other, where)
        if new_is_better:
            self.kept[key] = (where, record)
        loss, difference = _loss(self.kept[key][1]), abs(_loss(record) - _loss(first))
        relative = difference / abs(loss) if loss else math.nan
        self.report.duplicates.append(Duplicate(*key, winner, loser, difference, relative))

    def table(self) -> pd.DataFrame:
        """The records kept with their scores of tasks, sorted by objective, FLOPs and size."""
        table = table_of_records([record for _, record in self.kept.values()])
        scores = [
            {} if where.startswith(PREFIX) else task_columns(where, record["steps"])
            for where, record in self.kept.values()
        ]
        tasks = sorted({name for score in scores for name in score})
        table = table.join(pd.DataFrame(scores, columns=tasks, dtype="float64"))
        order = ["objective", "flops_6nd", "params_nonembedding", "run"]
        return table.sort_values(order, kind="stable", ignore_index=True)

    def rows(self) -> list[Row]:
        """The records kept, with their folders, for the covariance."""
        found = self.kept.values()
        return [Row(record, None if where.startswith(PREFIX) else Path(where)) for where, record in found]


def collect(sources: Iterable[Path | str]) -> tuple[pd.DataFrame, CollectReport]:
    """One row for each record of the run folders at or below the paths, and of the W&B projects.

    Args:
        sources: paths, and W&B projects as ``wandb:ENTITY/PROJECT``. Folders are read first.

    Returns:
        The table, sorted by objective, FLOPs and size, and a report that names every run which is unfinished,
        diverged, a duplicate, or not ours. Of duplicates the table keeps one (a finished one if there is any, else
        that in a folder); all other records are in it, whatever their status.

    Raises:
        UserError: a path is not a folder, or a W&B project cannot be read.
    """
    collection = gather(sources)
    return collection.table(), collection.report


def gather(sources: Iterable[Path | str]) -> Collection:
    """As ``collect``, with each record's place."""
    names = [str(source) for source in sources]
    collection = Collection()
    for folder in find_run_folders(name for name in names if not name.startswith(PREFIX)):
        collection.report.folders += 1
        _add_folder(collection, folder)
        if count := skipped_updates(folder):
            collection.report.skipped[str(folder)] = count
    for project in dict.fromkeys(name for name in names if name.startswith(PREFIX)):
        _add_project(collection, project)
    collection.report.diverged = [where for where, record in collection.kept.values() if _has_diverged(record)]
    collection.report.records = len(collection.kept)
    return collection


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


def _add_folder(collection: Collection, folder: Path) -> None:
    try:
        records = read_records(folder)
    except UserError as error:
        collection.add(str(folder), [], [str(error)])
        return
    collection.add(str(folder), records, _open_ends(records, expected_records(folder), f"no {RESULT_FILE}"))


def _add_project(collection: Collection, project: str) -> None:
    for run in read_project(project):
        if run.ours:
            collection.report.wandb_runs += 1
            collection.add(run.where, run.records, _open_ends_of_project_run(run))
        else:
            collection.report.foreign.setdefault(project, []).append(run.where.removeprefix(f"{project}/"))


def _open_ends_of_project_run(run: ProjectRun) -> Iterator[str]:
    if run.state != FINISHED:
        yield f"state {run.state}"
    if run.damage is not None:
        yield run.damage
    else:
        yield from _open_ends(run.records, run.budgets, "no record in its summary")


def _open_ends(records: list[dict[str, Any]], expected: int, nothing: str) -> Iterator[str]:
    """Why a run with these records is not finished."""
    open_status = [str(record.get("status")) for record in records if record.get("status") not in (DONE, DIVERGED)]
    if open_status:
        yield f"status {', '.join(open_status)}"
    if not records:
        yield nothing
    elif len(records) < expected:
        yield f"{len(records)} of {expected} budgets reached"


def _first_of(names: list[str]) -> str:
    more = len(names) - _NAMES_A_LINE
    return ", ".join(names[:_NAMES_A_LINE]) + (f" and {more} more" if more > 0 else "")


def _has_diverged(record: dict[str, Any]) -> bool:
    return record["status"] == DIVERGED or (record["status"] == DONE and not math.isfinite(_loss(record)))


def _loss(record: dict[str, Any]) -> float:
    loss = record["val_nats_per_token"]
    return math.nan if loss is None else float(loss)
