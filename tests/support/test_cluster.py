"""What a launcher's environment says, and what is refused when the configuration says otherwise."""

from __future__ import annotations

import stat
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from llada_lightning.support import cluster
from llada_lightning.support.cluster import Launch, agreed_launch, device_count, launched, requeue
from llada_lightning.support.errors import UserError


def torchrun(nodes: int, per_node: int, rank: int = 0) -> dict[str, str]:
    """The variables that torchrun sets for a worker."""
    sizes = {"WORLD_SIZE": nodes * per_node, "LOCAL_WORLD_SIZE": per_node, "RANK": rank, "LOCAL_RANK": rank % per_node}
    return {"TORCHELASTIC_RUN_ID": "none", **{name: str(value) for name, value in sizes.items()}}


def srun(nodes: int, tasks: int, rank: int = 0) -> dict[str, str]:
    """The variables that srun sets for a task."""
    values = {"NTASKS": tasks, "NNODES": nodes, "PROCID": rank, "LOCALID": rank % (tasks // nodes or 1), "STEP_ID": 0}
    return {"SLURM_JOB_ID": "4711", **{f"SLURM_{name}": str(value) for name, value in values.items()}}


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for name in list(os.environ):
        if name.startswith(("SLURM_", "TORCHELASTIC_")) or name in ("WORLD_SIZE", "MASTER_ADDR", "NODE_RANK"):
            monkeypatch.delenv(name)


def set_all(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def test_without_a_launcher_there_is_no_launch() -> None:
    assert launched() is None
    assert agreed_launch(2, 1) is None


@pytest.mark.parametrize("variables", [torchrun(2, 4, 5), srun(2, 8, 5)], ids=["torchrun", "srun"])
@pytest.mark.parametrize("devices", ["auto", -1, "-1", 4, "4", [0, 1, 2, 3], "0,1,2,3"])
@pytest.mark.parametrize("num_nodes", [1, 2])
def test_sizes_and_rank_follow_from_the_launcher(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], devices: Any, num_nodes: int
) -> None:
    set_all(monkeypatch, variables)
    launch = agreed_launch(devices, num_nodes)
    assert launch is not None
    assert (launch.per_node, launch.nodes, launch.processes) == (4, 2, 8)
    assert (launch.rank, launch.local_rank) == (5, 1)


@pytest.mark.parametrize("variables", [torchrun(2, 4), srun(2, 8)], ids=["torchrun", "srun"])
@pytest.mark.parametrize(("devices", "num_nodes", "said"), [(8, 1, "8 x 2 = 16"), ("auto", 3, "4 x 3 = 12")])
def test_a_disagreement_names_both_sizes_and_the_mend(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], devices: Any, num_nodes: int, said: str
) -> None:
    set_all(monkeypatch, variables)
    with pytest.raises(UserError) as refused:
        agreed_launch(devices, num_nodes)
    message = str(refused.value)
    assert message.startswith(f"trainer.devices x num_nodes: {said} processes configured, but ")
    assert "launched 4 x 2 = 8" in message
    assert "leave both settings out" in message
    assert "\n" not in message


def test_what_cannot_start_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"trainer.num_nodes: 2 given.*started by hand"):
        agreed_launch("auto", 2)
    set_all(monkeypatch, srun(2, 7))
    with pytest.raises(UserError, match="7 processes on 2 nodes"):
        agreed_launch("auto", 1)
    set_all(monkeypatch, srun(2, 8))
    monkeypatch.delenv("SLURM_STEP_ID")  # a job's script, beside its tasks
    with pytest.raises(UserError, match="put srun before llada"):
        agreed_launch("auto", 1)


def test_who_types_in_a_job_is_not_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(monkeypatch, {**srun(1, 8), "SLURM_JOB_NAME": "interactive"})
    assert launched() is None


def test_torchrun_within_a_slurm_job_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(monkeypatch, {**srun(2, 2), **torchrun(2, 4)})
    assert launched() == Launch("torchrun", processes=8, nodes=2, rank=0, local_rank=0)


@given(st.integers(1, 999))
def test_a_count_of_devices_is_that_count_however_it_is_written(count: int) -> None:
    ids = list(range(count))
    assert {device_count(form) for form in (count, str(count), ids, tuple(ids))} == {count}
    assert count == 1 or device_count(",".join(map(str, ids))) == count


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in that writes down how it was called."""
    log, program = tmp_path / "scontrol.log", tmp_path / "scontrol"
    program.write_text(f'#!/bin/bash\necho "$*" >> {log}\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return log


@pytest.mark.parametrize(
    ("variables", "asked"),
    [
        (srun(1, 1), "requeue 4711\n"),
        ({**srun(1, 1), "SLURM_ARRAY_JOB_ID": "47", "SLURM_ARRAY_TASK_ID": "3"}, "requeue 47_3\n"),
        (srun(1, 2, rank=1), None),
        ({**srun(1, 1), **torchrun(1, 2, rank=1)}, None),
        (torchrun(1, 1), None),
    ],
    ids=["job", "array", "second process", "second process of torchrun", "no SLURM"],
)
def test_the_first_process_requeues_its_job(
    scontrol: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], asked: str | None
) -> None:
    set_all(monkeypatch, variables)
    requeue()
    assert (scontrol.read_text() if scontrol.exists() else None) == asked


def test_a_job_that_cannot_be_requeued_says_so(
    scontrol: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    set_all(monkeypatch, srun(1, 1))
    program = scontrol.with_name("scontrol")
    program.write_text("#!/bin/bash\necho 'slurm: Job is not requeueable' >&2\nexit 1\n")
    subprocess.run(["bash", "-n", str(program)], check=True)
    requeue()
    assert "4711 was not requeued: slurm: Job is not requeueable" in capsys.readouterr().err
    program.unlink()
    requeue()
    assert "4711 was not requeued" in capsys.readouterr().err


def test_the_other_processes_stay_until_the_job_is_requeued(monkeypatch: pytest.MonkeyPatch) -> None:
    """srun ends all processes when one leaves: with them the first one's talk with SLURM."""
    store, order = dist.HashStore(), []
    first = threading.current_thread()

    def rank() -> int:
        return int(threading.current_thread() is not first)

    monkeypatch.setattr(cluster, "_shared_store", lambda: store)
    monkeypatch.setattr(cluster, "requeue", lambda: order.append(f"requeue of {rank()}"))
    monkeypatch.setattr(cluster, "launched", lambda: Launch("srun", 2, 1, rank(), rank()))
    other = threading.Thread(target=lambda: (cluster.requeue_together(), order.append("the other left")))
    other.start()
    cluster.requeue_together()
    other.join(30)
    assert order.index("the other left") > order.index("requeue of 0")
