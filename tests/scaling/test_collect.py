"""What ``collect`` finds, and what it says of runs that are not sound."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from llada_lightning.errors import UserError
from llada_lightning.scaling import collect as collect_module
from llada_lightning.scaling.collect import collect, find_run_folders
from llada_lightning.scaling.results import RESULT_COLUMNS, write_records
from llada_lightning.scaling.wandb_projects import project_run as read_run
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
    assert (twin.run, twin.difference) == ("a", 0.0)
    assert len(report.lines()) == 5
    assert report.lines()[-1].endswith("losses differ by 0.0e+00 nats/token")


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


def test_a_folder_without_runs_gives_an_empty_table(tmp_path: Path) -> None:
    table, report = collect([tmp_path])
    assert table.empty
    assert report.lines() == []
    assert report.folders == 0


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (4.0 * (1 + 1e-6), ["losses differ by 4.0e-06 nats/token"]),
        (4.1, ["losses differ by 1.0e-01 nats/token", "warning: a at step 762: one run, two losses, 2.5% apart"]),
        (None, ["the losses cannot be compared, one is not a number"]),
    ],
)
def test_of_duplicates_the_losses_are_compared(tmp_path: Path, loss: float | None, words: list[str]) -> None:
    write_records(tmp_path / "1", [sound()])
    write_records(tmp_path / "2", [sound(val_nats_per_token=loss)])
    _, report = collect([tmp_path])
    lines = report.lines()
    assert len(lines) == len(words)
    assert all(word in line for word, line in zip(words, lines, strict=True))


def test_a_run_that_lacks_a_budget_is_unfinished(tmp_path: Path) -> None:
    write_records(tmp_path / "run", [sound(budget=1e12)])
    (tmp_path / "run/config.yaml").write_text("budget: {flops: [1.0e+12, 3.0e+12]}")
    table, report = collect([tmp_path])
    assert len(table) == 1
    assert report.unfinished == {str(tmp_path / "run"): "1 of 2 budgets reached"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"lr": "fast"}, "column lr holds 'fast', which is not a number"),
        ({"tokens": 1.5}, "column tokens holds 1.5, which is not a whole number"),
        ({"flops_6nd": {"a": 1}}, "column flops_6nd holds {'a': 1}, which is not a number"),
    ],
)
def test_a_record_with_wrong_values_is_named_and_the_others_stay(
    tmp_path: Path, change: dict[str, object], words: str
) -> None:
    write_records(tmp_path / "bad", [sound(**change)])
    write_records(tmp_path / "good", [sound("g")])
    table, report = collect([tmp_path])
    assert list(table["run"]) == ["g"]
    assert words in report.unfinished[str(tmp_path / "bad")]


def project_run(
    id: str,
    summary: dict[str, object],
    state: str = "finished",
    config: dict[str, object] | None = None,
    name: str = "",
) -> SimpleNamespace:
    """A run as wandb's public API shows it."""
    return SimpleNamespace(id=id, name=name or id, state=state, summary_metrics=summary, config=config or {})


OURS = {"model": {}, "data": {}, "trainer": {}, "run": {}, "budget": {"flops": 1e12}}


def test_folders_and_projects_make_one_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The public API's answers are replaced; test_wandb_standin.py goes through wandb's client."""
    two = [sound("two", budget=1e12), sound("two", budget=3e12)]
    trunk = {**OURS, "budget": {"flops": [1e12, 3e12, 1e13]}}
    runs = [
        project_run("a", {**sound(), "_step": 762, "extra": "x"}),
        project_run("agent7", {"records": json.dumps(two), **two[-1]}, config=trunk, name="arm trunk"),
        project_run("two", {"records": two}),
        project_run("d", sound("d", val_nats_per_token="NaN", val_stderr="NaN", status="diverged")),
        project_run("r", {"val_nats_per_token": 4.2, "tokens": 100}, state="crashed", config=OURS),
        project_run("x", {"loss": 1.0}, name="someone's"),
        project_run("y", {}),
        project_run("torn", {"records": "[{"}),
        project_run("scalar", {"records": "3"}),
    ]
    monkeypatch.setattr(
        collect_module, "read_project", lambda path: [read_run(f"{path}/{run.id}", run) for run in runs]
    )
    write_records(tmp_path / "a", [sound()])
    project = "wandb:lab/study"
    table, report = collect([project, tmp_path, project])
    assert sorted(table["run"]) == ["a", "d", "two", "two"]
    assert math.isnan(table.set_index("run").loc["d", "val_nats_per_token"])
    assert (report.folders, report.wandb_runs, report.records) == (1, 7, 4)
    assert report.foreign == {project: ["x (someone's)", "y"]}
    assert report.diverged == [f"{project}/d"]
    assert report.unfinished[f"{project}/agent7 (arm trunk)"] == "2 of 3 budgets reached"
    assert report.unfinished[f"{project}/r"] == "state crashed; no record in its summary"
    assert report.unfinished[f"{project}/torn"].startswith("summary key records: ")
    assert report.unfinished[f"{project}/scalar"] == "summary key records: not a list of records"
    kept = [(twin.kept, twin.dropped, twin.difference) for twin in report.duplicates]
    trunk_name = f"{project}/agent7 (arm trunk)"
    assert kept == [(str(tmp_path / "a"), f"{project}/a", 0.0), *[(trunk_name, f"{project}/two", 0.0)] * 2]
    assert "not ours: 2 of wandb:lab/study's runs" in report.lines()[-1]


@pytest.mark.parametrize("source", ["wandb:", "wandb:study", "wandb:a/b/c", "wandb:a/ b"])
def test_a_project_has_an_entity_and_a_name(source: str) -> None:
    with pytest.raises(UserError, match="given as wandb:ENTITY/PROJECT"):
        collect([source])


def test_without_wandb_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="needs the package wandb"):
        collect(["wandb:lab/study"])
