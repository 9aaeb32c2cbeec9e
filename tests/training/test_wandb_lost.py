"""W&B goes away in the middle of a run, in several ways: the run does not care, and what W&B had stays on disk."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from test_preemption import wandb_records

from helpers import tiny_runs
from helpers.tiny_runs import call_at, fit, metrics, record
from helpers.wandb_standin import WandbStandIn
from llada_lightning.training.callbacks import loggers as wandb_log

pytest.importorskip("wandb")
SHORT = ("--wandb.project=study", "--trainer.max_steps=6")


@pytest.fixture(autouse=True)
def _in_the_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fit runs in this process, and its callback reads the calls of the module that it imports."""
    monkeypatch.setattr(tiny_runs, "CALLS", {})
    monkeypatch.setattr(wandb_log, "FINISH_TIMEOUT_SECONDS", 1.0)


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
