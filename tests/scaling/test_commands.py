"""``llada collect``, ``llada curves`` and ``llada sweep``, called as the command calls them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llada_lightning.errors import UserError
from llada_lightning.scaling import commands
from llada_lightning.scaling.commands import collect_command, curves_command, sweep_command
from llada_lightning.scaling.results import read_results, write_records, write_results
from llada_lightning.scaling.sweep import Sweep
from llada_lightning.scaling.sweep_run import FailedRun, SweepOutcome
from studies import record, study

Captured = pytest.CaptureFixture[str]


@pytest.fixture
def table(tmp_path: Path) -> str:
    return str(write_results(study(), tmp_path / "results.csv"))


# --- collect ---


def test_collect_writes_the_table_and_names_what_is_not_sound(tmp_path: Path, capsys: Captured) -> None:
    write_records(tmp_path / "runs/a", [record("arm", "107k", 1e12, 4.0)])
    (tmp_path / "runs/b").mkdir()
    (tmp_path / "runs/b/config.yaml").touch()
    out = tmp_path / "results.csv"
    assert collect_command([str(tmp_path / "runs"), "--out", str(out)]) == 0
    assert len(read_results(out)) == 1
    captured = capsys.readouterr()
    assert "1 results of 2 run folders" in captured.out
    assert captured.err.splitlines() == [f"unfinished: {tmp_path}/runs/b (no result.json)"]


def test_collect_as_json(tmp_path: Path, capsys: Captured) -> None:
    for name in "ab":
        write_records(tmp_path / name, [record("arm", "107k", 1e12, 4.0)])
    assert collect_command([str(tmp_path), "--out", str(tmp_path / "r.csv"), "--json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    written = json.loads(line)
    assert (written["folders"], written["records"]) == (2, 1)
    assert written["duplicates"][0]["dropped"] == str(tmp_path / "b")


def test_collect_without_results_writes_nothing(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    with pytest.raises(UserError, match="no results under"):
        collect_command([str(tmp_path / "runs"), "--out", str(tmp_path / "r.csv")])
    assert not (tmp_path / "r.csv").exists()


# --- curves ---


def test_curves_writes_fits_and_figure_and_prints_every_run(table: str, tmp_path: Path, capsys: Captured) -> None:
    assert curves_command([table, "--out", str(tmp_path / "out"), "--samples", "200"]) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["fits.json", "scaling.png"]
    fits = json.loads((tmp_path / "out/fits.json").read_text())
    assert fits["settings"]["samples"] == 200
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines() if line.startswith(("arm  ", "llada  "))]
    assert len(rows) == 12
    assert rows[0][:5] == ["arm", "107k", "3.0e11", "107k", "469k"]
    assert sum(row[-1] == "best" for row in rows) == 6
    for words in ("exact", "bound", "(6ND)", "compute multiplier of llada", "scaling.png"):
        assert words in out


def test_curves_as_json_under_the_other_convention(table: str, tmp_path: Path, capsys: Captured) -> None:
    options = ["--convention", "total", "--unit", "bits_per_byte", "--json"]
    assert curves_command([table, "--out", str(tmp_path), *options]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    written = json.loads(line)
    assert written["settings"]["convention"] == "total"
    assert written["settings"]["unit"] == "bits_per_byte"
    assert written["left_out"] == 0
    assert written["figure"].endswith("scaling.png")


def test_two_budgets_are_drawn_without_a_fit(tmp_path: Path, capsys: Captured) -> None:
    path = write_results(study(budgets=(3e11, 1e12)), tmp_path / "r.csv")
    assert curves_command([str(path), "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "arm: no fit, budgets on the envelope: 2; at least 3 are needed" in out
    assert "compute multiplier: none" in out
    assert (tmp_path / "scaling.png").exists()


def test_rows_that_are_left_out_are_counted(tmp_path: Path, capsys: Captured) -> None:
    table = study()
    table.loc[0, "status"] = "diverged"
    path = write_results(table, tmp_path / "r.csv")
    assert curves_command([str(path), "--out", str(tmp_path)]) == 0
    assert "1 of 12 rows left out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--convention", "8nd"], "convention"),
        (["--samples", "3"], "--samples is 3"),
        (["--colour", "red"], "--colour"),
    ],
)
def test_wrong_options_are_one_line(table: str, tmp_path: Path, options: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        curves_command([table, "--out", str(tmp_path), *options])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("command", [collect_command, curves_command, lambda argv: sweep_command(argv, Path)])
def test_every_command_has_help(command: object, capsys: Captured) -> None:
    with pytest.raises(SystemExit) as left:
        command(["--help"])  # type: ignore[operator]
    assert left.value.code == 0
    assert "--json" in capsys.readouterr().out


# --- sweep ---


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

    monkeypatch.setattr(commands, "run_sweep", runner)
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
