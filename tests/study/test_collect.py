"""What ``collect`` finds, and what it says of runs that are not sound."""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from helpers.studies import record
from llada_lightning.commands.main import main
from llada_lightning.records import RESULT_COLUMNS, write_records, write_validation
from llada_lightning.settings import Place
from llada_lightning.study import collect as collect_module
from llada_lightning.study.collect import collect, find_run_folders, gather
from llada_lightning.study.collect import project_run as read_run
from llada_lightning.study.results import write_covariance
from llada_lightning.support.errors import UserError


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


def test_of_duplicates_the_one_with_a_loss_is_kept(tmp_path: Path) -> None:
    write_records(tmp_path / "1", [sound(val_nats_per_token=math.nan)])
    write_records(tmp_path / "2", [sound()])
    table, report = collect([tmp_path])
    assert list(table["val_nats_per_token"]) == [sound()["val_nats_per_token"]]
    assert report.duplicates[0].dropped == str(tmp_path / "1")


def test_a_table_goes_to_the_home_that_its_path_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    write_records(tmp_path / "1", [sound()])
    assert main(["collect", "1", "--out=~/results.csv"]) == 0
    assert (tmp_path / "home/results.csv").exists() and not (tmp_path / "~").exists()
    assert Place(root="~/runs", study="s", name="a").folder == tmp_path / "home/runs/s/a"


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
    assert find_run_folders([tmp_path]) == ([tmp_path / "run"], {})


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
    assert report.unfinished == {str(tmp_path / "run"): "1 of 2 results reached"}


def test_runs_that_a_sweep_has_not_begun_are_counted(tmp_path: Path) -> None:
    write_records(tmp_path / "s/run", [sound()])
    copy = tmp_path / "s/plan.sweep.yaml"
    values = "command: [llada, fit, '${args}']\nparameters: {seed_everything: {values: [0, 1, 2]}}\n"
    copy.write_text(f"method: grid\n{values}")
    _, report = collect([tmp_path])
    assert report.not_begun == {str(copy): (2, 3)}
    assert report.lines() == [f"not begun: 2 of the 3 runs of {copy}; `llada sweep run` does what is left"]
    copy.write_text("method: random")  # what is wrong with it is told by `llada sweep`
    assert collect([tmp_path])[1].not_begun == {}
    copy.write_text(f"method: grid\n{values}")
    copy.with_name("more.sweep.yaml").write_text("method: grid")  # of two sweeps the shares are not known
    assert collect([tmp_path])[1].not_begun == {}


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


# --- no run is lost in silence ---


@pytest.mark.parametrize("name", ["logs", "wandb", "checkpoints", "__pycache__", "logs/deeper"])
def test_a_run_is_found_whatever_its_name(tmp_path: Path, name: str) -> None:
    write_records(tmp_path / name, [sound()])
    (tmp_path / name / "config.yaml").touch()
    begun = tmp_path / f"{name}-begun" / name
    begun.mkdir(parents=True)
    (begun / "config.yaml").touch()
    (begun / "metrics.csv").touch()
    table, report = collect([tmp_path])
    assert list(table["run"]) == ["a"]
    assert report.unfinished == {str(begun): "no result.json"}


def test_a_run_in_a_hidden_folder_is_named_and_can_be_given(tmp_path: Path) -> None:
    write_records(tmp_path / ".x", [sound("x")])
    write_records(tmp_path / ".old/study/y", [sound("y")])
    write_records(tmp_path / "z", [sound("z")])
    table, report = collect([tmp_path])
    assert list(table["run"]) == ["z"]
    reason = "a run in a hidden folder; rename it, or give this folder itself"
    assert report.left_out == {str(tmp_path / ".old/study/y"): reason, str(tmp_path / ".x"): reason}
    assert f"left out: {tmp_path / '.x'} ({reason})" in report.lines()
    table, report = collect([tmp_path, tmp_path / ".x", tmp_path / ".old"])
    assert sorted(table["run"]) == ["x", "y", "z"]
    assert report.lines() == []


