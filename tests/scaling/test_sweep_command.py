"""``llada sweep``, called as the command calls it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llada_lightning.errors import UserError
from llada_lightning.scaling import sweep_command as module
from llada_lightning.scaling.sweep import Sweep
from llada_lightning.scaling.sweep_command import sweep_command
from llada_lightning.scaling.sweep_run import FailedRun, SweepOutcome

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
    assert sweep_command(argv, Path) == 0
    assert (called["jobs"], called["extra"]) == (2, ["--trainer.precision=bf16-mixed"])
    assert len(called["sweep"].points) == 2  # type: ignore[attr-defined]
    assert capsys.readouterr().out == "runs: 1 done, 1 done before\n"


def test_sweep_names_failures(monkeypatch: pytest.MonkeyPatch, sweep_file: str, capsys: Captured) -> None:
    outcome_of(monkeypatch, SweepOutcome(done=["a"], failed=[FailedRun("b", "error: [lr] (exit code 2)", "b.log")]))
    assert sweep_command(["run", sweep_file], Path) == 1
    assert "failed: b: error: [lr] (exit code 2); log: b.log" in capsys.readouterr().out


def test_an_interrupted_sweep_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, sweep_file: str, capsys: Captured
) -> None:
    outcome_of(monkeypatch, SweepOutcome(left=["a"], interrupted=True))
    assert sweep_command(["run", sweep_file], Path) == 130
    assert "the same command goes on where it stopped" in capsys.readouterr().out


def test_sweep_as_json(monkeypatch: pytest.MonkeyPatch, sweep_file: str, capsys: Captured) -> None:
    outcome_of(monkeypatch, SweepOutcome(failed=[FailedRun("b", "exit code 1", "b.log")]))
    assert sweep_command(["run", sweep_file, "--json"], Path) == 1
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line)["failed"] == [{"name": "b", "reason": "exit code 1", "log": "b.log"}]


def test_an_unknown_action_is_refused(sweep_file: str) -> None:
    with pytest.raises(UserError, match="action"):
        sweep_command(["walk", sweep_file], Path)
