"""The agents of Weights & Biases start runs, and it is never in the way of one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_preemption import wandb_records

from helpers import tiny_runs
from helpers.tiny_runs import call_at, fit, fit_arguments, metrics, record
from helpers.wandb_standin import ENTITY, KEY, PAGE, WandbStandIn
from llada_lightning.commands.main import main
from llada_lightning.records import RESULT_COLUMNS
from llada_lightning.study.collect import collect, read_project
from llada_lightning.study.results import read_results
from llada_lightning.study.sweep import read_sweep, render_command
from llada_lightning.support.errors import UserError
from llada_lightning.training.callbacks import loggers as wandb_log

pytest.importorskip("wandb")
PROJECT = f"wandb:{ENTITY}/study"


def sweep_file(folder: Path, data: Path) -> Path:
    """One fit, a trunk for two tiny budgets: each takes ten seconds to start."""
    given = dict(word.removeprefix("--").split("=", 1) for word in fit_arguments("arm", data, folder / "runs")[1:])
    dropped = ("model", "trainer.max_steps", "run.name")
    fixed = [f"--{key}={value}" for key, value in given.items() if key not in dropped]
    config = {
        "program": "llada",
        "method": "grid",
        "command": ["${env}", "${interpreter}", "-m", "llada_lightning", "fit", *fixed, "${args}"],
        "parameters": {"model": {"values": ["LladaModule"]}, "budget.flops": {"values": [[5.0e8, 1.0e9]]}},
    }
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path


def wandb_command(*words: str) -> str:
    """What it says, on either stream."""
    done = subprocess.run([sys.executable, "-m", "wandb", *words], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.slow
def test_an_agents_runs_are_collected_and_the_same_sweep_has_nothing_left(
    prepared: Path, tmp_path: Path, server: WandbStandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    file = sweep_file(tmp_path, prepared)
    wandb_command("sweep", "--project", "study", str(file))
    [(sweep, known)] = server.sweeps.items()
    assert known["config"] == yaml.safe_load(file.read_text())

    said = wandb_command("agent", "--project", "study", sweep)
    for point in known["points"]:
        words = render_command(read_sweep(file), point)
        assert "About to run command: " + " ".join(f'"{word}"' if " " in word else word for word in words) in said
    assert server.unknown == []
    assert known["next"] == len(known["points"]) == 1
    assert [run["state"] for run in server.runs.values()] == ["finished"]
    assert {run["sweepName"] for run in server.runs.values()} == {sweep}

    out = tmp_path / "results.csv"
    capsys.readouterr()
    assert main(["collect", str(tmp_path / "runs"), PROJECT, "--out", str(out), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["folders"], report["wandb_runs"], report["records"]) == (1, 1, 2)
    assert [twin["difference"] for twin in report["duplicates"]] == [0.0] * 2
    assert report["unfinished"] == {}
    assert report["covariance"]["rows"] == 2
    table = read_results(out)
    assert list(table["objective"]) == ["llada", "llada"]

    remote, _ = collect([PROJECT])
    for column in RESULT_COLUMNS:
        assert remote[column].equals(table[column]), column

    assert main(["sweep", "run", str(file), "--json"]) == 0
    outcome = json.loads(capsys.readouterr().out)
    folders = (tmp_path / "runs" / "test").glob("*flops*")
    assert sorted(outcome["skipped"]) == sorted(folder.name for folder in folders)
    assert outcome["done"] == outcome["failed"] == []


def test_an_offline_run_is_synchronised_and_read_back(
    prepared: Path, tmp_path: Path, server: WandbStandIn, capfd: pytest.CaptureFixture[str]
) -> None:
    """What a run without network wrote, sent later by `wandb sync`, gives the very record of its folder."""
    offline = ("--wandb.project=study", "--wandb.offline=true", "--trainer.max_steps=4")
    folder = fit("llada", prepared, tmp_path / "runs", *offline, f"--data.held_out={{a.b-c: {prepared}}}")
    assert server.runs == {} and "WARNING" not in capfd.readouterr().err
    [written] = (folder / "wandb").glob("offline-run-*")
    wandb_command("sync", str(written))
    assert server.unknown == []
    table, report = collect([folder, PROJECT])
    assert (report.wandb_runs, report.records, report.unfinished) == (1, 1, {})
    assert [twin.difference for twin in report.duplicates] == [0.0]
    remote, _ = collect([PROJECT])
    for column in RESULT_COLUMNS:
        assert remote[column].equals(table[column]), column
    assert "a.b-c" in json.loads(remote["val_held_out"][0])


def test_a_projects_runs_come_page_by_page(server: WandbStandIn) -> None:
    import wandb

    for number in range(2 * PAGE + 1):
        with wandb.init(project="study", id=f"run{number}", settings=wandb.Settings(silent=True)) as run:
            run.summary.update({"run": f"r{number}", "objective": "arm", "val_nats_per_token": float("nan")})
    runs = read_project(PROJECT)
    assert [run.records[0]["run"] for run in runs] == [f"r{n}" for n in range(2 * PAGE + 1)]
    assert server.operations.count("Runs") == PAGE + 1


def test_a_failed_run_and_a_foreign_one_are_named(server: WandbStandIn) -> None:
    import wandb

    settings = wandb.Settings(silent=True)
    ours = {section: {"set": True} for section in ("model", "data", "trainer", "budget", "run")}
    wandb.init(project="study", id="fit", config=ours, settings=settings).finish(exit_code=1)
    wandb.init(project="study", id="someone", settings=settings).finish()
    table, report = collect([PROJECT])
    assert table.empty
    assert report.unfinished == {f"{PROJECT}/fit": "state failed; no record in its summary"}
    assert report.foreign == {PROJECT: ["someone"]}


@pytest.mark.parametrize(
    ("key", "project", "words"),
    [
        (KEY, "nowhere", "Could not find project nowhere"),
        ("1" * 40, "study", "invalid key"),
        ("short", "study", "API key must have 40"),
        ("", "study", "No API key configured"),
    ],
)
def test_what_the_server_or_the_account_refuses_is_one_line(
    server: WandbStandIn, monkeypatch: pytest.MonkeyPatch, key: str, project: str, words: str
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", key)
    with pytest.raises(UserError) as caught:
        read_project(f"wandb:{ENTITY}/{project}")
    assert words in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


SHORT = ("--wandb.project=study", "--trainer.max_steps=6")


@pytest.fixture(autouse=True)
def _in_the_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fit runs in this process, and its callback reads the calls of the module that it imports."""
    monkeypatch.setattr(tiny_runs, "CALLS", {})
    monkeypatch.setitem(wandb_log._TIMEOUTS, "WANDB_FINISH_TIMEOUT", 1.0)


