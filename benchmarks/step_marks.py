"""A callback that notes when the parts of a fit begin and end; in a module of its own, to be named to a fit."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer


class StepMarks(Callback):
    """Appends a line of JSON, name and the clock's time, at each of these moments.

    `read`: the command line is read and everything imported; `training`: model and data are there; `first_step` and
    `last_step`: over; `fitted`: the last checkpoint is written; `validated`.

    Args:
        path: of the file.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self._mark("read")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._mark("training")

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *arguments: Any) -> None:
        if trainer.global_step == 1:
            self._mark("first_step")
        if trainer.global_step == trainer.max_steps:
            self._mark("last_step")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._mark("fitted")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "validate":
            self._mark("validated")

    def _mark(self, name: str) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"name": name, "time": time.time()}) + "\n")
