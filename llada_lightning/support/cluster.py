"""The processes of a run as a launcher (torchrun, srun) started them, and requests to SLURM.

A run's configuration may leave `trainer.devices` and `trainer.num_nodes` out: they follow from the launcher. Where it
names them, they must agree with what was launched.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from llada_lightning.support.errors import UserError
from llada_lightning.support.printing import shortened

INTERACTIVE_JOBS = ("bash", "interactive")
"""The names of SLURM jobs in which a person types commands. They are not launched by srun (also Lightning's rule)."""


@dataclass(frozen=True)
class Launch:
    """The processes of a run, as launched.

    Args:
        launcher: The launcher, `torchrun` or `srun`.
        processes: The number of processes on all nodes together.
        nodes: The number of nodes.
        rank: The rank of this process among all processes.
        local_rank: The rank of this process on its node.
    """

    launcher: str
    processes: int
    nodes: int
    rank: int
    local_rank: int

    @property
    def per_node(self) -> int:
        """The number of processes on each node.

        Raises:
            UserError: The processes cannot be spread evenly.
        """
        if self.processes % self.nodes:
            raise UserError(
                f"trainer.devices: {self.launcher} launched {self.processes} processes on {self.nodes} nodes, which is "
                "not the same number on each; ask for whole nodes (--ntasks-per-node)"
            )
        return self.processes // self.nodes


def launched() -> Launch | None:
    """Returns the launch that this process belongs to; None: a person started it.

    torchrun comes first, since it runs inside SLURM's jobs, too.

    Raises:
        UserError: A SLURM job of several tasks runs this beside srun, so the other tasks would be waited for in vain.
    """
    env = os.environ
    if "TORCHELASTIC_RUN_ID" in env:
        processes, per_node = _number("WORLD_SIZE"), _number("LOCAL_WORLD_SIZE")
        nodes = max(1, processes // per_node)
        return Launch("torchrun", processes, nodes, _number("RANK"), _number("LOCAL_RANK"))
    if "SLURM_NTASKS" not in env or env.get("SLURM_JOB_NAME") in INTERACTIVE_JOBS:
        return None
    processes = _number("SLURM_NTASKS")
    if processes > 1 and "SLURM_STEP_ID" not in env:
        raise UserError(
            f"SLURM_NTASKS: {processes} tasks allocated, but srun started none of them; put srun before llada"
        )
    nodes, rank, local_rank = _number("SLURM_NNODES", 1), _number("SLURM_PROCID", 0), _number("SLURM_LOCALID", 0)
    return Launch("srun", processes, nodes, rank, local_rank)


_SIZES = ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "SLURM_NTASKS", "SLURM_NNODES", "MASTER_PORT")
"""The environment variables that are whole numbers from 1 on."""
_RANKS = (
    "RANK", "LOCAL_RANK", "GROUP_RANK", "NODE_RANK", "SLURM_PROCID", "SLURM_LOCALID", "JSM_NAMESPACE_RANK",
)  # fmt: skip
"""The environment variables that are whole numbers from 0 on."""
_SET_BY_LIGHTNING = {"LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_PORT"}
"""The environment variables that Lightning sets for the processes that it starts itself."""


def _number(name: str, default: int | None = None) -> int:
    """The whole number that an environment variable holds.

    Raises:
        UserError: It holds something else, or is missing and has no default.
    """
    text, least = os.environ.get(name), 1 if name in _SIZES else 0
    if text is None and default is not None:
        return default
    if text is None or not re.fullmatch(r"\s*\d{1,9}\s*", text, re.ASCII) or int(text) < least:
        given = "not set" if text is None else f"{shortened(text, 40)!r} given"
        raise UserError(
            f"{name}: {given}; this environment variable must be a whole number of at least {least}: start the "
            "processes with torchrun or srun, which set it, or unset what is left of them"
        )
    return int(text)


def check_environment() -> None:
    """Refuses variables of launchers that are not numbers. Lightning reads some of them when it is imported.

    Raises:
        UserError: A variable is not a number; the message names it.
    """
    for name in (*_SIZES, *_RANKS):
        _number(name, 1)


def process_rank() -> int:
    """Returns the rank of this process in its run, by the launcher of this run; 0: no launcher started it.

    Variables such as RANK also exist in pods, in job scripts and under MPI, whose processes may each be a run.
    """
    try:
        launch = launched()
    except UserError:  # raised again where a run is about to start
        return 0
    if launch is not None:
        return launch.rank
    return _number("LOCAL_RANK") if os.environ.keys() >= _SET_BY_LIGHTNING else 0


def agreed_launch(devices: Any, num_nodes: int) -> Launch | None:
    """Returns the launch that this process belongs to, which must agree with the settings of the trainer.

    Args:
        devices: The setting of the configuration: a number, `auto`, or a list of devices.
        num_nodes: The setting of the configuration; 1 is Lightning's default, and counts as not set.

    Raises:
        UserError: Configuration and launch disagree.
    """
    check_environment()
    launch = launched()
    if launch is None:
        if num_nodes != 1 and "MASTER_ADDR" not in os.environ:
            raise UserError(
                f"trainer.num_nodes: {num_nodes} given, but one process was started by hand; start it on each node "
                "with torchrun or srun (experiments/cluster)"
            )
        return None
    count = device_count(devices)
    wanted = (launch.per_node if count is None else count, launch.nodes if num_nodes == 1 else num_nodes)
    if wanted != (launch.per_node, launch.nodes):
        raise UserError(
            f"trainer.devices x num_nodes: {wanted[0]} x {wanted[1]} = {wanted[0] * wanted[1]} processes configured, "
            f"but {launch.launcher} launched {launch.per_node} x {launch.nodes} = {launch.processes}; launch as many, "
            "or leave both settings out"
        )
    return launch


def device_count(devices: Any) -> int | None:
    """Returns the number of devices of a node that a setting of the trainer names; None: all devices."""
    if isinstance(devices, (list, tuple)):
        return len(devices)
    text = str(devices).strip()
    if text in ("auto", "-1"):
        return None
    return int(text) if re.fullmatch(r"\d+", text) else len([item for item in text.split(",") if item.strip()])


def requeue() -> None:
    """Asks SLURM to start this job again; only the first process does, and nothing happens outside of SLURM."""
    launch, job = launched(), os.environ.get("SLURM_JOB_ID")
    if job is None or launch is None or launch.rank != 0:
        return
    if "SLURM_ARRAY_JOB_ID" in os.environ:  # a bare number could mean all of an array's tasks
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True)
        refusal = done.stderr.strip() if done.returncode else None
    except OSError as error:
        refusal = str(error)
    said = f"requeued SLURM job {job}" if refusal is None else f"SLURM job {job} was not requeued: {refusal}"
    print(said, file=sys.stderr, flush=True)


