"""Checkpoints: written to a temporary name and renamed, found again by step."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

from llada_lightning.checkpoints.run_folder import checkpoints_by_step
from llada_lightning.checkpoints.sharded_checkpoints import (
    PARTIAL,
    discard,
    is_sharded,
    put_in_place,
    read_sharded,
    refusing_strangers,
)
from llada_lightning.training.parallel import saves_shards


class AtomicCheckpointIO(TorchCheckpointIO):
    """A checkpoint appears whole or not at all; one in shards is read as a file would be; nothing in it is run."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(target.name + PARTIAL)
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


class StepCheckpoints(ModelCheckpoint):
    """The last ``keep`` checkpoints, every ``every_steps`` steps and at the end.

    A checkpoint is written when all of its step is: after the step's validation, if it has one, and after its row of
    metrics.csv. So a run that goes on from it misses nothing in its record.

    Args:
        folder: where they go.
        every_steps: steps between them.
        keep: the last ones to keep.
        forks: steps whose checkpoints stay beside these.
    """

    def __init__(self, folder: Path, every_steps: int, keep: int = 2, forks: frozenset[int] = frozenset()) -> None:
        self._every_steps, self._keep, self._forks = every_steps, keep, forks
        super().__init__(
            dirpath=folder,
            filename="step={step:08d}",
            auto_insert_metric_name=False,
            monitor="step",
            mode="max",
            save_top_k=-1,  # what to remove is decided by what lies in the folder, not by what this process has written
            every_n_train_steps=every_steps,
            save_on_train_epoch_end=False,
            enable_version_counter=False,
        )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        assert self.dirpath is not None
        for leftover in Path(self.dirpath).glob(f"*{PARTIAL}"):
            if trainer.is_global_zero:
                discard(leftover)

    def on_train_batch_end(self, trainer: Trainer, *arguments: Any) -> None:
        batches = trainer.global_step * trainer.accumulate_grad_batches
        if batches % int(trainer.val_check_interval):  # else the step's validation follows
            super().on_train_batch_end(trainer, *arguments)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and trainer.global_step % self._every_steps == 0:
            self.on_train_end(trainer, pl_module)

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        for logger in trainer.loggers:
            logger.save()
        if saves_shards(trainer.strategy):
            partial = filepath + PARTIAL
            super()._save_checkpoint(trainer, partial)  # ends when all processes have written
            if trainer.is_global_zero:
                put_in_place(Path(partial), Path(filepath))
            trainer.strategy.barrier()
            self._last_checkpoint_saved = filepath
        else:
            super()._save_checkpoint(trainer, filepath)
        self._prune(trainer, Path(filepath).parent)

    def _prune(self, trainer: Trainer, folder: Path) -> None:
        by_step = checkpoints_by_step(folder)
        for step in sorted(by_step)[: -self._keep]:
            self.best_k_models.pop(str(by_step[step]), None)
            if trainer.is_global_zero and step not in self._forks:
                discard(by_step[step])

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """SIGTERM: Lightning lets the step end, on all ranks, before it leaves; the step is saved.

        Within a validation it is saved, too, and the row of that validation is lost.
        """
        if isinstance(exception, SIGTERMException) and trainer.state.fn == "fit" and trainer.global_step > 0:
            self.on_train_end(trainer, pl_module)
            if trainer.is_global_zero:
                print(f"saved step {trainer.global_step}; the same command goes on from there", file=sys.stderr)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._last_global_step_saved != trainer.global_step:
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))
