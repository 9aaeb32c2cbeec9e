"""Callbacks of Lightning and of users beside ours: what they wait for, and what they raise."""

from __future__ import annotations

import traceback
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from llada_lightning.support.errors import UserError
from llada_lightning.support.printing import shortened
from llada_lightning.training.record import VALIDATION_METRICS


def check_monitors(trainer: Trainer, module: LightningModule) -> None:
    """Refuse callbacks that wait for a metric that nobody logs, before the first step.

    A class of the user's own may log further metrics, so the metrics are known only where there is none.

    Args:
        trainer: With its callbacks.
        module: The model.

    Raises:
        UserError: names the callback, the metric and those that there are.
    """
    callbacks = [callback for callback in _callbacks(trainer) if hasattr(callback, "monitor")]
    if not all(_package(part) in ("llada_lightning", "lightning") for part in (module, *_callbacks(trainer))):
        return
    for callback in callbacks:
        monitor = callback.monitor
        if monitor is not None and monitor not in VALIDATION_METRICS and not str(monitor).startswith("lr-"):
            raise UserError(
                f"trainer.callbacks: {type(callback).__name__} monitors '{shortened(monitor)}', which is not logged; "
                f"the metrics are {', '.join(VALIDATION_METRICS)}"
            )


def fault_of_a_callback(error: Exception) -> str | None:
    """What a callback beside ours refuses, as one line; None for an error that has another origin.

    Lightning's callbacks raise errors of many types for settings that do not fit. Of a user's callback only a
    RuntimeError is a refusal: others are faults of its code, which the traceback shows.

    Args:
        error: What the trainer raised.
    """
    if isinstance(error, (UserError, OSError)):
        return None
    for frame, line in traceback.walk_tb(error.__traceback__):
        owner = frame.f_locals.get("self")
        if not isinstance(owner, Callback) or _package(owner) == "llada_lightning":
            continue
        if _package(owner) == "lightning" or isinstance(error, (RuntimeError, MisconfigurationException)):
            where = "" if _package(owner) == "lightning" else f" ({frame.f_code.co_filename}, line {line})"
            return f"trainer.callbacks: {type(owner).__name__}{where}: {shortened(error, 600)}"
    if isinstance(error, MisconfigurationException):
        return f"trainer: {shortened(error, 600)}"
    return None


def _callbacks(trainer: Trainer) -> list[Any]:
    return list(trainer.callbacks)  # type: ignore[attr-defined]


def _package(part: object) -> str:
    return type(part).__module__.split(".")[0]
