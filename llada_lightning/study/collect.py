"""From run folders and W&B projects to one results table; every run that is not in it, or not sound, is named."""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from llada_lightning.records import (
    CONFIG_FILE,
    DIVERGED,
    DONE,
    RESULT_COLUMNS,
    RESULT_FILE,
    expected_budgets,
    expected_records,
    read_records,
    skipped_updates,
    task_columns,
)
from llada_lightning.settings import NOT_RUNS
from llada_lightning.study.results import CovarianceReport, Row, table_of_records, typed_record
from llada_lightning.study.sweep import COPY_SUFFIX, read_sweep, render_command
from llada_lightning.support.errors import UserError
from llada_lightning.support.files import is_there
from llada_lightning.support.printing import shortened
from llada_lightning.support.reading import parse_json

PREFIX = "wandb:"
"""The beginning of a source that is a W&B project: ``wandb:ENTITY/PROJECT``."""
_BESIDE_CONFIG = ("metrics.csv", "tokenizer.json")
"""What `fit` writes beside ``config.yaml`` at its start, and W&B does not."""

_NAMES_A_LINE = 10
"""Names in one line for people; ``--json`` lists all."""
SAME_RUN_TOLERANCE = 1e-3
"""Relative difference of two losses of one run above which they cannot be the same run's: rounding is far below."""

_CONFIG_OF_OURS = frozenset({"model", "data", "trainer", "budget", "run"})
"""Sections of a resolved configuration: by them a run of ours in W&B is known before it has a record."""


@dataclass(frozen=True)
class Duplicate:
    """One run and budget found in two places; only the record in ``kept`` is in the table."""

    run: str
    steps: int | None
    kept: str
    dropped: str
    difference: float
    """The absolute difference of the two losses in nats per token; NaN where one is not a number."""
    relative: float
    """The difference over the kept loss."""

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
    not_begun: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Copy of a study's sweep file -> how many of its runs have no folder, and how many it has."""
    diverged: list[str] = field(default_factory=list)
    """Finished runs whose validation loss is not finite. They are in the table."""
    damaged: dict[str, list[str]] = field(default_factory=dict)
    """Folder -> what cannot be read beside its records, which are in the table."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Folder -> why nothing in it is in the table."""
    skipped: dict[str, int] = field(default_factory=dict)
    """Folder -> updates that its run skipped, because of bad numbers."""
    duplicates: list[Duplicate] = field(default_factory=list)
    foreign: dict[str, list[str]] = field(default_factory=dict)
    """W&B project -> its runs that are not ours."""
    covariance: CovarianceReport | None = None
    """Filled in by the command, which writes the file."""
    yardsticks: dict[str, CovarianceReport] = field(default_factory=dict)
    """The same for the losses by each named yardstick."""

    @property
    def missing(self) -> str | None:
        """How many of the runs are done, as a sentence; None where all are."""
        begun = self.folders + self.wandb_runs
        done, known = begun - len(self.unfinished), begun + sum(count for count, _ in self.not_begun.values())
        return None if done >= known else f"Unfinished: {done} of {known} runs are done."

    def lines(self) -> list[str]:
        """The report for people, one line a finding."""
        skipped = [f"{where} ({count})" for where, count in self.skipped.items()]
        return [
            *(f"unfinished: {where} ({reason})" for where, reason in self.unfinished.items()),
            *(
                f"not begun: {count} of the {planned} runs of {where}; `llada sweep run` does what is left"
                for where, (count, planned) in self.not_begun.items()
            ),
            *(f"damaged: {where} ({'; '.join(reasons)})" for where, reasons in self.damaged.items()),
            *(f"left out: {where} ({reason})" for where, reason in self.left_out.items()),
            *(f"diverged: {where} (validation loss not finite)" for where in self.diverged),
            *([f"skipped updates, see faults.csv: {_first_of(skipped)}"] if skipped else []),
            *(line for twin in self.duplicates for line in twin.lines()),
            *(
                f"not ours: {len(runs)} of {project}'s runs, without a record of `llada fit`: {_first_of(runs)}"
                for project, runs in self.foreign.items()
            ),
            *(self.covariance.lines() if self.covariance else []),
            *(f"{name}: {line}" for name, own in self.yardsticks.items() for line in own.lines()),
        ]


