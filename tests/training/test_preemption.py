"""A job of SLURM that is about to end saves its step and asks to be requeued; srun and scontrol are stand-ins."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers.tiny_runs import fit, fit_process, kill_at, losses, record, weights


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """The variables of a job's only task, and a `scontrol` that writes down its words and what is saved by then."""
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f"#!/bin/bash\n(echo \"$*\"; ls '{tmp_path}/job/test/run/checkpoints') > '{tmp_path}/asked'\n")
    scontrol.chmod(0o755)
    numbers = {"JOB_ID": 4711, "NTASKS": 1, "NNODES": 1, "NTASKS_PER_NODE": 1, "PROCID": 0, "LOCALID": 0, "NODEID": 0}
    variables = {f"SLURM_{name}": str(value) for name, value in numbers.items()}
    return {**variables, "SLURM_STEP_ID": "0", "PATH": f"{scontrol.parent}:{os.environ['PATH']}"}


def test_a_warned_job_saves_its_step_requeues_and_goes_on(
    prepared: Path, tmp_path: Path, slurm: dict[str, str]
) -> None:
    whole = fit("llada", prepared, tmp_path / "whole")
    warned = fit_process("llada", prepared, tmp_path / "job", kill_at(13, "SIGUSR1"), variables=slurm)
    assert warned.returncode == 138, warned.stderr
    assert "saved step 14; the same command resumes from there" in warned.stderr
    assert "requeued SLURM job 4711" in warned.stderr
    command, *saved = (tmp_path / "asked").read_text().splitlines()
    assert command == "requeue 4711"
    assert saved == ["step=00000010.ckpt", "step=00000014.ckpt"]  # and nothing half-written
    again = fit_process("llada", prepared, tmp_path / "job", variables=slurm)
    assert again.returncode == 0, again.stderr
    folder = tmp_path / "job" / "test" / "run"
    assert losses(folder) == losses(whole)
    assert record(folder)["val_nats_per_token"] == record(whole)["val_nats_per_token"]
    assert all((weights(folder)[key] == value).all() for key, value in weights(whole).items())
    assert not list(tmp_path.rglob("hpc_ckpt*"))  # Lightning's own checkpoints from within its handler


OFFLINE = ("--wandb.project=test", "--wandb.offline=true")


def wandb_records(file: Path) -> Iterator[Any]:
    """The records of an offline run: LevelDB's log format behind seven bytes."""
    from wandb.proto import wandb_internal_pb2

    data, at, parts = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        in_block = 32768 - at % 32768
        if in_block < 7:  # too short for a header, so padding
            at += in_block
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        parts += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or a last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


def logged(folder: Path, kind: str) -> list[Any]:
    """The records of a kind, of all starts of a run in order."""
    files = sorted((folder / "wandb").glob("offline-run-*/*.wandb"))
    found = [record for file in files for record in wandb_records(file) if record.WhichOneof("record_type") == kind]
    return [getattr(record, kind) for record in found]


@pytest.mark.slow
def test_a_requeued_run_goes_on_in_its_wandb_run(prepared: Path, tmp_path: Path, slurm: dict[str, str]) -> None:
    pytest.importorskip("wandb")
    warned = fit_process("arm", prepared, tmp_path / "job", *OFFLINE, kill_at(3, "SIGUSR1"), variables=slurm)
    assert warned.returncode == 138, warned.stderr
    fit_process("arm", prepared, tmp_path / "job", *OFFLINE, variables=slurm)
    folder = tmp_path / "job" / "test" / "run"
    assert [(run.run_id, run.run_group) for run in logged(folder, "run")] == [(record(folder)["run"], "test")] * 2
    assert [leave.exit_code for leave in logged(folder, "exit")] == [1, 0]
    assert not logged(folder, "preempting")


def test_a_sweeps_run_tells_wandb_that_it_is_preempted(prepared: Path, tmp_path: Path, slurm: dict[str, str]) -> None:
    """W&B hands a run that leaves so to the next agent that asks."""
    pytest.importorskip("wandb")
    agents = {**slurm, "WANDB_SWEEP_ID": "swp", "WANDB_RUN_ID": "abc"}
    fit_process("arm", prepared, tmp_path / "job", *OFFLINE, kill_at(3, "SIGUSR1"), variables=agents)
    folder = tmp_path / "job" / "test" / "run"
    assert [run.run_id for run in logged(folder, "run")] == ["abc"]
    assert len(logged(folder, "preempting")) == 1
    assert [leave.exit_code for leave in logged(folder, "exit")] == [1]


def test_a_cancelled_job_saves_its_step_and_stays_cancelled(
    prepared: Path, tmp_path: Path, slurm: dict[str, str]
) -> None:
    cancelled = fit_process("arm", prepared, tmp_path / "job", kill_at(3, "SIGTERM"), variables=slurm)
    assert cancelled.returncode == 143, cancelled.stderr
    assert "saved step 4" in cancelled.stderr
    assert not (tmp_path / "asked").exists()


def test_an_allocation_that_disagrees_is_refused_before_anything_is_written(
    prepared: Path, tmp_path: Path, slurm: dict[str, str]
) -> None:
    done = fit_process("arm", prepared, tmp_path / "job", "--trainer.devices=2", variables=slurm)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "error: trainer.devices x num_nodes: 2 x 1 = 2 processes configured, but srun launched 1 x 1 = 1; launch as "
        "many, or leave both settings out"
    ]
    assert not (tmp_path / "job").exists()
