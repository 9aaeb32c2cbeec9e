"""What ``collect`` finds, and what it says of runs that are not sound."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from llada_lightning.errors import UserError
from llada_lightning.scaling.collect import collect, find_run_folders
from llada_lightning.scaling.results import RESULT_COLUMNS, write_records
from studies import record


def sound(name: str = "a", budget: float = 1e12, **other: object) -> dict[str, object]:
    return record("arm", "107k", budget, 4.0, run=name, **other)


def test_collect_gives_one_row_a_record_and_drops_nothing_in_silence(tmp_path: Path) -> None:
    write_records(tmp_path / "study/two-budgets", [sound(budget=1e12), sound(budget=3e12)])
    write_records(tmp_path / "study/diverged", [sound("d", val_nats_per_token=math.nan, status="diverged")])
    write_records(tmp_path / "study/blown-up", [sound("e", val_nats_per_token=math.inf)])
    write_records(tmp_path / "study/running", [sound("r", status="running")])
    write_records(tmp_path / "other/copy", [sound(budget=3e12)])
    (tmp_path / "study/started").mkdir()
    (tmp_path / "study/started/config.yaml").touch()
    table, report = collect([tmp_path])
    assert list(table.columns) == list(RESULT_COLUMNS)
    assert sorted(table["run"]) == ["a", "a", "d", "e", "r"]
    assert (report.folders, report.records) == (6, 5)
    folder = str(tmp_path / "study")
    assert report.unfinished == {
        f"{folder}/running": "status running",
        f"{folder}/started": "no result.json",
    }
    assert report.diverged == [f"{folder}/blown-up", f"{folder}/diverged"]
    (twin,) = report.duplicates
    assert (twin.kept, twin.dropped) == (str(tmp_path / "other/copy"), f"{folder}/two-budgets")
    assert len(report.lines()) == 5


def test_of_duplicates_the_finished_one_is_kept(tmp_path: Path) -> None:
    write_records(tmp_path / "1", [sound(status="running")])
    write_records(tmp_path / "2", [sound()])
    table, report = collect([tmp_path])
    assert list(table["status"]) == ["done"]
    assert report.duplicates[0].dropped == str(tmp_path / "1")


def test_overlapping_paths_are_no_duplicates(tmp_path: Path) -> None:
    write_records(tmp_path / "runs/a", [sound()])
    table, report = collect([tmp_path, tmp_path / "runs", tmp_path / "runs/a"])
    assert len(table) == 1
    assert report.lines() == []


def test_foreign_configs_below_a_run_are_no_runs(tmp_path: Path) -> None:
    write_records(tmp_path / "run", [sound()])
    for folder in ("run/wandb/offline/files", "wandb/offline/files", ".cache"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "config.yaml").touch()
    assert find_run_folders([tmp_path]) == [tmp_path / "run"]


def test_a_missing_folder_is_a_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a folder"):
        collect([tmp_path / "nowhere"])
