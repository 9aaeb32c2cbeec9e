"""The runner of sweeps on this machine with a stand-in for the fit, and what a running fit's folder tells of it."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from llada_lightning.study.sweep import (
    PlannedRun,
    Sweep,
    plan_runs,
)
from llada_lightning.study.sweep import runner as sweep_run
from llada_lightning.study.sweep.runner import (
    SweepOutcome,
    budget_share,
    describe_state,
    format_seconds,
    last_line,
    latest_metrics,
    run_sweep,
)
from llada_lightning.support.errors import UserError


class Study:
    """A sweep of stand-in fits in a folder: each run is a (name, mode)."""

    def __init__(self, folder: Path, runs: dict[str, str]) -> None:
        self.folder, self.output = folder, io.StringIO()
        points = tuple({"name": name, "mode": mode, "parent": os.getpid()} for name, mode in runs.items())
        self.sweep = Sweep("study", "llada", ("llada", "fit", "${args}"), points)

    def run_folder(self, arguments: list[str]) -> Path:
        return self.folder / next(word for word in arguments if word.startswith("--name=")).removeprefix("--name=")

    def launch(self, arguments: list[str]) -> list[str]:
        script = Path(__file__).parents[1] / "helpers" / "fake_fit.py"
        return [sys.executable, "-I", "-S", str(script), str(self.folder), *arguments[1:]]

    def run(self, **options: Any) -> SweepOutcome:
        return run_sweep(
            self.sweep, self.run_folder, launch=self.launch, console=Console(file=self.output, width=200), **options
        )

    def started(self) -> list[str]:
        path = self.folder / "started"
        return [line.split()[0] for line in path.read_text().splitlines()] if path.exists() else []

    def log(self, name: str) -> Path:
        return self.folder / "logs" / f"{name}.log"


def test_a_sweep_runs_in_order_and_started_again_does_nothing(tmp_path: Path) -> None:
    study = Study(tmp_path, {"a": "ok", "b": "ok", "c": "ok"})
    outcome = study.run()
    assert (outcome.done, outcome.skipped, outcome.exit_code) == (["a", "b", "c"], [], 0)
    assert study.started() == ["a", "b", "c"]
    outcome = study.run()
    assert (outcome.done, outcome.skipped, outcome.exit_code) == ([], ["a", "b", "c"], 0)
    assert study.started() == ["a", "b", "c"]


def test_a_run_that_continues_a_trunk_waits_for_the_run_before_it(tmp_path: Path) -> None:
    def run(name: str, shape: str, continues: bool = False) -> PlannedRun:
        return PlannedRun([name], tmp_path / name, 1.0, trunk=shape, continues=continues)

    runs = [run("a", "small"), run("b", "small", True), run("c", "large", True), run("d", "small", True)]
    process = subprocess.Popen([sys.executable, "-c", ""])
    runner = sweep_run._Runner(runs, 2, lambda arguments: arguments, None, Console(file=io.StringIO()))
    assert runner._next() is runs[0]
    runner.waiting.remove(runs[0])
    runner.running.append(sweep_run._Job(runs[0], process, 0.0))
    assert runner._next() is runs[2]  # nothing of its trunk runs
    runner.waiting.remove(runs[2])
    assert runner._next() is None
    runner.running.clear()
    assert runner._next() is runs[1]
    process.wait()


def test_a_failed_run_does_not_stop_the_others_and_is_named_with_its_last_line(tmp_path: Path) -> None:
    study = Study(tmp_path, {"bad": "fail", "mute": "silent", "shot": "killed", "good": "ok"})
    outcome = study.run()
    assert outcome.done == ["good"]
    assert outcome.exit_code == 1
    bad, mute, shot = outcome.failed
    assert (bad.name, bad.reason) == ("bad", "error: lr: -1 is below 0 (exit code 1)")
    assert (mute.name, mute.reason) == ("mute", "ended without a result.json")
    assert "killed by signal 9" in shot.reason
    assert Path(bad.log) == study.log("bad")
    assert "error: lr" in study.output.getvalue()
    Study(tmp_path, {"bad": "ok", "good": "ok"}).run()  # corrected, and run again
    assert study.started() == ["bad", "mute", "shot", "good", "bad"]
    assert study.log("bad").read_text().count("$ ") == 2  # the log keeps both attempts


def test_a_run_that_lacks_a_budget_is_not_done(tmp_path: Path) -> None:
    study = Study(tmp_path, {"a": "ok"})
    (tmp_path / "a").mkdir()
    (tmp_path / "a/config.yaml").write_text("budget: {flops: [1.0e+9, 2.0e+9]}")
    outcome = study.run()
    assert [failed.reason for failed in outcome.failed] == ["ended with 1 of 2 results"]


def test_a_diverged_run_is_settled_and_named(tmp_path: Path) -> None:
    study = Study(tmp_path, {"a": "silent"})
    (tmp_path / "a").mkdir()
    (tmp_path / "a/result.json").write_text(json.dumps([{"run": "a", "steps": 1, "status": "diverged"}]))
    outcome = study.run()
    assert (outcome.skipped, outcome.diverged, outcome.failed, outcome.exit_code) == (["a"], ["a"], [], 0)
    assert study.started() == []


def test_several_at_once_share_the_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "LLADA_CORES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    study = Study(tmp_path, dict.fromkeys("abcde", "ok"))
    assert sorted(study.run(jobs=2).done) == list("abcde")
    assert {tuple(line.split()[1:]) for line in (tmp_path / "started").read_text().splitlines()} == {("3", "None")}


def test_points_that_are_one_run_are_run_once(tmp_path: Path) -> None:
    study = Study(tmp_path, {"a": "ok"})
    study.sweep = Sweep("s", None, study.sweep.command, study.sweep.points * 3)
    assert study.run().done == ["a"]
    assert study.started() == ["a"]
    assert "3 points describe 1 different runs" in study.output.getvalue()


def test_extra_arguments_reach_every_run_and_its_folder(tmp_path: Path) -> None:
    study = Study(tmp_path, {"a": "ok", "b": "ok"})
    runs = plan_runs(study.sweep, study.run_folder, extra=["--seed=2"])
    assert all(run.arguments[-1] == "--seed=2" for run in runs)


def test_a_refused_run_stops_the_sweep_before_anything_has_run(tmp_path: Path) -> None:
    study = Study(tmp_path, {"a": "ok", "b": "ok"})

    def refuse(arguments: list[str]) -> Path:
        if "--name=b" in arguments:
            raise UserError("lr: -1 is below 0")
        return study.run_folder(arguments)

    with pytest.raises(UserError, match="lr"):
        run_sweep(study.sweep, refuse, launch=study.launch)
    with pytest.raises(UserError, match="--jobs is 0"):
        study.run(jobs=0)
    assert study.started() == []


def test_a_run_that_another_sweep_is_running_is_left_alone(tmp_path: Path) -> None:
    study = Study(tmp_path, {"a": "ok", "b": "ok"})
    study.log("a").parent.mkdir()
    with study.log("a").open("a") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        outcome = study.run()
    assert outcome.done == ["b"]
    assert [failed.reason for failed in outcome.failed] == ["another process is running it"]
    assert study.started() == ["b"]


@pytest.mark.skipif(threading.current_thread() is not threading.main_thread(), reason="signals need the main thread")
def test_interrupted_runs_save_and_the_same_sweep_goes_on(tmp_path: Path) -> None:
    study = Study(tmp_path, {"a": "ok", "b": "stop", "c": "ok"})
    outcome = study.run()
    assert (outcome.done, outcome.left, outcome.interrupted, outcome.exit_code) == (["a"], ["b", "c"], True, 130)
    assert (tmp_path / "b/saved").exists()
    outcome = Study(tmp_path, {"a": "ok", "b": "ok", "c": "ok"}).run()
    assert (outcome.done, outcome.skipped) == (["b", "c"], ["a"])


@pytest.mark.skipif(threading.current_thread() is not threading.main_thread(), reason="signals need the main thread")
def test_runs_that_do_not_leave_are_killed_with_their_children(tmp_path: Path) -> None:
    study = Study(tmp_path, {"a": "deaf"})
    assert study.run(grace_seconds=0.0).left == ["a"]
    with study.log("a").open("a") as log:  # its lock is free once the last of its processes has ended
        assert _locked_in_time(log)


def _locked_in_time(log: Any) -> bool:
    wait = threading.Event()
    for _ in range(200):
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        wait.wait(0.05)
    return False


# --- progress ---


def test_progress_is_drawn_on_a_terminal(tmp_path: Path) -> None:
    study = Study(tmp_path, {"a": "ok", "b": "fail"})
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=120)
    run_sweep(study.sweep, study.run_folder, launch=study.launch, console=console)
    assert "/2 runs" in screen.getvalue()
    assert "elapsed" in screen.getvalue()


def test_off_a_terminal_the_progress_is_told_in_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep_run, "TOLD_SECONDS", 0.0)
    monkeypatch.setattr(sweep_run, "_TOLD_SHARE", 0.0)
    study = Study(tmp_path, {"a": "ok", "b": "fail"})
    study.run()
    lines = study.output.getvalue().splitlines()
    assert any(line.startswith("running  a  starting  ") for line in lines)
    assert any(line.startswith("0/2 runs  ") and " elapsed" in line for line in lines)
    assert any(line.startswith("1/2 runs  ") and " left" in line for line in lines)
    monkeypatch.setattr(sweep_run, "TOLD_SECONDS", 1e9)
    quiet = Study(tmp_path / "quiet", {"a": "ok"})
    quiet.run()
    assert not any(line.startswith(("running", "0/1")) for line in quiet.output.getvalue().splitlines())


# --- what a running fit shows -----------------------------------------------------------------------------------------


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
