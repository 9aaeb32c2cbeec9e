"""`llada evaluate` from its arguments to its table, its file and the run's results."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from helpers.local_tasks import choice_task

pytest.importorskip("lm_eval")

import datasets

from helpers.small_checkpoints import tokenizer_folder, written
from helpers.tiny_runs import child_environment, fit
from llada_lightning.commands.evaluate import _settings, evaluate_parser
from llada_lightning.commands.main import main
from llada_lightning.records import read_evaluations
from llada_lightning.study.collect import collect
from llada_lightning.study.plots import task_accuracy


@pytest.fixture(scope="module", autouse=True)
def no_cache_of_the_user(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        yield


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("model")
    return written(root / "arm", "llada", "arm", tokenizer_folder(root / "tokenizer"))


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    choice_task(tmp_path / "tasks")
    return tmp_path / "tasks"


def test_a_table_and_a_file(checkpoint: Path, tasks: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out.json"
    arguments = ["evaluate", str(checkpoint), "--tasks", "local_choice", "--include-path", str(tasks), "--shots", "0"]
    assert main([*arguments, "--out", str(out), "--quiet"]) == 0
    table = capsys.readouterr().out
    record = json.loads(out.read_text())
    (result,) = record["results"]
    shown = f"{100 * result['value']:.2f} ± {100 * result['stderr']:.2f} %"
    assert "local_choice" in table and shown in table and str(out.name) in table
    assert (record["objective"], result["n"], result["metric"]) == ("arm", 8, "acc,none")
    assert set(result["metrics"]) == {"acc,none", "acc_norm,none"}
    assert main([*arguments, "--json", "--quiet", "--limit", "2"]) == 0
    assert json.loads(capsys.readouterr().out)["results"][0]["n"] == 2


def test_scores_of_a_run_join_its_results(prepared: Path, tasks: Path, tmp_path: Path, capsys: Any) -> None:
    run = fit("llada", prepared, tmp_path / "runs", "--trainer.max_steps=4")
    arguments = ["evaluate", str(run), "--tasks", "local_choice", "--include-path", str(tasks), "--monte-carlo", "2"]
    assert main([*arguments, "--quiet", "--limit", "2"]) == 0
    assert read_evaluations(run).empty  # a try is no result
    assert main([*arguments, "--quiet", "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])["results"][0]
    assert main([*arguments, "--quiet", "--json"]) == 0  # again: replaced, not added
    (row,) = read_evaluations(run).to_dict("records")
    assert (row["steps"], row["task"], row["n"]) == (4, "local_choice", 8)
    assert json.loads(row["settings"])["monte_carlo"] == 2
    table, _ = collect([tmp_path / "runs"])
    assert table["task_local_choice"].tolist() == pytest.approx([100 * result["value"]])
    assert table["task_local_choice_stderr"].tolist() == pytest.approx([100 * result["stderr"]])
    assert task_accuracy(table).axes[0].get_title() == "local_choice"


def test_each_result_of_a_run_is_measured_once(prepared: Path, tasks: Path, tmp_path: Path, capsys: Any) -> None:
    milestones = ("--trainer.max_steps=-1", "--budget.tokens=1024", "--budget.milestones=[512.0]")
    run = fit("arm", prepared, tmp_path / "runs", *milestones)
    arguments = ["evaluate", str(run), "--tasks", "local_choice", "--include-path", str(tasks), "--each-result"]
    capsys.readouterr()
    assert main([*arguments, "--quiet", "--json"]) == 0
    results = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]
    assert [Path(each["checkpoint"]).name for each in results] == ["step=00000002.ckpt", "step=00000004.ckpt"]
    rows = read_evaluations(run).to_dict("records")
    values = [100 * each["results"][0]["value"] for each in results]
    assert [(row["steps"], row["score"]) for row in rows] == list(zip((2, 4), map(pytest.approx, values), strict=True))
    table, _ = collect([tmp_path / "runs"])
    assert table["task_local_choice"].tolist() == pytest.approx(values)
    assert main([*arguments, "--quiet"]) == 0
    assert "every result of" in capsys.readouterr().err
    assert main([*arguments, "--quiet", "--json", "--shots", "1"]) == 0  # other settings
    assert len(json.loads(capsys.readouterr().out.splitlines()[-1])["results"]) == 2
    assert main(["evaluate", str(tmp_path), *arguments[2:], "--quiet"]) == 2
    assert "holds no result; give the folder of a run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "--suite and --tasks: neither given"),
        (["--suite", "paper-base", "--tasks", "a"], "--suite and --tasks: both given"),
        (["--suite", "paper"], "--suite 'paper' is not known; choose from paper-base, paper-instruct, scalability"),
        (["--suite", "scalability", "--shots", "1"], "the suite says its own"),
        (["--tasks", " , "], "names no task"),
        (["--tasks", "a", "--monte-carlo", "0"], "--monte-carlo is 0; it must be at least 1"),
        (["--tasks", "a", "--limit", "-1"], "--limit is -1; it must be at least 1"),
        (["--tasks", "a", "--shots", "-1"], "--shots is -1; it must be at least 0"),
        (["--tasks", "a", "--limit", str(2**70)], "--limit: 1180591620717411303424 given; it must lie within 64 bits"),
        (["--tasks", "a", "--out", "/nowhere/x.json"], "there is no folder /nowhere"),
        (["--tasks", "a", "--include-path", "/nowhere"], "--include-path '/nowhere': no such folder"),
    ],
)
def test_mistakes_are_one_line(checkpoint: Path, arguments: list[str], line: str, capsys: Any) -> None:
    assert main(["evaluate", str(checkpoint), *arguments]) == 2
    error = capsys.readouterr().err
    assert line in error and error.startswith("error: ") and error.count("\n") == 1


@pytest.mark.parametrize(
    ("changes", "shots", "most"),
    [({}, 8, 8), ({"fewshot_split": "test"}, 7, 7), ({"num_fewshot": 9}, None, 8)],
    ids=["other documents", "the one asked is left out", "of the task"],
)
def test_more_shots_than_documents_are_refused_before_the_model_is_read(
    tmp_path: Path, checkpoint: Path, changes: dict[str, Any], shots: int | None, most: int, capsys: Any
) -> None:
    choice_task(tmp_path, **changes)

    def evaluated(shots: int | None, model: Path) -> int:
        arguments = ["evaluate", str(model), "--tasks", "local_choice", "--include-path", str(tmp_path), "--quiet"]
        return main(arguments if shots is None else [*arguments, "--shots", str(shots)])

    for wanted in (1_000_000, most + 1) if shots else (None,):
        assert evaluated(wanted, tmp_path / "no model") == 2
        error = capsys.readouterr().err.splitlines()[-1]  # behind a bar of the library that reads the data
        assert error.startswith(f"error: task 'local_choice': {wanted or 9} shots wanted, and it has {most} documents")
    if shots:
        assert evaluated(shots, checkpoint) == 0


def test_a_task_without_data_can_be_left_out(checkpoint: Path, tasks: Path, capsys: Any) -> None:
    choice_task(tasks, "lost", dataset_kwargs={"data_files": {"test": "/nowhere/lost.jsonl"}})
    arguments = ["evaluate", str(checkpoint), "--tasks", "lost,local_choice", "--include-path", str(tasks), "--quiet"]
    assert main(arguments) == 2
    refused = capsys.readouterr()
    assert "its data cannot be reached" in refused.err and refused.out == ""
    assert main([*arguments, "--skip-missing"]) == 0
    gone_on = capsys.readouterr()
    assert "note: left out: task 'lost'" in gone_on.err and "local_choice" in gone_on.out


def test_code_is_refused_before_any_data_are_looked_for(checkpoint: Path, tasks: Path, capsys: Any) -> None:
    choice_task(tasks, "lost", dataset_kwargs={"data_files": {"test": "/nowhere/lost.jsonl"}})
    choice_task(tasks, "local_code", unsafe_code=True)
    names = "lost,local_code"
    assert main(["evaluate", str(checkpoint), "--tasks", names, "--include-path", str(tasks), "--quiet"]) == 2
    assert "task 'local_code' executes what the model writes; give --unsafe-code" in capsys.readouterr().err


@pytest.mark.parametrize(("held", "kind"), [(True, "namespaces"), (False, "limits only")])
def test_a_result_tells_in_which_sandbox_programs_were_run(
    held: bool, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llada_lightning.evaluation.sandbox.is_isolated", lambda: held)
    options = evaluate_parser().parse_args(["checkpoint", "--tasks", "humaneval"])
    assert "sandbox" not in _settings(options, chat=False)
    options = evaluate_parser().parse_args(["checkpoint", "--tasks", "humaneval", "--unsafe-code"])
    assert _settings(options, chat=False)["sandbox"] == kind


@pytest.mark.slow
def test_two_processes_share_the_documents(checkpoint: Path, tasks: Path, tmp_path: Path) -> None:
    records = []
    for processes in (1, 2):
        out = tmp_path / f"{processes}.json"
        command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--standalone"]
        command += ["-m", "llada_lightning", "evaluate", str(checkpoint), "--tasks", "local_choice", "--limit", "7"]
        subprocess.run(
            [*command, "--include-path", str(tasks), "--out", str(out), "--quiet"], check=True, env=child_environment()
        )
        records.append(json.loads(out.read_text()))
    one, two = (record["results"][0] for record in records)
    assert one["n"] == two["n"] == 7 and one["value"] == two["value"]
    assert one["stderr"] == pytest.approx(two["stderr"])  # documents come in another order
