"""Runs of a W&B project, read back through its public API (https://docs.wandb.ai/models/ref/python/public-api).

A run of ours leaves its record in its summary: ``records``, a list of all of them (as JSON), where it has several
budgets, else the record's own keys.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from llada_lightning.records import RESULT_COLUMNS, expected_budgets
from llada_lightning.support.errors import UserError
from llada_lightning.support.reading import parse_json

PREFIX = "wandb:"
"""The beginning of an argument that is a W&B project: ``wandb:ENTITY/PROJECT``."""

FINISHED = "finished"

_RECORDS_KEY = "summary key records"

_RUNS_A_PAGE = 200
_CONFIG_OF_OURS = frozenset({"model", "data", "trainer", "budget", "run"})
"""Sections of a resolved configuration: by them a run of ours is known before it has a record."""


@dataclass(frozen=True)
class ProjectRun:
    """One run of a project.

    Args:
        where: ``wandb:ENTITY/PROJECT/ID``, with the run's display name.
        state: The state by W&B: finished, running, crashed, failed, killed, …
        ours: Whether ``llada fit`` made it.
        records: The records in its summary, unchanged.
        budgets: The number of records that its configuration asks for.
        damage: The reason why its records cannot be read; None if they can.
    """

    where: str
    state: str
    ours: bool
    records: list[dict[str, Any]]
    budgets: int = 1
    damage: str | None = None


def read_project(source: str) -> list[ProjectRun]:
    """All runs of a project, the oldest first.

    Args:
        source: ``wandb:ENTITY/PROJECT``.

    Raises:
        UserError: the name is of another form, wandb is not installed, nobody is logged in, the server cannot be
            reached or refuses, or it has no such project.
    """
    path = source.removeprefix(PREFIX)
    if not re.fullmatch(r"[^/\s]+/[^/\s]+", path):
        raise UserError(f"collect: {source}; a W&B project is given as {PREFIX}ENTITY/PROJECT")
    try:
        import wandb
    except ImportError as error:
        raise UserError(f"collect: {source} needs the package wandb; pip install wandb") from error
    with _one_line_errors(source, wandb):
        runs = wandb.Api().runs(path, per_page=_RUNS_A_PAGE, lazy=False)
        return [project_run(f"{PREFIX}{path}/{run.id}", run) for run in runs]


def project_run(where: str, run: Any) -> ProjectRun:
    """What matters of a run of wandb's public API: its state, and the records in its summary."""
    summary, config = dict(run.summary_metrics or {}), dict(run.config or {})
    has_record = {"objective", "run"} <= set(summary)
    ours = has_record or "records" in summary or set(config) >= _CONFIG_OF_OURS
    name = f"{where} ({run.name})" if run.name and run.name != run.id else where
    found = ProjectRun(name, str(run.state), ours, [], expected_budgets(config))
    if not ours:
        return found
    try:
        records = _listed_records(summary["records"]) if "records" in summary else [summary] if has_record else []
    except UserError as error:
        return ProjectRun(found.where, found.state, ours, [], found.budgets, str(error))
    kept = [{column: record.get(column) for column in RESULT_COLUMNS} for record in records]
    return ProjectRun(found.where, found.state, ours, kept, found.budgets)


def _listed_records(value: Any) -> list[Mapping[str, Any]]:
    """Raises: UserError: not a list of records, nor JSON of one."""
    records = parse_json(value, _RECORDS_KEY) if isinstance(value, str) else value
    if not isinstance(records, list) or not all(isinstance(record, Mapping) for record in records):
        raise UserError(f"{_RECORDS_KEY}: not a list of records")
    return records


@contextmanager
def _one_line_errors(source: str, wandb: Any) -> Iterator[None]:
    """Errors of wandb about accounts, networks and names, as a user's mistake of one line."""
    try:
        yield
    except (wandb.errors.Error, ValueError, OSError) as error:  # a project that is not there is a ValueError
        reason = " ".join(str(error).split()).rstrip(".")
        raise UserError(f"collect: {source}: {reason}; check the name, `wandb login` and WANDB_BASE_URL") from error
