"""What benchmarks gave, and the tables that people read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

SHARES = frozenset({"acc", "acc_norm", "acc_mutual_info", "exact_match", "em", "f1", "pass@1", "pass_at_1"})
"""Metrics between 0 and 1 of which more is better: those that a results table takes, in percent."""

_MOST_PARTS = 10
"""Tasks of a group that are shown below it; the JSON has all."""


@dataclass(frozen=True)
class Outcome:
    """What a benchmark gave.

    Args:
        name: The name in our tables.
        task: The task of lm-evaluation-harness.
        metric: The metric that counts, as ``metric,filter``.
        value: The value of the metric, as lm-evaluation-harness returns it.
        stderr: The standard error of the value over documents; NaN where there is none. For `llada` it includes the
            scatter of the Monte Carlo estimates only as far as that makes answers right or wrong.
        n: The number of documents.
        shots: The number of examples in the prompt; None where the tasks of a group differ.
        metrics: The value and the standard error of every metric.
        parts: The metrics of each task of a group.
        sampling: The settings of the answers or of the likelihoods as they were used. Where the requests of a task
            differ, as in the length of an answer, the least and the greatest value.
        row: The name of the row of a table of settings; None elsewhere.
        best_of: The name of the row with the highest value, in the row that shows the best of a group.
    """

    name: str
    task: str
    metric: str
    value: float
    stderr: float
    n: int
    shots: int | None
    metrics: dict[str, dict[str, float]]
    parts: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    sampling: dict[str, Any] = field(default_factory=dict)
    row: str | None = None
    best_of: str | None = None

    @property
    def is_share(self) -> bool:
        return self.metric.split(",")[0] in SHARES

    def as_row(self, steps: int, settings: str) -> dict[str, Any]:
        """A share as a row of a run's evaluations, in percent."""
        return {
            "steps": steps, "task": self.name, "score": 100 * self.value, "stderr": 100 * self.stderr, "n": self.n,
            "metric": self.metric, "settings": settings,
        }  # fmt: skip


def best_rows(outcomes: Sequence[Outcome], groups: dict[str, str]) -> list[Outcome]:
    """For each group of rows and each task the best row.

    It is chosen by the very values that it shows, so it is optimistic.

    Args:
        outcomes: The outcomes of every row.
        groups: The group of each row that has one, by the name of the row.
    """
    best: dict[tuple[str, str], Outcome] = {}
    for outcome in outcomes:
        if outcome.row in groups:
            key = groups[outcome.row], outcome.name
            if key not in best or outcome.value > best[key].value:
                best[key] = outcome
    return [replace(each, row=f"{group} (the best)", best_of=each.row) for (group, _), each in best.items()]


def outcome_table(outcomes: Sequence[Outcome]) -> Table:
    """A row for each benchmark, and below a group its tasks."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1), show_edge=False)
    table.add_column("task", no_wrap=True)
    table.add_column("metric", overflow="fold")
    for name in ("shots", "n", "value ± s.e."):
        table.add_column(name, justify="right", no_wrap=True)
    for outcome in outcomes:
        shots = "" if outcome.shots is None else str(outcome.shots)
        value = _value(outcome.value, outcome.stderr, outcome.is_share, " %")
        table.add_row(outcome.name, outcome.metric, shots, str(outcome.n), value)
        for part, metrics in outcome.parts.items() if len(outcome.parts) <= _MOST_PARTS else ():
            if outcome.metric in metrics:
                found = metrics[outcome.metric]
                value = _value(found["value"], found["stderr"], outcome.is_share, " %")
                table.add_row(f"  {part}", outcome.metric, "", "", value)
    return table


def row_table(title: str, outcomes: Sequence[Outcome]) -> Table:
    """Rows of settings and, in columns, tasks; shares in percent."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1), show_edge=False, title=f"{title}, % ± s.e.", title_justify="left")
    table.add_column("", no_wrap=True)
    tasks = list(dict.fromkeys(outcome.name for outcome in outcomes))
    for task in tasks:
        table.add_column(task, justify="right")
    sampled = any("length" in outcome.sampling for outcome in outcomes)
    for name in ("tokens", "steps") if sampled else ():
        table.add_column(name, justify="right", no_wrap=True)
    for row in dict.fromkeys(outcome.row or "" for outcome in outcomes):
        cells = {outcome.name: outcome for outcome in outcomes if outcome.row == row}
        settings = merged_settings([outcome.sampling for outcome in cells.values()])
        counts = [_number(settings.get(name)) for name in ("length", "steps")] if sampled else []
        table.add_row(row, *(_cell(cells[task]) if task in cells else "" for task in tasks), *counts)
    return table


def merged_settings(used: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Settings that were used, one value each; where they differ, the least and the greatest.

    Args:
        used: The settings of each batch of requests.
    """
    merged: dict[str, Any] = {}
    for name in dict.fromkeys(name for each in used for name in each):
        found: list[Any] = []
        for each in used:
            value = each.get(name)
            found += value if isinstance(value, list) else [value] if name in each else []
        distinct = sorted(set(found))
        merged[name] = distinct[0] if len(distinct) == 1 else [distinct[0], distinct[-1]]
    return merged


def _number(value: Any) -> str:
    return "" if value is None else "-".join(map(str, value)) if isinstance(value, list) else str(value)


def _cell(outcome: Outcome) -> str:
    text = _value(outcome.value, outcome.stderr, outcome.is_share, digits=1)
    return text if outcome.best_of is None else f"{text} ({outcome.best_of})"


def _value(value: float, stderr: float, is_share: bool, unit: str = "", digits: int = 2) -> str:
    scale = 100 if is_share else 1
    text = f"{scale * value:.{digits}f}"
    if math.isfinite(stderr):
        text += f" ± {scale * stderr:.{digits}f}"
    return text + (unit if is_share else "")