def requeue_together(patience: timedelta = timedelta(seconds=60)) -> None:
    """:func:`requeue`; the other processes stay until it is done, since srun ends all when the first one leaves."""
    store, launch = _shared_store(), launched()
    requeue()
    if store is None or launch is None or launch.processes == 1:
        return
    with suppress(RuntimeError):  # the first process, which hosts the store, has left or takes too long
        if launch.rank == 0:
            store.set("llada/requeued", "1")
        store.wait(["llada/requeued"], patience)


def says_it(message: str) -> bool:
    """Returns whether this process reports a mistake, so that N processes with the same mistake report it once.

    The processes share no memory, but those that torchrun started, and those that train already, share a store:
    the first one that puts the message there reports it. Under srun, before training, one process of each node does:
    mistakes that differ, such as a missing folder, differ between nodes.

    Args:
        message: The message about the mistake.
    """
    store = _shared_store()
    if store is not None:
        try:
            return store.add(f"llada/{hashlib.sha256(message.encode()).hexdigest()}", 1) == 1
        except RuntimeError:  # its host has left
            return True
    try:
        launch = launched()
    except UserError:
        return True
    return launch is None or launch.local_rank == 0


def shared_answer(launch: Launch | None, question: str, answer: str) -> str:
    """Returns the answer of the first process in every process that torchrun launched; elsewhere the own answer.

    Before training only torchrun's processes share a store. Where srun launched them, the first one leaves alone and
    srun ends the others (`--kill-on-bad-exit`).

    Args:
        launch: The launch of this process.
        question: The name of the question, which is asked once a start.
        answer: The answer of this process; only that of the first process counts.
    """
    store = _shared_store()
    if store is None or launch is None or launch.processes == 1:
        return answer
    key = f"llada/{question}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    try:
        if launch.rank == 0:
            store.set(key, answer)
        return bytes(store.get(key)).decode()  # waits for it
    except RuntimeError:  # its host has left
        return answer


def _shared_store() -> Any:
    if "torch" not in sys.modules:
        return None
    import torch.distributed as dist

    if dist.is_initialized():
        from llada_lightning.support.torch_internals import default_store

        return default_store()
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        try:
            return dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
        except RuntimeError:
            return None
    return None
