"""``llada collect``, called as the command calls it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llada_lightning.errors import UserError
from llada_lightning.scaling.collect_command import collect_command
from llada_lightning.scaling.results import read_results, write_records
from studies import record

Captured = pytest.CaptureFixture[str]


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
