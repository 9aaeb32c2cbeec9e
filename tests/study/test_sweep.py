"""Sweep files as W&B reads them, and the runner on this machine with a stand-in for the fit."""

from __future__ import annotations

import contextlib
import fcntl
import io
import itertools
import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from llada_lightning.study.sweep import (
    DEFAULT_COMMAND,
    Sweep,
    expand_grid,
    fit_arguments,
    launch_fit,
    plan_runs,
    read_sweep,
    render_command,
)
from llada_lightning.study.sweep import runner as sweep_run
from llada_lightning.study.sweep.runner import SweepOutcome, child_environment, run_sweep
from llada_lightning.support.errors import UserError

QUICKSTART = """
program: llada
method: grid
name: quickstart
command: [llada, fit, --config, experiments/quickstart/fit.yaml, "${args}"]
parameters:
  model: {values: [ArmModule, LladaModule]}
  model.init_args.shape: {values: [107k, 443k]}
  budget.flops: {values: [3.0e+11, 1.0e+12, 3.0e+12]}
metric: {name: val_nats_per_token, goal: minimize}
"""

EVERYTHING = """
program: llada_lightning
method: grid
command: ["${env}", "${interpreter}", -m, "${program}", fit, "--seed=${envvar:SWEEP_SEED}", 7, "${args}"]
parameters:
  flag: {value: true}
  numbers: {values: [1, 2.5, 1.0e-3, 3.0e+20, 1e18, 0x10]}
  words: {value: "two words"}
  list: {value: [1, two, [3.0]]}
  dict: {value: {a: 1, b: {c: x}}}
  optimizer:
    parameters:
      lr: {values: [1.0e-3, 2.0e-3]}
      betas: {value: [0.9, 0.95]}
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "study.yaml"
    path.write_text(text)
    return path


# --- the file ---


def test_the_quickstarts_grid_in_order(tmp_path: Path) -> None:
    sweep = read_sweep(write(tmp_path, QUICKSTART))
    assert sweep.name == "quickstart"
    expected = itertools.product(["ArmModule", "LladaModule"], ["107k", "443k"], [3e11, 1e12, 3e12])
    assert [tuple(point.values()) for point in sweep.points] == list(expected)
    assert render_command(sweep, sweep.points[-1]) == [
        "llada", "fit", "--config", "experiments/quickstart/fit.yaml",
        "--model=LladaModule", "--model.init_args.shape=443k", "--budget.flops=3000000000000.0",
    ]  # fmt: skip


scalars = st.one_of(st.integers(), st.floats(allow_nan=False), st.booleans(), st.text(max_size=3))


@given(
    st.dictionaries(st.text(min_size=1, max_size=3), st.lists(scalars, min_size=1, max_size=3), min_size=1, max_size=4)
)
@settings(max_examples=50)
def test_a_grid_is_the_product_last_parameter_fastest(values: dict[str, list[Any]]) -> None:
    points = expand_grid({name: {"values": choices} for name, choices in values.items()})
    assert [tuple(point.values()) for point in points] == list(itertools.product(*values.values()))
    assert all(list(point) == list(values) for point in points)


def test_nested_parameters_make_one_dict(tmp_path: Path) -> None:
    points = read_sweep(write(tmp_path, EVERYTHING)).points
    assert len(points) == 12
    assert points[1]["optimizer"] == {"lr": 2e-3, "betas": [0.9, 0.95]}


@pytest.mark.parametrize("text", [QUICKSTART, EVERYTHING])
def test_commands_are_those_of_wandbs_own_agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """W&B's agent is handed each point as its server would, and its process is replaced by a recorder."""
    pytest.importorskip("wandb")
    from wandb import wandb_agent
    from wandb.sdk.launch.sweeps import utils

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SWEEP_SEED", "11")
    monkeypatch.setenv("WANDB_SWEEP_ID", "s")
    for name in ("WANDB_RUN_ID", "WANDB_SWEEP_PARAM_PATH"):
        monkeypatch.setenv(name, "")  # the agent sets them: put back afterwards
    commands: list[list[str]] = []

    class Recorder:
        def __init__(self, command: list[str], **_: Any) -> None:
            commands.append(command)

    monkeypatch.setattr(wandb_agent, "AgentProcess", Recorder)
    path = write(tmp_path, text)
    config = utils.load_sweep_config(str(path))
    assert config is not None
    agent = object.__new__(wandb_agent.Agent)
    agent._in_jupyter, agent._function, agent._forward_signals, agent._run_processes = False, None, False, {}
    sweep = read_sweep(path)
    for point in sweep.points:
        agent._sweep_command = list(config["command"])
        arguments = {name: {"value": value} for name, value in point.items()}
        agent._command_run({"run_id": "r", "program": config["program"], "args": arguments})
    assert [render_command(sweep, point) for point in sweep.points] == commands