@dataclass
class Collection:
    """The records that are kept, and what was found beside."""

    report: CollectReport = field(default_factory=CollectReport)
    kept: dict[tuple[str, Any], tuple[str, dict[str, Any]]] = field(default_factory=dict)
    """Run and steps -> where the record was found, and the record."""
    scores: list[dict[str, float]] = field(default_factory=list)
    """For each record kept, the scores of its tasks by the names of their columns."""

    def add(self, where: str, records: Iterable[dict[str, Any]], problems: Iterable[str]) -> None:
        """A run's records and the reasons why it is not finished. What cannot be a record is such a reason too."""
        problems = list(problems)
        for record in records:
            try:
                self._keep_one(where, typed_record(record, f"record at step {shortened(record.get('steps'), 40)}"))
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
        kept, dropped = self.kept[key], (where, record)
        if _soundness(record) > _soundness(kept[1]):
            kept, dropped = dropped, kept
        self.kept[key] = kept
        loss, difference = _loss(kept[1]), abs(_loss(kept[1]) - _loss(dropped[1]))
        relative = difference / abs(loss) if loss else math.nan
        self.report.duplicates.append(Duplicate(*key, kept[0], dropped[0], difference, relative))

    def table(self) -> pd.DataFrame:
        """The records kept with their scores of tasks, sorted by objective, FLOPs and size."""
        table = table_of_records([record for _, record in self.kept.values()])
        tasks = sorted({name for score in self.scores for name in score})
        table = table.join(pd.DataFrame(self.scores, columns=tasks, dtype="float64"))
        order = ["objective", "flops_6nd", "params_nonembedding", "run"]
        return table.sort_values(order, kind="stable", ignore_index=True)

    @contextmanager
    def noting_damage(self, where: str) -> Iterator[None]:
        """Puts what the block cannot read beside a run's records into the report."""
        try:
            yield
        except UserError as error:
            reasons = self.report.damaged.setdefault(where, [])
            if str(error) not in reasons:  # as every budget of the run meets it
                reasons.append(str(error))

    def rows(self) -> list[Row]:
        """The records kept, with their folders, for the covariance."""
        found = self.kept.values()
        return [Row(record, None if where.startswith(PREFIX) else Path(where)) for where, record in found]


def collect(sources: Iterable[Path | str]) -> tuple[pd.DataFrame, CollectReport]:
    """One row for each record of the run folders at or below the paths, and of the W&B projects.

    Args:
        sources: The paths, and W&B projects as ``wandb:ENTITY/PROJECT``. Folders are read first.

    Returns:
        The table, sorted by objective, FLOPs and size, and a report that names every run which is unfinished, damaged,
        diverged, a duplicate, left out, or not ours. Of duplicates the table keeps one (one that is finished and
        has a finite loss if there is any, else that in a folder); all other records are in it, whatever their status.

    Raises:
        UserError: A path is not a folder, or a W&B project cannot be read.
    """
    collection = gather(sources)
    return collection.table(), collection.report


def gather(sources: Iterable[Path | str]) -> Collection:
    """As ``collect``, with each record's place."""
    names = [str(source) for source in sources]
    collection = Collection()
    folders, collection.report.left_out = find_run_folders(name for name in names if not name.startswith(PREFIX))
    collection.report.folders = len(folders)
    collection.report.not_begun = _not_begun(folders)
    for folder in folders:
        _add_folder(collection, folder)
    for project in dict.fromkeys(name for name in names if name.startswith(PREFIX)):
        _add_project(collection, project)
    for where, record in collection.kept.values():
        scores: dict[str, float] = {}
        if not where.startswith(PREFIX):
            with collection.noting_damage(where):
                scores = task_columns(where, record["steps"])
        collection.scores.append(scores)
        status, finite = record["status"], math.isfinite(_loss(record))
        if status == DIVERGED or (status == DONE and not finite):
            collection.report.diverged.append(where)
    collection.report.records = len(collection.kept)
    return collection


