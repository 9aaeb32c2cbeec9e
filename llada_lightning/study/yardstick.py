"""The yardstick of a results table: which loss is held equal when objectives are compared.

By default it is the validation loss, which is a bound for some objectives and exact for others. A *named* yardstick is
the exact loss under a decoding policy (``val_policies``), such as `confidence@1`. It takes the place of the validation
loss in every row, so that fits and figures need to know no more of it than its name. An objective whose validation loss
is exact anyway is compared with its own exact value. Bounds and exact values are never mixed without a word.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from glob import escape
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from llada_lightning.objectives import OBJECTIVES
from llada_lightning.records import POLICY_KEYS, read_validation, validation_path
from llada_lightning.study.results import CovarianceReport, Row, documents_of, write_covariance
from llada_lightning.support.errors import UserError
from llada_lightning.support.printing import shortened

YARDSTICK = "yardstick"
"""The column that a table has which ``with_yardstick`` returned: the name of the yardstick."""

LABEL = re.compile(r"[a-z]\w*@\d+")
"""The form of the names of yardsticks, which are parts of file names."""


def exact_losses(measured: Any, source: str) -> dict[str, dict[str, Any]]:
    """The losses under decoding policies that a record or a cell of a table holds, by the names of the yardsticks.

    Args:
        measured: The value of ``val_policies``: a mapping, JSON of one, or nothing.
        source: Where it was found, for the message.

    Raises:
        UserError: It is damaged.
    """
    if measured is None or measured is pd.NA or (isinstance(measured, float) and math.isnan(measured)):
        return {}
    try:
        value = json.loads(measured) if isinstance(measured, str) else measured
        if value is None:
            return {}
        found = {}
        for name, loss in value.items():
            numbers = [loss[key] for key in POLICY_KEYS]
            if not (LABEL.fullmatch(name) and all(number is None or abs(float(number)) < 1e100 for number in numbers)):
                raise ValueError
            found[name] = dict(loss)
        return found
    except (AttributeError, LookupError, TypeError, ValueError, RecursionError) as error:
        raise UserError(
            f"{source}: val_policies holds {shortened(measured, 60)!r}, which no run writes; collect the table again"
        ) from error


def yardstick_names(table: pd.DataFrame) -> dict[str, list[str]]:
    """The names of the yardsticks that at least one row of each objective of a table has."""
    found: dict[str, set[str]] = {}
    for objective, losses in zip(table["objective"], _losses(table), strict=True):
        found.setdefault(str(objective), set()).update(losses)
    return {objective: sorted(names) for objective, names in found.items()}


def with_yardstick(table: pd.DataFrame, name: str) -> tuple[pd.DataFrame, list[str]]:
    """A results table whose losses are those of a named yardstick, for fits and figures.

    Args:
        table: A results table.
        name: The name of the yardstick, such as `confidence@1`.

    Returns:
        The rows that have it, with its loss as ``val_nats_per_token``, ``val_stderr`` and ``val_bits_per_byte``, with
        the kind `exact`, and with its name in a column ``yardstick``. Rows of an objective whose validation loss is
        exact keep it where they lack the yardstick. And notes: which objectives those are, and how many rows of which
        others are left out.

    Raises:
        UserError: No row has a loss by the yardstick, or none of an objective whose validation loss is a bound.
    """
    shown, names = shortened(name, 60), yardstick_names(table)
    objectives = table["objective"].astype(object).map(str)
    losses = [own.get(name) for own in _losses(table)]
    has = np.array([loss is not None for loss in losses], dtype=bool)
    exact = np.array([_is_exact(own) for own in objectives], dtype=bool)
    for objective in dict.fromkeys(objectives[~exact]):
        if name not in names[objective]:
            others = ", ".join(names[objective]) or "none"
            raise UserError(
                f"yardstick: {objective} has no loss by '{shown}'; its yardsticks are: {others}. `llada validate "
                "--run.policies …` measures them, and `llada collect` puts them into the table"
            )
    if not has.any():
        raise UserError(f"yardstick: no row has a loss by '{shown}', and without it all losses are exact; leave it out")
    changed = {
        f"val_{key}": [
            old if loss is None else math.nan if loss[key] is None else float(loss[key])
            for old, loss in zip(table[f"val_{key}"], losses, strict=True)
        ]
        for key in ("nats_per_token", "stderr", "bits_per_byte")
    }
    kinds = table["val_kind"].mask(has, "exact")
    notes = []
    for objective in dict.fromkeys(objectives):
        own = (objectives == objective).to_numpy(bool)
        kept, lacking = int((own & exact & ~has).sum()), int((own & ~exact & ~has).sum())
        if kept:
            notes.append(f"yardstick {name}: {kept} of {own.sum()} rows of {objective} keep their own exact loss")
        if lacking:
            notes.append(f"yardstick {name}: {lacking} of {own.sum()} rows of {objective} lack it and are left out")
    found = table.assign(**changed, val_kind=kinds, **{YARDSTICK: name})[has | exact]
    return found.reset_index(drop=True), notes


def _losses(table: pd.DataFrame) -> list[dict[str, dict[str, Any]]]:
    """What every row of a table holds of decoding policies."""
    if "val_policies" not in table.columns:
        return [{} for _ in range(len(table))]
    return [
        exact_losses(value, f"results: {run}") for value, run in zip(table["val_policies"], table["run"], strict=True)
    ]


def yardstick_of(table: pd.DataFrame) -> str | None:
    """The name of the yardstick of a table's losses; None: the validation loss.

    Raises:
        UserError: Rows have different yardsticks.
    """
    if YARDSTICK not in table.columns:
        return None
    names = table[YARDSTICK].fillna("the validation loss").unique()
    if len(names) > 1:
        raise UserError(
            f"results: yardsticks are mixed ({', '.join(map(str, names))}); fit rows of one yardstick at a time"
        )
    return str(names[0]) if len(names) and names[0] != "the validation loss" else None


def write_yardstick_covariances(rows: Sequence[Row], results: Path) -> dict[str, CovarianceReport]:
    """Writes the covariance of the rows' losses by each yardstick that a row has, beside the results table.

    Files of yardsticks that no row has are removed, because they would belong to another table.

    Returns:
        The name of each yardstick -> what became of its file.
    """
    losses = {row.label: _measured(row) for row in rows}
    names = sorted({name for own in losses.values() for name in own})
    for path in results.parent.glob(f"{escape(results.stem)}.*.covariance.csv"):
        other = path.name.removeprefix(f"{results.stem}.").removesuffix(".covariance.csv")
        if LABEL.fullmatch(other) and other not in names:
            path.unlink(missing_ok=True)
    reports = {}
    for name in names:
        exact = [row for row in rows if name in losses[row.label] or _is_exact(row.record["objective"])]
        reports[name] = write_covariance(exact, results, name, _documents_by(name, losses))
    return reports


def _documents_by(name: str, losses: dict[str, dict[str, Any]]) -> Callable[[Row], pd.DataFrame]:
    """A function that reads a row's losses by document under a policy, or its exact validation losses."""

    @lru_cache(maxsize=2)  # a run's budgets share one file
    def read(folder: Path, policy: str | None) -> pd.DataFrame:
        return read_validation(folder, policy=policy)

    def documents(row: Row) -> pd.DataFrame:
        policy = name if name in losses[row.label] else None
        file = None if row.folder is None else validation_path(row.folder, policy=policy)
        return documents_of(row, lambda folder: read(folder, policy), file)

    return documents


def _measured(row: Row) -> dict[str, dict[str, Any]]:
    try:
        return exact_losses(row.record.get("val_policies"), row.label)
    except UserError:  # the table has the value, and whoever reads it there is told
        return {}


def _is_exact(objective: Any) -> bool:
    return objective in OBJECTIVES and OBJECTIVES[objective].val_kind == "exact"
