"""LightningCLI and its parser with public names and errors of one line, and the private names of Lightning that the
package relies on, all in this file. Seen in Lightning 2.6."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NoReturn

from lightning import Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.trainer import call
from torch.optim import Optimizer

from llada_lightning.support.command_line import one_line
from llada_lightning.support.errors import UserError
from llada_lightning.support.jsonargparse_internals import option_names


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


class OneLineParser(LightningArgumentParser):
    """A parser whose errors are UserErrors of one line, and that takes no abbreviated keys."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise UserError(_with_its_help(one_line(message, "llada fit", option_names(self)))) from ex


def _with_its_help(line: str) -> str:
    """A message that ends with where the options are listed, with the list that holds the setting which it begins with.

    The arguments of a class are in no `--help` of the command; each class has its own.
    """
    setting = re.match(r"(?:unrecognized arguments: --)?(data|model)(?:\.|: Option)", line)
    if setting is None:
        return line
    kind = {"data": "TokenDataModule", "model": "LladaModule"}[setting[1]]
    return line.replace("see 'llada fit --help'", f"see 'llada fit --{setting[1]}.help {kind}'")


def class_first(args: list[str]) -> list[str]:
    """The arguments with each `--model=NAME` before its `--model.…`: the parser needs the class before its settings,
    and a sweep's agent hands arguments over in an order of its own."""
    args = list(args)
    for key in ("--model", "--data"):
        named = next((i for i, arg in enumerate(args) if arg.startswith(f"{key}=")), None)
        setting = next((i for i, arg in enumerate(args) if arg.startswith(f"{key}.")), None)
        if named is not None and setting is not None and setting < named:
            args.insert(setting, args.pop(named))
    return args


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


def call_before_optimizer_step(trainer: Trainer, optimizer: Optimizer) -> None:
    """Tell callbacks and module that a step is about to be made, as Lightning does before its own."""
    call._call_callback_hooks(trainer, "on_before_optimizer_step", optimizer)
    call._call_lightning_module_hook(trainer, "on_before_optimizer_step", optimizer)


def run_validation(trainer: Trainer) -> None:
    """Validate between two steps, as Lightning does at its intervals.

    A loop that runs within another one must not change whether the outer one is in its first iteration.
    """
    connector = trainer._logger_connector
    first = connector._first_loop_iter
    trainer.validating = True
    trainer.fit_loop.epoch_loop.val_loop.run()
    trainer.training = True
    connector._first_loop_iter = first


def replaces_samplers(trainer: Trainer) -> bool:
    """Whether the Trainer puts distributed samplers in place of those of the data."""
    return trainer._accelerator_connector.use_distributed_sampler


def without_anonymous(logger: WandbLogger) -> None:
    """Leave out a setting that Lightning hands to W&B in any case, and of which W&B warns that it has no effect."""
    logger._wandb_init.pop("anonymous", None)


def writes_shards(strategy: Strategy) -> bool:
    """Whether each process writes its part of a checkpoint, which then is a folder."""
    return isinstance(strategy, ModelParallelStrategy) and strategy._save_distributed_checkpoint


def forks_processes(strategy: Strategy) -> bool:
    """Whether the strategy spawns or forks its processes instead of starting commands."""
    return isinstance(strategy.launcher, _MultiProcessingLauncher)
