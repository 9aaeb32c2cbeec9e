"""Bad numbers for the tests: put into a run's steps as faulty hardware or data would."""

from __future__ import annotations

import math
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer

from llada_lightning.objectives.batches import TrainingBatch


class Poison(Callback):
    """Makes the losses of the steps ``losses`` NaN (of `llada`, by the mask probability), some gradients of the steps
    ``gradients`` infinite, after ranks have averaged them, the clip of the steps ``clips`` NaN, and a weight NaN after
    the steps ``weights``; on one rank only, or on all."""

    def __init__(
        self,
        losses: list[int] = [],  # noqa: B006
        gradients: list[int] = [],  # noqa: B006
        clips: list[int] = [],  # noqa: B006
        weights: list[int] = [],  # noqa: B006
        rank: int | None = None,
    ) -> None:
        self.losses, self.gradients, self.clips, self.weights, self.rank = losses, gradients, clips, weights, rank

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: TrainingBatch, *_: Any) -> None:
        if trainer.global_step + 1 in self.losses and self.rank in (None, trainer.global_rank):
            batch.p_B.fill_(math.nan)
        trainer.gradient_clip_val = math.nan if trainer.global_step + 1 in self.clips else 1.0

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step in self.weights and self.rank in (None, trainer.global_rank):
            with torch.no_grad():
                next(pl_module.parameters())[0] = math.nan

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step + 1 in self.gradients and self.rank in (None, trainer.global_rank):
            gradient = next(pl_module.parameters()).grad
            assert gradient is not None
            gradient.mul_(math.inf)


def poison(rank: int | None = None, **steps: tuple[int, ...]) -> str:
    """A callback's entry in a list of them."""
    lists = "".join(f"{name}: {list(given)}, " for name, given in steps.items())
    arguments = f"{lists}rank: {'null' if rank is None else rank}"
    return f"{{class_path: helpers.poison.Poison, init_args: {{{arguments}}}}}"


def callbacks(*entries: str) -> str:
    """The argument that adds them."""
    return f"--trainer.callbacks=[{', '.join(entries)}]"