def test_the_default_command_is_wandbs() -> None:
    pytest.importorskip("wandb")
    from wandb.sdk.launch.sweeps.utils import DEFAULT_SWEEP_COMMAND

    assert list(DEFAULT_COMMAND) == DEFAULT_SWEEP_COMMAND


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"method": "bayes"}, "this runner handles grid, for others use `wandb sweep` and `wandb agent`"),
        ({"method": None}, "this runner handles grid"),
        ({"parameters": None}, "parameters is empty"),
        ({"parameters": {"lr": {"values": [1, None]}}}, "lr holds null"),
        ({"parameters": {"model": {"value": {"init_args": [None]}}}}, "model holds null"),
        ({"parameters": {"model": {"parameters": {"lr": {"value": None}}}}}, "lr holds null"),
        ({"parameters": {"lr": {"values": []}}}, "list of at least one"),
        ({"parameters": {"lr": {"values": "abc"}}}, "list of at least one"),
        ({"parameters": {"lr": {"min": 0, "max": 1}}}, "one of value, values and parameters"),
        ({"parameters": {"lr": {"value": 0, "values": [1]}}}, "one of value, values and parameters"),
        ({"parameters": {"lr": {"values": [1], "distribution": "uniform"}}}, "'uniform' is no grid"),
        ({"command": ["llada", "fit"]}, "lacks"),
        ({"command": ["llada", "fit", "${args}", "--seed=1"]}, "must be the last word"),
        ({"command": "llada fit ${args}"}, "list of words"),
    ],
)
def test_wrong_sweeps_are_refused(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    config = {**yaml.safe_load(QUICKSTART), **change}
    with pytest.raises(UserError, match=words):
        read_sweep(write(tmp_path, yaml.safe_dump(config)))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [", "not YAML"),
        ("[1]", "it holds list"),
        ("", "it holds NoneType"),
        ("a: 1\nb: 2\na: 3", "'a' is given in line 1 and again in line 3"),
    ],
)
def test_wrong_files_are_refused(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        read_sweep(write(tmp_path, text))
    with pytest.raises(UserError, match=r"none\.yaml' cannot be read: No such file"):
        read_sweep(tmp_path / "none.yaml")


def test_only_known_macros_are_rendered() -> None:
    with pytest.raises(UserError, match=r"\$\{args_no_boolean_flags\} is not handled"):
        render_command(Sweep("s", None, ("llada", "${args_no_boolean_flags}", "${args}"), ({},)), {})
    with pytest.raises(UserError, match="names no program"):
        render_command(Sweep("s", None, DEFAULT_COMMAND, ({},)), {})


@pytest.mark.parametrize(
    "start",
    [["llada"], ["/usr/bin/env", "llada"], ["/usr/bin/env", "python", "-m", "llada_lightning"]],
)
def test_the_fits_arguments_are_found_behind_any_spelling(start: list[str]) -> None:
    assert fit_arguments([*start, "fit", "--x=1"]) == ["fit", "--x=1"]
    assert launch_fit(["fit", "--x=1"]) == [sys.executable, "-m", "llada_lightning", "fit", "--x=1"]
    with pytest.raises(UserError, match="must start with `llada fit`"):
        fit_arguments([*start, "prepare", "--x=1"])


# --- the runner ---


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
    Study(tmp_path, {"bad": "ok", "good": "ok"}).run()  # mended, and run again
    assert study.started() == ["bad", "mute", "shot", "good", "bad"]
    assert study.log("bad").read_text().count("$ ") == 2  # the log keeps both attempts


def test_a_run_that_lacks_a_budget_is_not_done(tmp_path: Path) -> None:
    study = Study(tmp_path, {"a": "ok"})
    (tmp_path / "a").mkdir()
    (tmp_path / "a/config.yaml").write_text("budget: {flops: [1.0e+9, 2.0e+9]}")
    outcome = study.run()
    assert [failed.reason for failed in outcome.failed] == ["ended with 1 of 2 budgets"]


def test_a_diverged_run_is_settled_and_named(tmp_path: Path) -> None:
    study = Study(tmp_path, {"a": "silent"})
    (tmp_path / "a").mkdir()
    (tmp_path / "a/result.json").write_text(json.dumps([{"run": "a", "steps": 1, "status": "diverged"}]))
    outcome = study.run()
    assert (outcome.skipped, outcome.diverged, outcome.failed, outcome.exit_code) == (["a"], ["a"], [], 0)
    assert study.started() == []


def test_several_at_once_share_the_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(sweep_run.os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    study = Study(tmp_path, dict.fromkeys("abcde", "ok"))
    assert sorted(study.run(jobs=2).done) == list("abcde")
    assert {line.split()[1] for line in (tmp_path / "started").read_text().splitlines()} == {"3"}
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    environment = child_environment(jobs=9)
    assert (environment["OMP_NUM_THREADS"], environment["MKL_NUM_THREADS"]) == ("5", "1")


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