def find_run_folders(paths: Iterable[Path | str]) -> tuple[list[Path], dict[str, str]]:
    """The run folders at or below the paths, and what is not searched.

    A folder that holds ``config.yaml`` or ``result.json`` is a run's. Within a run, and within the folders of other
    programs, ``config.yaml`` alone proves nothing: there another file of a run must lie beside it.

    Returns:
        The run folders, each once, in order of name; and folder -> why it may hold runs that are not among them: it is
        hidden, a link to a folder that is no run, or the system does not let it be read.

    Raises:
        UserError: A path is not a folder.
    """
    search = _Search()
    for path in map(Path, paths):
        if not (is_there(path) and path.is_dir()):
            raise UserError(
                f"collect: '{shortened(path)}' is not a folder; give run folders, or folders that hold them"
            )
        search.walk(path)
    return sorted(search.found.values()), search.not_searched()


class _Search:
    """Runs that were found, by their real place, and folder -> why it may hold others."""

    def __init__(self) -> None:
        self.found: dict[Path, Path] = {}
        self._left_out: dict[str, str] = {}
        self._roots: list[Path] = []

    def walk(self, root: Path) -> None:
        self._roots.append(root.resolve())
        strict: set[str] = set()  # folders in which config.yaml alone proves nothing
        hidden: set[str] = set()
        for folder, subfolders, files in os.walk(root, onerror=self._refused):
            is_run = _is_run([*files, *subfolders], folder in strict)
            if is_run:
                self._add(Path(folder), folder in hidden)
            subfolders.sort()
            for name in subfolders:
                below = os.path.join(folder, name)
                if folder in hidden or name.startswith("."):
                    hidden.add(below)
                if folder in strict or is_run or name in NOT_RUNS or name.startswith("."):
                    strict.add(below)
                if os.path.islink(below):  # which os.walk does not enter
                    self._look_at_link(Path(below), below in strict, below in hidden)

    def not_searched(self) -> dict[str, str]:
        """In order of name, without what was found in another way."""
        return {where: why for where, why in sorted(self._left_out.items()) if Path(where).resolve() not in self.found}

    def _add(self, run: Path, hidden: bool) -> None:
        if hidden:
            self._left_out[str(run)] = "a run in a hidden folder; rename it, or give this folder itself"
        else:
            self.found.setdefault(run.resolve(), run)

    def _look_at_link(self, link: Path, strict: bool, hidden: bool) -> None:
        """A link to a run is the run; one to another folder might lead far out of the study, and is not followed."""
        try:
            is_run = _is_run(os.listdir(link), strict)
        except OSError as error:
            self._refused(error)
            return
        target = link.resolve()
        if is_run:
            self._add(link, hidden)
        elif not strict and not any(target.is_relative_to(root) for root in self._roots):
            self._left_out[str(link)] = "a link to a folder that is no run; give that folder itself if it holds runs"

    def _refused(self, error: OSError) -> None:
        self._left_out[str(error.filename)] = f"it cannot be read: {error.strerror}"


def _is_run(names: Iterable[str], strict: bool) -> bool:
    """Whether a folder is a run's, by the names in it. A name that is not a file's is reported when it is read."""
    present = {RESULT_FILE, CONFIG_FILE, *_BESIDE_CONFIG}.intersection(names)
    return RESULT_FILE in present or (CONFIG_FILE in present and (len(present) > 1 or not strict))


def _add_folder(collection: Collection, folder: Path) -> None:
    where = str(folder)
    try:
        records = read_records(folder)
    except UserError as error:
        collection.add(where, [], [str(error)])
        return
    budgets = 1
    with collection.noting_damage(where):
        budgets = expected_records(folder)
    with collection.noting_damage(where):
        if count := skipped_updates(folder):
            collection.report.skipped[where] = count
    collection.add(where, records, _open_ends(records, budgets, f"no {RESULT_FILE}"))


def _not_begun(folders: Sequence[Path]) -> dict[str, tuple[int, int]]:
    """The runs without a folder of each study that one sweep alone has made: its copy -> how many, of how many."""
    found = {}
    for study, runs in Counter(folder.parent for folder in folders).items():
        copies = sorted(study.glob(f"*{COPY_SUFFIX}"))
        if len(copies) != 1:
            continue
        with suppress(UserError):  # an edited copy is the concern of `llada sweep`
            sweep = read_sweep(copies[0])
            planned = len({str(render_command(sweep, point)) for point in sweep.points})
            if planned > runs:
                found[str(copies[0])] = planned - runs, planned
    return found