def test_a_study_that_is_a_run_itself_hides_none(tmp_path: Path) -> None:
    write_records(tmp_path, [sound("study")])
    (tmp_path / "config.yaml").touch()
    write_records(tmp_path / "a", [sound("a")])
    (tmp_path / "begun").mkdir()
    for name in ("config.yaml", "tokenizer.json"):
        (tmp_path / "begun" / name).touch()
    (tmp_path / "branches/5").mkdir(parents=True)
    (tmp_path / "branches/5/metrics.csv").touch()
    table, report = collect([tmp_path])
    assert sorted(table["run"]) == ["a", "study"]
    assert report.unfinished == {str(tmp_path / "begun"): "no result.json"}


def test_links_to_runs_are_runs_and_links_out_of_the_study_are_named(tmp_path: Path) -> None:
    write_records(tmp_path / "disk/linked", [sound("linked")])
    write_records(tmp_path / "disk/other/far", [sound("far")])
    write_records(tmp_path / "study/near", [sound("near")])
    for name, target in {
        "link": "../disk/linked", "again": "../disk/linked", "latest": "near", "loop": ".", "out": "../disk/other",
        "nowhere": "nothing", "itself": "itself",
    }.items():  # fmt: skip
        (tmp_path / "study" / name).symlink_to(target)
    table, report = collect([tmp_path / "study"])
    assert sorted(table["run"]) == ["linked", "near"]
    reason = "a link to a folder that is no run; give that folder itself if it holds runs"
    assert report.left_out == {str(tmp_path / "study/out"): reason}
    assert report.duplicates == []


