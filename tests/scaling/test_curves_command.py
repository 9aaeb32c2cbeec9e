"""``llada curves``, called as the command calls it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llada_lightning.errors import UserError
from llada_lightning.scaling.collect_command import collect_command
from llada_lightning.scaling.curves_command import curves_command
from llada_lightning.scaling.results import write_results
from llada_lightning.scaling.sweep_command import sweep_command
from studies import study

Captured = pytest.CaptureFixture[str]


@pytest.fixture
def table(tmp_path: Path) -> str:
    return str(write_results(study(), tmp_path / "results.csv"))


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


@pytest.mark.parametrize("command", [collect_command, curves_command, lambda argv: sweep_command(argv, Path, len)])
def test_every_command_has_help(command: object, capsys: Captured) -> None:
    with pytest.raises(SystemExit) as left:
        command(["--help"])  # type: ignore[operator]
    assert left.value.code == 0
    assert "--json" in capsys.readouterr().out
