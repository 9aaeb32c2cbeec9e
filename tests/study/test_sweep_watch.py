"""What a running fit's folder tells of it: progress, cost, the last line of its log."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from llada_lightning.study.sweep import PlannedRun, Sweep, plan_runs
from llada_lightning.study.sweep.runner import (
    budget_share,
    describe_state,
    format_seconds,
    last_line,
    latest_metrics,
)


def test_a_running_fit_is_described_from_its_metrics(tmp_path: Path) -> None:
    run = PlannedRun([], tmp_path, cost=1e12)
    assert latest_metrics(tmp_path) == {}
    assert describe_state(0.0, {}) == "starting"
    (tmp_path / "metrics.csv").write_text("step,flops_6nd,val,train_nats_per_token,tokens_per_second\n")
    assert latest_metrics(tmp_path) == {}
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("1200,6.2e11,,3.2144,7400\n")
    metrics = latest_metrics(tmp_path)
    share = budget_share(run)
    assert share == pytest.approx(0.62)
    assert describe_state(share, metrics) == "62%  step 1200  3.214 nats/token  7,400 tokens/s"
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("1201,6.2")  # a row that is being written
    assert latest_metrics(tmp_path) == {}


def test_a_familys_progress_counts_the_trunk_once(tmp_path: Path) -> None:
    """A trunk to 9e11, a branch from 4e11 to 5e11 (done), one from 9e11 that has gone to 9.5e11."""
    for folder, rows in {"": [1e10, 9e11], "branches/5": [4e11, 5e11], "branches/10": [9e11, 9.5e11]}.items():
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        lines = [f"{step},{flops}" for step, flops in enumerate(rows)]
        (tmp_path / folder / "metrics.csv").write_text("\n".join(["step,flops_6nd", *lines]) + "\n")
    assert budget_share(PlannedRun([], tmp_path, cost=2e12)) == pytest.approx((9e11 + 1e11 + 0.5e11) / 2e12)


def test_the_budget_is_a_runs_cost(tmp_path: Path) -> None:
    inline = {"config": "{budget: {flops: [1.0e+12, 2.0e+12]}, model: {init_args: {schedule: {decay_fraction: 0.5}}}}"}
    costs: list[tuple[dict[str, Any], float]] = [
        ({"budget.flops": 3e11}, 3e11),
        ({"budget": {"flops": "1e18"}}, 1e18),
        ({"lr": 1}, 1.0),
        ({"budget.flops": [1e12, 2e12]}, 0.8 * 2e12 + 0.2 * 3e12),
        (inline, 0.5 * 2e12 + 0.5 * 3e12),
        ({"config": "study.yaml"}, 1.0),
    ]
    for point, cost in costs:
        sweep = Sweep("s", None, ("llada", "fit", "${args}"), (point,))
        assert [run.cost for run in plan_runs(sweep, lambda _: tmp_path)] == [cost]
    (tmp_path / "metrics.csv").write_text("step,flops_6nd\n1,5e11\n")
    assert budget_share(PlannedRun([], tmp_path, cost=1.0)) == 0.0


@pytest.mark.parametrize(
    ("text", "line"), [("", ""), ("one\ntwo\n\n", "two"), ("10%\r100%\r", "100%"), ("\x1b[1mred\x1b[0m \n", "red")]
)
def test_the_last_line_of_a_log(tmp_path: Path, text: str, line: str) -> None:
    path = tmp_path / "log"
    path.write_bytes(text.encode())
    assert last_line(path) == line


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0s"), (59.6, "1m 00s"), (200, "3m 20s"), (18_420, "5h 07m")])
def test_format_seconds(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def test_a_pipe_or_a_huge_file_in_the_place_of_a_log_neither_hangs_nor_fills_memory(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "metrics.csv")
    os.mkfifo(tmp_path / "log")
    assert latest_metrics(tmp_path) == {} and last_line(tmp_path / "log") == ""
    assert budget_share(PlannedRun([], tmp_path, cost=1e12)) == 0.0
    (tmp_path / "branches/5").mkdir(parents=True)
    with (tmp_path / "branches/5/metrics.csv").open("wb") as file:
        file.truncate(1 << 40)  # one line of zeros
    assert latest_metrics(tmp_path) == {}
    assert budget_share(PlannedRun([], tmp_path, cost=1e12)) == 0.0
