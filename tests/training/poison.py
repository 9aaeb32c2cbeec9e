"""Bad numbers for the tests: put into a run's steps as faulty hardware or data would."""

from __future__ import annotations

import math
from typing import Any

from lightning import Callback, LightningModule, Trainer

from llada_lightning.data.batches import TrainingBatch


class Poison(Callback):
    """Makes the losses of the steps ``losses`` NaN (of `llada`, by the mask probability), and some gradients of the
    steps ``gradients`` infinite, after ranks have averaged them; on one rank only, or on all."""

    def __init__(self, losses: list[int] = [], gradients: list[int] = [], rank: int | None = None) -> None:  # noqa: B006
        self.losses, self.gradients, self.rank = losses, gradients, rank

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: TrainingBatch, *_: Any) -> None:
        if trainer.global_step + 1 in self.losses and self.rank in (None, trainer.global_rank):
            batch.p_B.fill_(math.nan)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step + 1 in self.gradients and self.rank in (None, trainer.global_rank):
            gradient = next(pl_module.parameters()).grad
            assert gradient is not None
            gradient.mul_(math.inf)


def poison(losses: tuple[int, ...] = (), gradients: tuple[int, ...] = (), rank: int | None = None) -> str:
    """A callback's entry in a list of them."""
    arguments = f"losses: {list(losses)}, gradients: {list(gradients)}, rank: {'null' if rank is None else rank}"
    return f"{{class_path: poison.Poison, init_args: {{{arguments}}}}}"


def callbacks(*entries: str) -> str:
    """The argument that adds them."""
    return f"--trainer.callbacks=[{', '.join(entries)}]"
