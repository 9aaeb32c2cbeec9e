"""One progress line: loss, bits/byte, tokens/s, MFU, percent of the budget, time left."""

from __future__ import annotations

import sys
import time
from collections import deque
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from llada_lightning.support.printing import people_console
from llada_lightning.training.callbacks.accounting import Accounting

_LOSSES = 10
"""Logged steps whose mean loss is shown."""
_LINES_WITHOUT_TERMINAL = 10


class BudgetProgress(ProgressBar):
    """A live line on a terminal; elsewhere about ten plain lines a run. All on stderr.

    Args:
        title: The name of the run: objective and shape.
        accounting: The callback that has the figures. It must come before this one.
    """

    def __init__(self, title: str, accounting: Accounting) -> None:
        super().__init__()
        self._title, self._accounting = title, accounting
        self._progress: Progress | None = None
        self._enabled = True
        self._losses: deque[float] = deque(maxlen=_LOSSES)
        self._shown: dict[str, float] | None = None

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._started, self._first_step = time.monotonic(), trainer.global_step
        self._next_line = trainer.global_step + self._line_every(trainer)
        if not self._enabled or not sys.stderr.isatty():
            return
        self._progress = Progress(
            TextColumn("{task.description}", style="bold", markup=False),
            BarColumn(bar_width=24),
            TaskProgressColumn("{task.percentage:>5.1f}%"),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=people_console(stderr=True),
        )
        self._task = self._progress.add_task(
            self._title, total=trainer.max_steps, completed=trainer.global_step, figures="starting"
        )
        self._progress.start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self._enabled:
            return
        last = self._accounting.last
        if last and last is not self._shown:
            self._shown = last
            self._losses.append(last["train_nats_per_token"])
        if self._progress is not None:
            self._progress.update(self._task, completed=trainer.global_step, figures=self._figures(trainer))
        elif self._shown and (trainer.global_step >= self._next_line or trainer.global_step == trainer.max_steps):
            self._next_line = trainer.global_step + self._line_every(trainer)
            self._print_line(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._progress is not None:
            self._progress.update(self._task, figures=f"{self._figures(trainer)} · validating")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._stop()
        if self._enabled and isinstance(exception, KeyboardInterrupt):
            print("stopped at once; the same command resumes from the last checkpoint", file=sys.stderr)

    def _stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _figures(self, trainer: Trainer) -> str:
        parts = [f"step {trainer.global_step}/{trainer.max_steps}"]
        if self._losses:
            loss = sum(self._losses) / len(self._losses)
            parts.append(f"training loss {loss:.3f} nats/token")
            data = getattr(trainer, "datamodule", None)
            bits = None if data is None else data.bits_per_byte(loss)
            if bits is not None:
                parts.append(f"{bits:.3f} bits/byte")
        if "tokens_per_second" in self._accounting.last:
            parts.append(f"{self._accounting.last['tokens_per_second']:,.0f} tokens/s")
        mfu = self._accounting.last.get("mfu")
        parts.append("MFU n/a" if mfu is None else f"MFU {100 * mfu:.1f}%")
        return " · ".join(parts)

    def _print_line(self, trainer: Trainer) -> None:
        done = trainer.global_step - self._first_step
        left = (time.monotonic() - self._started) / done * (trainer.max_steps - trainer.global_step)
        percent = 100 * trainer.global_step / trainer.max_steps
        print(
            f"{self._title} {percent:.0f}% · {self._figures(trainer)} · {left:.0f} s left", file=sys.stderr, flush=True
        )

    def _line_every(self, trainer: Trainer) -> int:
        return max(1, trainer.max_steps // _LINES_WITHOUT_TERMINAL)


class EvaluationProgress(ProgressBar):
    """A bar over the batches of `validate`, `test` or `predict`, on a terminal's stderr: stdout holds the result."""

    def __init__(self) -> None:
        super().__init__()
        self._progress = Progress(console=people_console(stderr=True), transient=True, disable=not sys.stderr.isatty())

    def disable(self) -> None:
        self._progress.disable = True

    def enable(self) -> None:
        self._progress.disable = not sys.stderr.isatty()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._task = self._progress.add_task(stage, total=None)
        self._progress.start()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._progress.stop()

    def on_validation_batch_end(self, trainer: Trainer, *arguments: Any) -> None:
        self._advance(sum(trainer.num_val_batches))

    def on_test_batch_end(self, trainer: Trainer, *arguments: Any) -> None:
        self._advance(sum(trainer.num_test_batches))

    def on_predict_batch_end(self, trainer: Trainer, *arguments: Any) -> None:
        self._advance(sum(trainer.num_predict_batches))

    def _advance(self, total: float) -> None:
        self._progress.update(self._task, total=total, advance=1)