@contextmanager
def unprivileged() -> Iterator[None]:
    """Without the rights of root, who may read everything."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


def test_folders_and_files_that_may_not_be_read_are_named() -> None:
    with tempfile.TemporaryDirectory() as name, unprivileged_owner(Path(name)) as study:
        for run in ("a", "closed", "names-only", "file"):
            write_records(study / run, [sound(run)])
            (study / run / "config.yaml").write_text("budget: null")
        modes = {"closed": 0o000, "names-only": 0o400, "file/result.json": 0o000}
        for path, mode in modes.items():
            (study / path).chmod(mode)
        table, report = collect([study])
        for path in modes:
            (study / path).chmod(0o700)
        assert list(table["run"]) == ["a"]
        assert report.left_out == {str(study / "closed"): "it cannot be read: Permission denied"}
        assert list(report.unfinished) == [str(study / "file"), str(study / "names-only")]
        assert all("Permission denied" in reason for reason in report.unfinished.values())


@contextmanager
def unprivileged_owner(folder: Path) -> Iterator[Path]:
    folder.chmod(0o777)
    with unprivileged():
        study = folder / "study"
        study.mkdir()
        yield study


# --- one damaged run does not cost the others ---


def deep(levels: int) -> str:
    return "[" * levels + "]" * levels


def pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def huge(path: Path) -> None:
    """A file with holes: more bytes than are read of a text, none on the disk."""
    with path.open("wb") as file:
        file.truncate(1 << 40)


def text(content: str | bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content.encode() if isinstance(content, str) else content)


UNREADABLE: dict[str, Callable[[Path], object]] = {
    "binary": text(bytes(range(128, 256)) * 4),
    "a NUL": text(b"\0" * 300_000),
    "a pipe": pipe,
    "huge": huge,
    "a folder": lambda path: (path.unlink(missing_ok=True), path.mkdir()),
    "a link to nowhere": lambda path: (path.unlink(missing_ok=True), path.symlink_to("nowhere")),
}
VALIDATION = "steps,document,sequences,nats_per_token\n"
EVALUATIONS = "steps,task,score,stderr,n,metric,settings\n"
DAMAGES: list[tuple[str, str, Callable[[Path], object]]] = [
    *((file, kind, damage)
      for file in ("result.json", "config.yaml", "validation.csv", "faults.csv", "evaluations.csv")
      for kind, damage in UNREADABLE.items()),
    ("result.json", "100,000 deep", text(deep(100_000))),
    ("result.json", "a number of 5,000 digits", text('[{"run": "a", "steps": 1' + "0" * 5_000 + "}]")),
    ("result.json", "no records", text("[{}]")),
    ("config.yaml", "20,000 deep", text("a: " + deep(20_000))),
    ("config.yaml", "a bomb", text("a: &a [1,1,1,1,1,1,1,1]\n" + "".join(
        f"{x}: &{x} [{', '.join([f'*{y}'] * 9)}]\n" for y, x in zip("abcdefgh", "bcdefghi", strict=True)))),
    ("validation.csv", "a number of 30 digits", text(VALIDATION + "762,1,1" + "0" * 30 + ",3\n")),
    ("validation.csv", "a cell too many", text(VALIDATION + "762,1,1,3.5,9\n")),
    ("faults.csv", "a cell too many", text("step,action\n1,skipped,2\n")),
    ("faults.csv", "a step of 5,000 digits", text(f"step,action\n{'9' * 5000},skipped\n")),
    ("faults.csv", "another table", text("a,b\n1,2\n")),
    ("evaluations.csv", "a number of 30 digits", text(EVALUATIONS + "1" + "0" * 30 + ",a,1,1,1,b,c\n")),
]  # fmt: skip


@pytest.mark.parametrize(("file", "damage"), [pytest.param(f, d, id=f"{f}: {kind}") for f, kind, d in DAMAGES])
def test_a_damaged_file_of_one_run_is_named_and_the_others_are_collected(
    tmp_path: Path, file: str, damage: Callable[[Path], object]
) -> None:
    for name in ("bad", "good", "well"):
        write_validation(tmp_path / name, 762, [(0, 1, 3.0), (5, 1, 5.0)])
        write_records(tmp_path / name, [sound(name)])
    damage(tmp_path / "bad" / file)
    collection = gather([tmp_path])
    table, report = collection.table(), collection.report
    report.covariance = write_covariance(collection.rows(), tmp_path / "r.csv")
    assert sorted(table["run"]) == (["good", "well"] if file == "result.json" else ["bad", "good", "well"])
    (line,) = report.lines()
    assert line.startswith({"result.json": "unfinished: ", "validation.csv": "covariance: 1 results left out"}.get(
        file, f"damaged: {tmp_path / 'bad'} ("))  # fmt: skip
    assert str(tmp_path / "bad" / file) in line
    assert len(line.splitlines()) == 1 and len(line) < 600
    assert report.covariance.rows == (2 if file in ("result.json", "validation.csv") else 3)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tokens": 10**30}, "column tokens holds 1" + "0" * 30 + ", which takes more than 64 bits"),
        ({"flops_6nd": 10**400}, "column flops_6nd holds a whole number of 1329 bits; the largest number is 1e+100"),
        ({"val_stderr": 1e300}, "column val_stderr holds 1e+300; the largest number is 1e+100"),
        ({"steps": 10**30}, "column steps holds"),
        ({"git_commit": {"a": [1]}}, "column git_commit holds"),
        ({"tokenizer": "a\ud800"}, "column tokenizer holds"),
        ({"device": "a\0b"}, "column device holds"),
        ({"lr": "x" * 5_000}, "which is not a number"),
    ],
)
def test_a_record_that_no_table_holds_is_named(tmp_path: Path, change: dict[str, object], words: str) -> None:
    write_records(tmp_path / "bad", [sound(**change)])
    write_records(tmp_path / "good", [sound("g")])
    table, report = collect([tmp_path])
    assert list(table["run"]) == ["g"]
    (reason,) = report.unfinished.values()
    assert words in reason and len(reason) < 300 and "\0" not in reason


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
        project_run("deep", {"records": "[" * 100_000}),
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
    assert (report.folders, report.wandb_runs, report.records) == (1, 8, 4)
    assert report.foreign == {project: ["x (someone's)", "y"]}
    assert report.diverged == [f"{project}/d"]
    assert report.unfinished[f"{project}/agent7 (arm trunk)"] == "2 of 3 results reached"
    assert report.unfinished[f"{project}/r"] == "state crashed; no record in its summary"
    assert report.unfinished[f"{project}/torn"].startswith("summary key records is not JSON: ")
    assert report.unfinished[f"{project}/deep"].startswith("summary key records is nested too deeply")
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
