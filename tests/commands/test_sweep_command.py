"""``llada sweep``, called as the command calls it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from helpers.studies import record
from llada_lightning.commands import sweep as module
from llada_lightning.records import write_records
from llada_lightning.study.sweep import Sweep, check_unchanged, read_sweep
from llada_lightning.study.sweep.runner import FailedRun, SweepOutcome
from llada_lightning.support.errors import UserError

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
