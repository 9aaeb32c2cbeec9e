"""Sweep files as W&B reads them, the runs in them, and what is said of a file that was edited half-way."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.studies import record
from llada_lightning.records import write_records
from llada_lightning.study.sweep import (
    DEFAULT_COMMAND,
    SHIPPED,
    Sweep,
    check_unchanged,
    expand_grid,
    fit_arguments,
    kept_copy,
    launch_fit,
    read_sweep,
    render_command,
    runs_that_left,
    state_of,
)
from llada_lightning.support.errors import UserError

QUICKSTART = """
program: llada
method: grid
name: quickstart
command: [llada, fit, --config, base.yaml, "${args}"]
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
        "llada", "fit", "--config", "base.yaml",
        "--model=LladaModule", "--model.init_args.shape=443k", "--budget.flops=3000000000000.0",
    ]  # fmt: skip


def test_a_sweep_of_the_package_goes_by_its_name_unless_a_file_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart").mkdir()
    assert read_sweep("quickstart") == read_sweep(SHIPPED["quickstart"])
    assert len(read_sweep("quickstart").points) == 17
    (tmp_path / "quickstart").rmdir()
    (tmp_path / "quickstart").write_text(QUICKSTART)
    assert read_sweep("quickstart").path == Path("quickstart")
    with pytest.raises(UserError, match="'quickstrat' cannot be read"):
        read_sweep("quickstrat")


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
        ("[1]", "is no W&B sweep file: it holds no keys such as method"),
        ("", "is no W&B sweep file"),
        ("a,b\n1,2\n", "is no W&B sweep file: it holds no keys such as method, parameters and command; give the .yaml"),
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


# --- a study of runs --------------------------------------------------------------------------------------------------


def sweep(folder: Path, *shapes: str) -> Sweep:
    path = folder / "grid.yaml"
    grid = f"parameters: {{shape: {{values: [{', '.join(shapes)}]}}}}"
    path.write_text(f"method: grid\ncommand: [llada, fit, '${{args}}']\n{grid}\n")
    return read_sweep(path)


def test_an_unchanged_file_goes_on(tmp_path: Path) -> None:
    first = sweep(tmp_path, "a", "b")
    assert check_unchanged(first, tmp_path / "study") == 0
    assert kept_copy(first, tmp_path / "study").read_text() == (tmp_path / "grid.yaml").read_text()
    assert check_unchanged(first, tmp_path / "study", by_index=True) == 0


def test_a_comment_is_no_change(tmp_path: Path) -> None:
    check_unchanged(sweep(tmp_path, "a", "b"), tmp_path / "study")
    path = tmp_path / "grid.yaml"
    path.write_text("# a note\n" + path.read_text())
    assert check_unchanged(read_sweep(path), tmp_path / "study", by_index=True) == 0


def test_runs_may_be_added(tmp_path: Path) -> None:
    check_unchanged(sweep(tmp_path, "a", "b"), tmp_path / "study")
    assert check_unchanged(sweep(tmp_path, "a", "b", "c"), tmp_path / "study", by_index=True) == 1
    assert check_unchanged(sweep(tmp_path, "z", "a", "b", "c"), tmp_path / "study") == 1


def test_by_index_no_run_may_change_its_number(tmp_path: Path) -> None:
    check_unchanged(sweep(tmp_path, "a", "b"), tmp_path / "study")
    with pytest.raises(UserError, match="have changed their numbers"):
        check_unchanged(sweep(tmp_path, "b", "a"), tmp_path / "study", by_index=True)


def test_runs_that_have_left_the_file_are_refused_until_it_is_meant(tmp_path: Path) -> None:
    study = tmp_path / "study"
    before = sweep(tmp_path, "a", "b")
    check_unchanged(before, study)
    edited = sweep(tmp_path, "a", "c")
    with pytest.raises(UserError, match=r"was edited: 1 of the 2 runs .* have left it; .*\(the first: --shape=b\)"):
        check_unchanged(edited, study)
    assert "[a, b]" in kept_copy(before, study).read_text()
    assert runs_that_left(edited, study) == [["llada", "fit", "--shape=b"]]
    assert check_unchanged(edited, study, edited=True) == 1
    assert check_unchanged(edited, study) == 0


def test_the_state_of_a_run(tmp_path: Path) -> None:
    assert state_of(tmp_path / "none") == "not begun"
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "config.yaml").write_text("budget: {flops: 1.0e+12}\n")
    assert state_of(tmp_path / "begun") == "begun"
    write_records(tmp_path / "done", [record("arm", "107k", 1e12, 4.0)])
    assert state_of(tmp_path / "done") == "done"
    write_records(tmp_path / "bad", [record("arm", "107k", 1e12, float("nan"), status="diverged")])
    assert state_of(tmp_path / "bad") == "diverged"
