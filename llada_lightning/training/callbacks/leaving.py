"""All processes of a run leave at the same step, whichever of them was asked to."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

from llada_lightning.support.signals import SIGNALS, LeaveRequest
from llada_lightning.training.lightning_internals import leave_at_the_steps_end, replace_sigterm_check
from llada_lightning.training.parallel import Agreement


class LeaveTogether(Callback):
    """Agrees at each step's end, and at each validation batch's, on whether a signal asked any process to leave.

    Lightning then ends the run with a ``SIGTERMException`` in every process.

    Args:
        request: The request that the signal handlers of this process fill in.
    """

    def __init__(self, request: LeaveRequest) -> None:
        self._request = request
        self._agreement = Agreement()
        self._step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step = trainer.global_step
        _spare_lightnings_own(trainer)
        self._begin(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin(trainer)

    def _begin(self, trainer: Trainer) -> None:
        self._request.install()
        self._agreement.begin(trainer)

    def on_train_batch_end(self, trainer: Trainer, *arguments: Any) -> None:
        if trainer.global_step != self._step:
            self._step = trainer.global_step
            self._agree(trainer)

    def on_validation_batch_end(self, trainer: Trainer, *arguments: Any) -> None:
        self._agree(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """W&B gives a run that it knows to be preempted to the next agent of its sweep."""
        wandb = sys.modules.get("wandb")  # a branch has no logger of its own, but the run has
        if isinstance(exception, SIGTERMException) and "WANDB_SWEEP_ID" in os.environ and wandb and wandb.run:
            with suppress(Exception):  # W&B is never in the way
                wandb.run.mark_preempting()

    def _agree(self, trainer: Trainer) -> None:
        received = self._request.received
        strongest = self._agreement.maximum(-1 if received is None else SIGNALS.index(received))
        if strongest >= 0:
            self._request.agreed = SIGNALS[strongest]
            leave_at_the_steps_end(trainer)


def _spare_lightnings_own(trainer: Trainer) -> None:
    """Lightning 2.6 asks rank 0's device before each micro-batch whether to leave, and waits for its queue to run dry;
    here all processes have agreed before, without the device."""

    def leave_as_agreed() -> None:
        if trainer.received_sigterm:
            raise SIGTERMException

    replace_sigterm_check(trainer, leave_as_agreed)
