"""``llada sweep``, called as the command calls it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from helpers.studies import record
from helpers.tiny_runs import fit_arguments, kill_at, timeless, weights
from llada_lightning.commands import sweep as module
from llada_lightning.records import write_records
from llada_lightning.study.sweep import SHIPPED, Sweep, check_unchanged, read_sweep
from llada_lightning.study.sweep.runner import FailedRun, SweepOutcome
from llada_lightning.support.errors import UserError
from llada_lightning.support.forks import can_fork

Captured = pytest.CaptureFixture[str]


@pytest.fixture
def sweep_file(tmp_path: Path) -> str:
    path = tmp_path / "sweep.yaml"
    path.write_text('method: grid\ncommand: [llada, fit, "${args}"]\nparameters: {seed: {values: [1, 2]}}\n')
    return str(path)


def outcome_of(monkeypatch: pytest.MonkeyPatch, outcome: SweepOutcome) -> dict[str, object]:
    """Replaces the runner by one that gives ``outcome`` and notes how it was called."""
    called: dict[str, object] = {}

    def runner(sweep: Sweep, run_folder: object, **options: object) -> SweepOutcome:
        called.update(options, sweep=sweep, run_folder=run_folder)
        return outcome

    monkeypatch.setattr(module, "run_sweep", runner)
    return called


def test_sweep_hands_on_its_options(monkeypatch: pytest.MonkeyPatch, sweep_file: str, capsys: Captured) -> None:
    called = outcome_of(monkeypatch, SweepOutcome(done=["a"], skipped=["b"]))
    argv = ["run", sweep_file, "--jobs", "2", "--", "--trainer.precision=bf16-mixed"]
    assert module.main(argv) == 0
    assert (called["jobs"], called["extra"]) == (2, ["--trainer.precision=bf16-mixed"])
    assert len(called["sweep"].points) == 2  # type: ignore[attr-defined]
    assert capsys.readouterr().out == "runs: 1 done, 1 done before\n"


def test_sweep_names_failures(monkeypatch: pytest.MonkeyPatch, sweep_file: str, capsys: Captured) -> None:
    outcome_of(monkeypatch, SweepOutcome(done=["a"], failed=[FailedRun("b", "error: [lr] (exit code 2)", "b.log")]))
    assert module.main(["run", sweep_file]) == 1
    assert "failed: b: error: [lr] (exit code 2); log: b.log" in capsys.readouterr().out


def test_an_interrupted_sweep_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, sweep_file: str, capsys: Captured
) -> None:
    outcome_of(monkeypatch, SweepOutcome(left=["a"], interrupted=True))
    assert module.main(["run", sweep_file]) == 130
    assert "the same command goes on where it stopped" in capsys.readouterr().out


def test_sweep_as_json(monkeypatch: pytest.MonkeyPatch, sweep_file: str, capsys: Captured) -> None:
    outcome_of(monkeypatch, SweepOutcome(failed=[FailedRun("b", "exit code 1", "b.log")]))
    assert module.main(["run", sweep_file, "--json"]) == 1
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line)["failed"] == [{"name": "b", "reason": "exit code 1", "log": "b.log"}]


def test_an_unknown_action_is_refused(sweep_file: str) -> None:
    with pytest.raises(UserError, match="action"):
        module.main(["walk", sweep_file])


def test_one_run_by_its_index_is_fitted_in_this_process(
    monkeypatch: pytest.MonkeyPatch, sweep_file: str, tmp_path: Path
) -> None:
    fitted: list[list[str]] = []

    def fit(arguments: list[str]) -> int:
        fitted.append(arguments)
        return 7

    monkeypatch.setattr(module, "run_folder", lambda arguments: tmp_path / "study" / arguments[1])
    monkeypatch.setattr(module.fit, "main", fit)
    command = ["run", sweep_file, "--index", "1", "--", "--seed_everything=3"]
    assert module.main(command) == 7
    assert fitted == [["fit", "--seed=2", "--seed_everything=3"]]
    with pytest.raises(UserError, match=r"--index is 2, but .* has runs 0 to 1"):
        module.main(["run", sweep_file, "--index", "2"])


def test_show_lists_every_runs_state(
    monkeypatch: pytest.MonkeyPatch, sweep_file: str, tmp_path: Path, capsys: Captured
) -> None:
    monkeypatch.setattr(module, "run_folder", lambda arguments: tmp_path / "study" / arguments[1])
    write_records(tmp_path / "study" / "--seed=1", [record("arm", "107k", 1e12, 4.0)])
    assert module.main(["show", sweep_file]) == 0
    assert "2 runs: 1 done, 1 not begun" in capsys.readouterr().out
    assert module.main(["show", sweep_file, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)["runs"]
    assert [run["state"] for run in shown] == ["done", "not begun"]
    assert shown[1]["command"] == "llada fit --seed=2"


def test_show_names_the_file_of_a_sweep_of_the_package(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Captured
) -> None:
    monkeypatch.setattr(module, "run_folder", lambda arguments: tmp_path / "study" / "-".join(arguments[1:4]))
    assert module.main(["show", "quickstart"]) == 0
    assert capsys.readouterr().out.splitlines()[-2:] == ["17 runs: 17 not begun", f"file: {SHIPPED['quickstart']}"]
    assert module.main(["show", "quickstart", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["file"] == str(SHIPPED["quickstart"])


def test_show_says_which_runs_have_left_the_file(
    monkeypatch: pytest.MonkeyPatch, sweep_file: str, tmp_path: Path, capsys: Captured
) -> None:
    monkeypatch.setattr(module, "run_folder", lambda arguments: tmp_path / "study" / arguments[1])
    check_unchanged(read_sweep(sweep_file), tmp_path / "study")
    Path(sweep_file).write_text(Path(sweep_file).read_text().replace("[1, 2]", "[2, 3]"))
    assert module.main(["show", sweep_file]) == 0
    assert f"note: 1 of the runs that {tmp_path}/study was begun with have left the file" in capsys.readouterr().out
    assert module.main(["show", sweep_file, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["left_the_file"] == {str(tmp_path / "study"): 1}


# --- forked runs -----------------------------------------------------------------------------------------------------


def tiny_sweep(tmp_path: Path, prepared: Path, root: Path) -> Path:
    """A sweep of two short runs, as a file."""
    base = [word for word in fit_arguments("arm", prepared, root) if not word.startswith("--run.name")]
    sweep = {
        "method": "grid",
        "command": ["llada", *base, "${args}"],
        "parameters": {"seed_everything": {"values": [1, 2]}},
    }
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(sweep))
    return path


def states(root: Path) -> dict[str, tuple[list[dict[str, Any]], dict[str, torch.Tensor]]]:
    """The records and the last weights of each run of a study."""
    return {run.name: (timeless(run), weights(run)) for run in sorted((root / "test").glob("arm-*"))}


def assert_equal_runs(first: Path, second: Path) -> None:
    one, other = states(first), states(second)
    assert len(one) == 2 and list(one) == list(other)
    for name, (records, own) in one.items():
        assert records == other[name][0]
        assert all(torch.equal(value, other[name][1][key]) for key, value in own.items())


@pytest.mark.skipif(not can_fork(), reason="processes are forked on Linux only")
def test_forked_runs_are_those_of_this_process_bit_for_bit(prepared: Path, tmp_path: Path) -> None:
    forked, here = tmp_path / "forked", tmp_path / "here"
    assert module.main(["run", str(tiny_sweep(tmp_path, prepared, forked)), "--jobs", "2"]) == 0
    log = next((forked / "test" / "logs").iterdir()).read_text()
    assert log.startswith("$ ") and "nats/token" in log
    for index in range(2):
        assert module.main(["run", str(tiny_sweep(tmp_path, prepared, here)), "--index", str(index)]) == 0
    assert_equal_runs(forked, here)


@pytest.mark.slow
def test_forked_runs_are_those_of_interpreters_of_their_own_bit_for_bit(prepared: Path, tmp_path: Path) -> None:
    forked, own = tmp_path / "forked", tmp_path / "own"
    assert module.main(["run", str(tiny_sweep(tmp_path, prepared, forked)), "--jobs", "2"]) == 0
    assert module.main(["run", str(tiny_sweep(tmp_path, prepared, own)), "--jobs", "2", "--fork", "false"]) == 0
    assert_equal_runs(forked, own)


@pytest.mark.skipif(not can_fork(), reason="processes are forked on Linux only")
def test_a_forked_run_that_is_killed_takes_no_other_with_it(prepared: Path, tmp_path: Path) -> None:
    path = tiny_sweep(tmp_path, prepared, tmp_path)
    arguments = ["run", str(path), "--", kill_at(12)]
    assert module.main(arguments) == 1
    assert {len(list(run.glob("checkpoints/*"))) > 0 for run in (tmp_path / "test").glob("arm-*")} == {True}
    assert module.main(["run", str(path), "--jobs", "2"]) == 0  # each goes on from its own checkpoint
