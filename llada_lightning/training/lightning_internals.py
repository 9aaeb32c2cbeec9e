"""The private names of Lightning that the package relies on, all in this file. Seen in Lightning 2.6."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lightning import Trainer
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher


class HookedCLI(LightningCLI):
    """LightningCLI with public names for the steps that it keeps private."""

    def set_seed(self) -> None:
        """Seed the process before anything is built."""
        raise NotImplementedError

    def subcommand_arguments(self, subcommand: str, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The keyword arguments of the Trainer's method, from those that LightningCLI has prepared."""
        raise NotImplementedError

    def run_subcommand(self, subcommand: str) -> None:
        """Run what was asked for, when everything is built."""
        super()._run_subcommand(subcommand)

    def _parse_ckpt_path(self) -> None:
        """A checkpoint's hyperparameters never replace what the user wrote: they are compared with it on loading."""

    def _set_seed(self) -> None:
        self.set_seed()

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        return self.subcommand_arguments(subcommand, super()._prepare_subcommand_kwargs(subcommand))

    def _run_subcommand(self, subcommand: str) -> None:
        self.run_subcommand(subcommand)


def leave_at_the_steps_end(trainer: Trainer) -> None:
    """Let Lightning leave after the step that it is in, as it does after SIGTERM."""
    trainer._signal_connector.received_sigterm = True


def replace_sigterm_check(trainer: Trainer, check: Callable[[], None]) -> None:
    """Replace what Lightning does before each micro-batch to learn whether another process received SIGTERM.

    It asks rank 0's device and waits for its queue to run dry.
    """
    loop = trainer.fit_loop.epoch_loop
    if hasattr(loop, "_broadcast_sigterm_tensor"):
        loop._broadcast_sigterm_tensor = check  # type: ignore[method-assign]


@contextmanager
def keeping_the_logs_place(trainer: Trainer) -> Iterator[None]:
    """Let a loop run within another one without changing whether the outer one is in its first iteration."""
    connector = trainer._logger_connector
    first = connector._first_loop_iter
    yield
    connector._first_loop_iter = first


def replaces_samplers(trainer: Trainer) -> bool:
    """Whether the Trainer puts distributed samplers in place of those of the data."""
    return trainer._accelerator_connector.use_distributed_sampler


def writes_shards(strategy: Strategy) -> bool:
    """Whether each process writes its part of a checkpoint, which then is a folder."""
    return isinstance(strategy, ModelParallelStrategy) and strategy._save_distributed_checkpoint


def forks_processes(strategy: Strategy) -> bool:
    """Whether the strategy spawns or forks its processes instead of starting commands."""
    return isinstance(strategy.launcher, _MultiProcessingLauncher)
