"""Tiny runs for the tests: in this process, or in one that kills itself."""

from __future__ import annotations

import csv
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, LightningModule, Trainer

from helpers.forked import run_command
from llada_lightning.commands.main import main
from llada_lightning.data.datamodule import TokenDataModule

MODELS = {"arm": "ArmModule", "llada": "LladaModule"}
"""The two objectives of the paper, and their modules."""
EVERY_MODEL = {**MODELS, "block": "BlockDiffusionModule", "uniform": "UniformDiffusionModule"}
SLOWER = [pytest.param(name, marks=pytest.mark.slow) for name in EVERY_MODEL if name != "llada"]
"""The others than `llada`, for tests of which one objective is enough in the fast suite."""
TESTS = Path(__file__).parents[1]


class KillAt(Callback):
    """Sends its own process, or the one of a rank only, a signal in the middle of the step after ``step``."""

    def __init__(self, step: int, name: str = "SIGKILL", rank: int | None = None) -> None:
        self.step, self.name, self.rank = step, name, rank

    def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        if trainer.global_step == self.step and self.rank in (None, trainer.global_rank):
            os.kill(os.getpid(), signal.Signals[self.name])


class KillAfter(Callback):
    """Kills its process with -9 right after ``step``, also where a graph makes the steps."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Trainer, *arguments: Any) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


class CallAt(Callback):
    """Calls one of :data:`CALLS`, in this process, in the middle of the step after ``step``."""

    def __init__(self, step: int, name: str) -> None:
        self.step, self.name = step, name

    def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        if trainer.global_step == self.step:
            CALLS[self.name]()


CALLS: dict[str, Callable[[], None]] = {}
"""What tests want to happen in the middle of a step."""


class KillInValidation(Callback):
    """Kills its process with -9 in the validation after ``step``."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_validation_batch_end(self, trainer: Trainer, *arguments: Any) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


class SignalInValidation(Callback):
    """Sends its process SIGTERM in the second batch of the validation after ``step``."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_validation_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step and batch_idx == 1:
            os.kill(os.getpid(), signal.SIGTERM)


def fit_arguments(objective: str, data: Path, root: Path, *extra: str) -> list[str]:
    """A run of 24 steps of 8 sequences of 32 tokens in fp32; `extra` overrides."""
    return [
        "fit",
        f"--model={EVERY_MODEL[objective]}",
        "--model.shape={n_layers: 2, d_model: 32, n_heads: 2, n_kv_heads: 1, d_ff: 64}",
        "--model.schedule.lr=0.01",
        f"--data.path={data}",
        "--data.sequence_length=32",
        "--data.global_batch=8",
        "--data.val_sequences=24",
        "--data.random_length_share=0.1",
        "--trainer.max_steps=24",
        "--trainer.accelerator=cpu",
        "--trainer.precision=32-true",
        "--trainer.log_every_n_steps=1",
        f"--run.root={root}",
        "--run.study=test",
        "--run.name=run",
        "--run.checkpoint_every_steps=5",
        *extra,
    ]


def fit(objective: str, data: Path, root: Path, *extra: str) -> Path:
    """Fit in this process; returns the run's folder."""
    assert main(fit_arguments(objective, data, root, *extra)) == 0
    return root / "test" / "run"


def fit_process(
    objective: str, data: Path, root: Path, *extra: str, variables: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Fit in a forked process for each device."""
    argv = fit_arguments(objective, data, root, *extra)
    if variables is not None and "SLURM_NTASKS" in variables:
        return run_processes(argv, 1, variables)
    devices = [int(word.partition("=")[2]) for word in extra if word.startswith("--trainer.devices=")]
    return run_processes(argv, max([1, *devices]), variables)


def run_processes(argv: list[str], count: int, variables: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    """Run `llada` in forked processes: one, or several with the variables that Lightning sets for those it starts."""
    environment = child_environment() | (variables or {})
    if count == 1:
        return run_command(argv, environment)
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "NODE_RANK": "0"}
    environment["WORLD_SIZE"] = str(count)
    return run_command(argv, *({**environment, "LOCAL_RANK": str(rank)} for rank in range(count)))


def fit_command(
    objective: str, data: Path, root: Path, *extra: str, variables: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Fit as a user starts it: a new interpreter, which starts those of the other devices."""
    command = [sys.executable, "-m", "llada_lightning", *fit_arguments(objective, data, root, *extra)]
    environment = child_environment() | (variables or {})
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)


def child_environment() -> dict[str, str]:
    """As ours, with this folder and the package under test to be imported."""
    paths = [str(TESTS), str(TESTS.parent)]
    ours = {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "LLADA_TRUSTED_MODULES": "helpers"}
    return {**os.environ, **ours}


def free_port() -> int:
    """A port of loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def kill_at(step: int, name: str = "SIGKILL", rank: int | None = None) -> str:
    """The argument that adds :class:`KillAt`."""
    arguments = f"{{step: {step}, name: {name}, rank: {'null' if rank is None else rank}}}"
    return f"--trainer.callbacks=[{{class_path: helpers.tiny_runs.KillAt, init_args: {arguments}}}]"


def kill_after(step: int) -> str:
    """The argument that adds :class:`KillAfter`."""
    return f"--trainer.callbacks=[{{class_path: helpers.tiny_runs.KillAfter, init_args: {{step: {step}}}}}]"


def call_at(step: int, name: str) -> str:
    """The argument that adds :class:`CallAt`."""
    return f"--trainer.callbacks=[{{class_path: helpers.tiny_runs.CallAt, init_args: {{step: {step}, name: {name}}}}}]"


def metrics(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def losses(folder: Path) -> list[float]:
    """The training loss of every step, in order."""
    return [float(row["train_nats_per_token"]) for row in metrics(folder)]


def weights(folder: Path, step: int = 24) -> dict[str, torch.Tensor]:
    """On the CPU, wherever the run was."""
    return torch.load(folder / "checkpoints" / f"step={step:08d}.ckpt", map_location="cpu")["state_dict"]


OF_THE_MOMENT = {"tokens_per_second", "mfu", "wall_seconds", "git_commit"}
"""The keys of result.json that a clock decides, and the state of the checkout, which may change while tests run; all
others are the same for every run of one configuration."""


def timeless(folder: Path) -> list[dict[str, Any]]:
    """The records of result.json without what the moment decides."""
    records = json.loads((folder / "result.json").read_text())
    return [{key: value for key, value in each.items() if key not in OF_THE_MOMENT} for each in records]


def record(folder: Path) -> dict[str, Any]:
    [found] = json.loads((folder / "result.json").read_text())
    return found


def validation_tokens(data: Path, count: int) -> list[list[int]]:
    """The first validation sequences of a tiny run, 32 tokens each."""
    module = TokenDataModule(str(data), sequence_length=32)
    return module._stream("val", 0, module.weights, module.manifests).tokens(list(range(count))).tolist()
