"""A sweep through wandb's real client (`wandb sweep`, `wandb agent`, runs, public API) and a stand-in for its server.

Real are wandb's command line, its agent, its background process, and our fits, each in processes of its own. Played,
on loopback, are the server's answers: ``wandb_standin.py`` says which, and what is left out.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from helpers.tiny_runs import fit, fit_arguments
from helpers.wandb_standin import ENTITY, KEY, PAGE, WandbStandIn
from llada_lightning.commands.main import main
from llada_lightning.records import RESULT_COLUMNS
from llada_lightning.study.collect import collect, read_project
from llada_lightning.study.results import read_results
from llada_lightning.study.sweep import read_sweep, render_command
from llada_lightning.support.errors import UserError

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


def test_an_offline_run_is_synchronised_and_read_back(prepared: Path, tmp_path: Path, server: WandbStandIn) -> None:
    """What a run without network wrote, sent later by `wandb sync`, gives the very record of its folder."""
    offline = ("--wandb.project=study", "--wandb.offline=true", "--trainer.max_steps=4")
    folder = fit("llada", prepared, tmp_path / "runs", *offline)
    assert server.runs == {}
    [written] = (folder / "wandb").glob("offline-run-*")
    wandb_command("sync", str(written))
    assert server.unknown == []
    table, report = collect([folder, PROJECT])
    assert (report.wandb_runs, report.records, report.unfinished) == (1, 1, {})
    assert [twin.difference for twin in report.duplicates] == [0.0]
    remote, _ = collect([PROJECT])
    for column in RESULT_COLUMNS:
        assert remote[column].equals(table[column]), column


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
