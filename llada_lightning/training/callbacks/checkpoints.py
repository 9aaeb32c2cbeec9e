"""When a run writes its checkpoints, and which ones stay; each appears under its name whole or not at all."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.distributed.checkpoint.api import CheckpointException

from llada_lightning.checkpoints.run_folder import (
    PARTIAL,
    checkpoint_of_step,
    checkpoints_by_step,
    discard,
    is_sharded,
    put_in_place,
    read_sharded,
    refusing_strangers,
)
from llada_lightning.support.errors import UserError
from llada_lightning.support.signals import say
from llada_lightning.training.lightning_internals import run_validation, writes_shards
from llada_lightning.training.parallel import Agreement

BEST = "best.ckpt"
"""A link to the checkpoint with the lowest validation loss."""
DAMAGED = ".damaged"
"""Ends the name of a checkpoint that was found damaged, and set aside."""


class StepCheckpoints(Checkpoint):
    """Checkpoints by steps and by time, at the end, and where a signal asks the run to leave.

    A checkpoint is written when all of its step is: after the step's validation, if it has one, and after its row of
    metrics.csv. So a run that resumes from it misses nothing in its record. Where a signal cuts a validation short, the
    step is saved at once, and its validation is made up for before the run continues.

    Args:
        folder: The folder of the checkpoints.
        every_steps: The number of steps between checkpoints.
        every_seconds: The longest time between checkpoints; None: only the steps count.
        keep: The number of last checkpoints that are kept.
        keep_best: Whether the one with the lowest validation loss is kept, too; `best.ckpt` is a link to it.
        forks: The steps whose checkpoints are kept beside these, because branches start there.
    """

    def __init__(
        self,
        folder: Path,
        every_steps: int,
        every_seconds: float | None = None,
        keep: int = 2,
        keep_best: bool = False,
        forks: frozenset[int] = frozenset(),
    ) -> None:
        self._folder, self._forks = folder, forks
        self._every_steps, self._every_seconds = every_steps, every_seconds
        self._keep, self._keep_best = keep, keep_best
        self._best: tuple[int, float] | None = None
        self._validation_due = False
        self._step = self._saved = 0
        self._agreement = Agreement()
        self._last_save = time.monotonic()
        self._due = False

    def state_dict(self) -> dict[str, Any]:
        return {"best": self._best, "validation_due": self._validation_due}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        best = state_dict["best"]
        self._best = None if best is None else (best[0], best[1])
        self._validation_due = state_dict["validation_due"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step = trainer.global_step
        self._saved = self._step if checkpoint_of_step(self._folder, self._step).exists() else -1
        self._last_save = time.monotonic()
        if self._every_seconds is not None:
            self._agreement.begin(trainer)
        if trainer.is_global_zero:
            self._clear()
        if self._validation_due:
            run_validation(trainer)

    def _clear(self) -> None:
        """Remove what was being written, and set aside what lies behind this run's start: it was found damaged."""
        for leftover in self._folder.glob(f"*{PARTIAL}"):
            discard(leftover)
        for step, checkpoint in checkpoints_by_step(self._folder).items():
            if step > self._step:
                aside = checkpoint.with_name(checkpoint.name + DAMAGED)
                discard(aside)
                os.replace(checkpoint, aside)

    def on_train_batch_end(self, trainer: Trainer, *arguments: Any) -> None:
        if trainer.global_step == self._step:  # within a global batch
            return
        self._step = trainer.global_step
        self._due = self._step % self._every_steps == 0
        if self._every_seconds is not None:  # all processes take part in the agreement
            time_is_up = time.monotonic() - self._last_save >= self._every_seconds
            self._due = bool(self._agreement.maximum(int(time_is_up))) or self._due
        batches = self._step * trainer.accumulate_grad_batches
        self._validation_due = batches % int(trainer.val_check_interval) == 0
        if self._due and not self._validation_due:
            self._save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        loss = float(pl_module.validation["val_nats_per_token"])  # type: ignore[index]
        better = self._keep_best and loss < (math.inf if self._best is None else self._best[1])
        step = self._step
        if better:
            self._best = (step, loss)
        if trainer.state.fn == "fit":
            self._validation_due = False
            if self._due or better or self._saved == step:  # saved without its validation, which is made up for now
                self._save(trainer)
        if better and trainer.is_global_zero:
            _link_best(checkpoint_of_step(self._folder, step))
            self._prune(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._saved != trainer.global_step:
            self._save(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """A signal: Lightning lets the step, or the validation's batch, end on all ranks, and the step is saved."""
        if isinstance(exception, SIGTERMException) and trainer.state.fn == "fit" and trainer.global_step > 0:
            self._validation_due = self._validation_due and bool(trainer.validating)
            self.on_train_end(trainer, pl_module)
            if trainer.is_global_zero:
                print(f"saved step {trainer.global_step}; the same command resumes from there", file=sys.stderr)

    def _save(self, trainer: Trainer) -> None:
        for logger in trainer.loggers:
            logger.save()
        target = checkpoint_of_step(self._folder, trainer.global_step)
        if writes_shards(trainer.strategy):
            partial = target.with_name(target.name + PARTIAL)
            with _written_or_gone(partial, target):
                trainer.save_checkpoint(partial)  # ends when all processes have written
            if trainer.is_global_zero:
                put_in_place(partial, target)
            trainer.strategy.barrier()
        else:
            trainer.save_checkpoint(target)
        self._saved, self._due, self._last_save = trainer.global_step, False, time.monotonic()
        if trainer.is_global_zero:
            self._prune(trainer)

    def _prune(self, trainer: Trainer) -> None:
        by_step = checkpoints_by_step(self._folder)
        kept = {*sorted(by_step)[-self._keep :], *self._forks}
        if self._keep_best and self._best is not None:
            kept.add(self._best[0])
        guard = getattr(trainer.lightning_module, "guard", None)
        if guard is not None:  # while updates are skipped, the last one from before that stays
            kept.add(max((step for step in by_step if step <= guard.last_update), default=-1))
        for step in by_step.keys() - kept:
            discard(by_step[step])


def _link_best(checkpoint: Path) -> None:
    """Let `best.ckpt` be a link to a checkpoint beside it; where links cannot be, say which one is the best."""
    link = checkpoint.with_name(BEST)
    temporary = checkpoint.with_name(BEST + PARTIAL)
    try:
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(checkpoint.name)
        os.replace(temporary, link)
    except OSError as error:
        say(f"note: {link} cannot be a link ({error.strerror}); the lowest validation loss is {checkpoint.name}'s")


class AtomicCheckpointIO(TorchCheckpointIO):
    """A checkpoint appears whole or not at all; one in shards is read as a file would be; nothing in it is run."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        target = Path(path)
        partial = target.with_name(target.name + PARTIAL)
        with _written_or_gone(partial, target):
            target.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            put_in_place(partial, target)

    def load_checkpoint(self, path: Any, *arguments: Any, **keywords: Any) -> dict[str, Any]:
        with refusing_strangers(Path(path)):
            if is_sharded(Path(path)):
                return read_sharded(Path(path))
            return torch.load(path, map_location="cpu", weights_only=True)

    def remove_checkpoint(self, path: Any) -> None:
        discard(Path(path))


@contextmanager
def _written_or_gone(partial: Path, target: Path) -> Iterator[None]:
    """A checkpoint that the disk does not take leaves nothing behind but the ones before it."""
    try:
        yield
    except (OSError, RuntimeError, CheckpointException) as error:
        # torch's writers raise errors about their own state, with the error of the disk as their context.
        seen: BaseException | None = error
        if isinstance(error, CheckpointException):
            seen = next(iter(error.failures.values()))[0]
        while seen is not None and not isinstance(seen, OSError):
            seen = seen.__cause__ or seen.__context__
        if seen is None:
            raise
        discard(partial)
        raise UserError(
            f"checkpoint: '{target}' cannot be written ({seen.strerror}); the ones before it are whole: free space "
            "or repair the folder, and the same command resumes from the last of them"
        ) from error