def children() -> dict[int, str]:
    """Processes below this one, and their commands."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            if parent == os.getpid():
                found[int(stat.parent.name)] = (stat.parent / "cmdline").read_text().replace("\0", " ")
        except OSError:  # it has just ended
            continue
    return found


def is_whole(folder: Path, said: str) -> None:
    assert [row["step"] for row in metrics(folder)] == [str(step) for step in range(1, 7)]
    assert record(folder)["status"] == "done"
    assert said.count("warning:") == 1
    assert said.count("warning: W&B is lost") == 1


def steps_to_send(folder: Path) -> set[int]:
    """The steps in what `wandb sync` reads."""
    [file] = (folder / "wandb").glob("run-*/*.wandb")
    histories = [found.history for found in wandb_records(file) if found.WhichOneof("record_type") == "history"]
    items = [item for history in histories for item in history.item]
    return {int(item.value_json) for item in items if "trainer/global_step" in (item.key, *item.nested_key)}


def test_a_server_that_goes_away_costs_the_run_its_timeout_only(
    prepared: Path, tmp_path: Path, server: WandbStandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_runs.CALLS["hang_up"] = server.stop
    folder = fit("arm", prepared, tmp_path, *SHORT, call_at(3, "hang_up"))
    is_whole(folder, capsys.readouterr().err)
    assert steps_to_send(folder) == {1, 2, 3, 4, 5, 6}


def test_the_death_of_its_process_does_not_end_the_run(
    prepared: Path, tmp_path: Path, server: WandbStandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    def kill() -> None:
        [service] = [pid for pid, command in children().items() if "wandb-core" in command]
        os.kill(service, signal.SIGKILL)

    tiny_runs.CALLS["kill"] = kill
    folder = fit("arm", prepared, tmp_path, *SHORT, call_at(3, "kill"))
    is_whole(folder, capsys.readouterr().err)
    assert steps_to_send(folder) <= {1, 2, 3}


@pytest.mark.parametrize("method", ["log_metrics", "finalize", "log_hyperparams"])
def test_no_exception_of_the_logger_reaches_the_run(
    tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def breaks(*_: Any, **__: Any) -> None:
        raise RuntimeError("nobody\nhome")

    monkeypatch.setattr(wandb_log.WandbLogger, method, breaks)
    logger = wandb_log.SafeWandbLogger(save_dir=str(tmp_path), offline=True)
    for _ in range(2):
        getattr(logger, method)({"a": 1.0})
    logger.finish()  # starts nothing any more
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert "W&B is lost (RuntimeError: nobody home)" in said[0]
    assert logger.is_lost