def _open_ends(records: list[dict[str, Any]], expected: int, nothing: str) -> Iterator[str]:
    """Why a run with these records is not finished."""
    open_status = [str(record.get("status")) for record in records if record.get("status") not in (DONE, DIVERGED)]
    if open_status:
        yield f"status {', '.join(open_status)}"
    if not records:
        yield nothing
    elif len(records) < expected:
        yield f"{len(records)} of {expected} results reached"


def _first_of(names: list[str]) -> str:
    more = len(names) - _NAMES_A_LINE
    return ", ".join(names[:_NAMES_A_LINE]) + (f" and {more} more" if more > 0 else "")


def _soundness(record: dict[str, Any]) -> tuple[bool, bool]:
    """The rank of a record among those of one run, of which the highest is kept: finished, then with a finite loss."""
    return record["status"] == DONE, math.isfinite(_loss(record))


def _loss(record: dict[str, Any]) -> float:
    loss = record["val_nats_per_token"]
    return math.nan if loss is None else float(loss)


# --- W&B projects ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ProjectRun:
    """One run of a W&B project.

    A run of ours leaves its record in its summary: ``records``, a list of all of them (as JSON), where it has several
    budgets, else the record's own keys.
    """

    where: str
    """``wandb:ENTITY/PROJECT/ID``, with the run's display name."""
    state: str
    """The state by W&B: finished, running, crashed, failed, killed, …"""
    ours: bool
    """Whether ``llada fit`` made it."""
    records: list[dict[str, Any]]
    budgets: int
    """The number of records that its configuration asks for."""
    damage: str | None
    """Why its records cannot be read; None if they can."""


def _add_project(collection: Collection, project: str) -> None:
    for run in read_project(project):
        if not run.ours:
            collection.report.foreign.setdefault(project, []).append(run.where.removeprefix(f"{project}/"))
            continue
        collection.report.wandb_runs += 1
        problems = [] if run.state == "finished" else [f"state {run.state}"]
        if run.damage is None:
            problems += _open_ends(run.records, run.budgets, "no record in its summary")
        else:
            problems.append(run.damage)
        collection.add(run.where, run.records, problems)


def read_project(source: str) -> list[ProjectRun]:
    """All runs of ``wandb:ENTITY/PROJECT``, the oldest first, by W&B's public API.

    Raises:
        UserError: The name is of another form, wandb is not installed, nobody is logged in, the server cannot be
            reached or refuses, or it has no such project.
    """
    path = source.removeprefix(PREFIX)
    if not re.fullmatch(r"[^/\s]+/[^/\s]+", path):
        raise UserError(f"collect: {source}; a W&B project is given as {PREFIX}ENTITY/PROJECT")
    try:
        import wandb
    except ImportError as error:
        raise UserError(f"collect: {source} needs the package wandb; pip install wandb") from error
    try:
        runs = wandb.Api().runs(path, per_page=200, lazy=False)
        return [project_run(f"{PREFIX}{path}/{run.id}", run) for run in runs]
    except (wandb.errors.Error, ValueError, OSError) as error:  # a project that is not there is a ValueError
        reason = " ".join(str(error).split()).rstrip(".")
        raise UserError(f"collect: {source}: {reason}; check the name, `wandb login` and WANDB_BASE_URL") from error


def project_run(where: str, run: Any) -> ProjectRun:
    """What matters of a run of wandb's public API: its state, and the records in its summary."""
    summary, config = dict(run.summary_metrics or {}), dict(run.config or {})
    has_record = {"objective", "run"} <= set(summary)
    ours = has_record or "records" in summary or set(config) >= _CONFIG_OF_OURS
    records: Any = [summary] if ours and has_record else []
    damage = None
    if ours and "records" in summary:
        try:
            records = summary["records"]
            records = parse_json(records, "summary key records") if isinstance(records, str) else records
            if not isinstance(records, list) or not all(isinstance(record, Mapping) for record in records):
                raise UserError("summary key records: not a list of records")
        except UserError as error:
            records, damage = [], str(error)
    return ProjectRun(
        where=f"{where} ({run.name})" if run.name and run.name != run.id else where,
        state=str(run.state),
        ours=ours,
        records=[{column: record.get(column) for column in RESULT_COLUMNS} for record in records],
        budgets=expected_budgets(config),
        damage=damage,
    )
