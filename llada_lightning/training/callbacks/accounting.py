"""What a run consumes - tokens, FLOPs, seconds: logged every step, and shown on one line of progress."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from llada_lightning.compute.flops import TrainingFlops
from llada_lightning.compute.hardware import peak_flops
from llada_lightning.objectives import TrainingKind
from llada_lightning.objectives.batches import TrainingBatch
from llada_lightning.support.printing import people_console
from llada_lightning.training.callbacks.loggers import SURROGATE_LOSS, TRAINING_LOSS, loss_column
from llada_lightning.training.language_module import LanguageModule

_WINDOW = 20
"""Logged steps over which the rates of the log and the progress line are taken."""
_LOSSES = 10
"""Logged steps whose mean loss is shown."""
_LINES_WITHOUT_TERMINAL = 10


class Accounting(Callback):
    """Tokens, FLOPs by the three counts, achieved FLOP/s, MFU, peak memory; counters survive with the checkpoint.

    Args:
        per_token: The training FLOPs of a token, or a function that gives their mean over the first steps of the run.

    Attributes:
        tokens: The training tokens so far, padding not counted.
        train_seconds: The seconds in training steps, without validation, over all starts of the run.
        wall_seconds: All seconds since the first start that checkpoints know of, validation included.
        last: The values that were logged last, by column.
    """

    def __init__(self, per_token: TrainingFlops | Callable[[int], TrainingFlops]) -> None:
        self._per_token = per_token
        self.tokens = 0
        self.train_seconds = 0.0
        self.wall_seconds = 0.0
        self.last: dict[str, float] = {}
        self._lr = 0.0
        self._step = 0
        self._tick = 0.0
        self._window: deque[tuple[float, int]] = deque(maxlen=_WINDOW)

    @property
    def per_token(self) -> TrainingFlops:
        """The training FLOPs of a token, a mean over the steps so far."""
        return self._per_token(self._step) if callable(self._per_token) else self._per_token

    @property
    def flops(self) -> TrainingFlops:
        """FLOPs so far."""
        return self.per_token * self.tokens

    def mean_tokens_per_second(self) -> float:
        """Over the whole run, all devices together."""
        return self.tokens / self.train_seconds if self.train_seconds else 0.0

    def mean_mfu(self, trainer: Trainer) -> float | None:
        """Achieved total FLOP/s over the devices' dense bf16 peak; None where the peak is not known."""
        peak = peak_flops(device_name(trainer))
        if peak is None or not self.train_seconds:
            return None
        return self.flops.flops_total / self.train_seconds / (peak * trainer.world_size)

    def rates(self, trainer: Trainer, tokens_per_second: float) -> dict[str, float]:
        """A throughput as FLOP/s by each count, all devices together, and as MFU where the device's peak is known."""
        achieved = by_count(self.per_token * tokens_per_second)
        found = {"tokens_per_second": tokens_per_second, **{f"{count}_per_second": x for count, x in achieved.items()}}
        peak = peak_flops(device_name(trainer))
        if peak is not None:
            found["mfu"] = achieved["flops_total"] / (peak * trainer.world_size)
        return found

    def settled(self, trainer: Trainer) -> tuple[float, int]:
        """Seconds of training and tokens up to here; waits for the device, so it is nothing for every step."""
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.synchronize()
        self._advance(training=True)
        return self.train_seconds, self.tokens

    def leave_out(self) -> None:
        """What has passed since the last reading was no training."""
        self._advance()

    def _advance(self, training: bool = False) -> None:
        now = time.monotonic()
        self.wall_seconds += now - self._tick
        if training:
            self.train_seconds += now - self._tick
        self._tick = now

    def state_dict(self) -> dict[str, Any]:
        self._advance(training=True)
        clocks = {"train_seconds": self.train_seconds, "wall_seconds": self.wall_seconds}
        return {"tokens": self.tokens, "step": self._step, **clocks}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.tokens = state_dict["tokens"]
        self._step = state_dict.get("step", 0)  # older checkpoints have none, and no curriculum
        self.train_seconds, self.wall_seconds = state_dict["train_seconds"], state_dict["wall_seconds"]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._tick = time.monotonic()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step = trainer.global_step
        self._advance()
        self._window.append((self.train_seconds, self.tokens))

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit":
            self.settled(trainer)  # or the steps still in the queue would count as validation
        else:
            self._advance()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._advance()
        metrics = dict(getattr(pl_module, "validation", {}))
        if isinstance(pl_module, LanguageModule):
            metrics |= pl_module.corpus_metrics()
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)
            logger.save()

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        self._lr = optimizer.param_groups[0]["lr"]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: TrainingBatch, batch_idx: int
    ) -> None:
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        self.tokens += batch.global_tokens
        if self._step % trainer.log_every_n_steps == 0 or self._step == trainer.max_steps:  # type: ignore[attr-defined]
            self._log(trainer, pl_module)

    def _log(self, trainer: Trainer, module: LightningModule) -> None:
        assert isinstance(module, LanguageModule) and module.step_loss is not None
        loss = float(module.step_loss)  # waits for the device, so the clock is read after it
        self._advance(training=True)
        module.guard.settle()
        kind = training_kind(trainer, module)
        values: dict[str, float] = {
            "tokens": self.tokens,
            **by_count(self.flops),
            "lr": self._lr,
            loss_column(kind): loss,
            "seconds": self.wall_seconds,
            "skipped_updates": module.guard.skipped,
        }
        if module.grad_norm is not None:
            values["grad_norm"] = float(module.grad_norm)
        if module.by_noise_level:
            values |= module.train_levels.take(module.device)
        values |= self._rates(trainer)
        memory = peak_memory_bytes(trainer.strategy.root_device)
        if memory is not None:
            values["peak_memory_bytes"] = memory
        self.last = values
        for logger in trainer.loggers:
            logger.log_metrics(values, step=self._step)

    def _rates(self, trainer: Trainer) -> dict[str, float]:
        """:meth:`rates` over the window of logged steps."""
        self._window.append((self.train_seconds, self.tokens))
        (first_seconds, first_tokens), (seconds, tokens) = self._window[0], self._window[-1]
        if seconds == first_seconds:
            return {}
        return self.rates(trainer, (tokens - first_tokens) / (seconds - first_seconds))


def training_kind(trainer: Trainer, module: LanguageModule) -> TrainingKind:
    """What the training loss of a run is, with the mask ratios of its data."""
    return module.training_kind(getattr(getattr(trainer, "datamodule", None), "density_setting", None))


def by_count(flops: TrainingFlops) -> dict[str, float]:
    """FLOPs by each of the three counts, and in total, by the names of the columns of tables."""
    return {name: getattr(flops, name) for name in ("flops_6nd", "flops_attention", "flops_head", "flops_total")}


def device_name(trainer: Trainer) -> str:
    """The device's name as its driver gives it; `cpu` without a GPU."""
    device = trainer.strategy.root_device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def peak_memory_bytes(device: torch.device) -> int | None:
    """The most memory that this process has held so far; of several, each knows its own, and the first one's is logged.

    On a GPU what torch's allocator has handed out, on the CPU the resident size of the whole process, interpreter and
    libraries with it. None where the system does not say.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)  # the allocator's own count: nothing waits for the device
    if device.type != "cpu":
        return None
    try:
        import resource
    except ImportError:  # Windows has none
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


class BudgetProgress(ProgressBar):
    """Loss, bits/byte, tokens/s, MFU, percent of the budget and time left, on stderr.

    A live line on a terminal; elsewhere about ten plain lines a run.

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

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._started, self._first_step = time.monotonic(), trainer.global_step
        self._line_every = max(1, trainer.max_steps // _LINES_WITHOUT_TERMINAL)
        self._next_line = trainer.global_step + self._line_every
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

    def on_train_batch_end(self, trainer: Trainer, *arguments: Any) -> None:
        if not self._enabled:
            return
        last, step = self._accounting.last, trainer.global_step
        if last and last is not self._shown:
            self._shown = last
            self._column = next(column for column in (TRAINING_LOSS, SURROGATE_LOSS) if column in last)
            self._losses.append(last[self._column])
        if self._progress is not None:
            self._progress.update(self._task, completed=step, figures=self._figures(trainer))
        elif self._shown and (step >= self._next_line or step == trainer.max_steps):
            self._next_line = step + self._line_every
            left = (time.monotonic() - self._started) / (step - self._first_step) * (trainer.max_steps - step)
            line = f"{self._title} {100 * step / trainer.max_steps:.0f}% · {self._figures(trainer)} · {left:.0f} s left"
            print(line, file=sys.stderr, flush=True)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._progress is not None:
            self._progress.update(self._task, figures=f"{self._figures(trainer)} · validating")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.on_train_end(trainer, pl_module)
        if self._enabled and isinstance(exception, KeyboardInterrupt):
            print("stopped at once; the same command resumes from the last checkpoint", file=sys.stderr)

    def _figures(self, trainer: Trainer) -> str:
        parts = [f"step {trainer.global_step}/{trainer.max_steps}"]
        if self._losses:
            loss = sum(self._losses) / len(self._losses)
            surrogate = self._column == SURROGATE_LOSS
            parts.append(f"surrogate loss {loss:.3f}" if surrogate else f"training loss {loss:.3f} nats/token")
            data = getattr(trainer, "datamodule", None)
            bits = None if data is None or surrogate else data.bits_per_byte(loss)
            if bits is not None:
                parts.append(f"{bits:.3f} bits/byte")
        if "tokens_per_second" in self._accounting.last:
            parts.append(f"{self._accounting.last['tokens_per_second']:,.0f} tokens/s")
        mfu = self._accounting.last.get("mfu")
        parts.append("MFU n/a" if mfu is None else f"MFU {100 * mfu:.1f}%")
        return " · ".join(parts)


class EvaluationProgress(ProgressBar):
    """A bar over the batches of `validate`, `test` or `predict`, on a terminal's stderr: stdout holds the result."""

    def __init__(self) -> None:
        super().__init__()
        self._progress = Progress(console=people_console(stderr=True), transient=True, disable=not sys.stderr.isatty())

    def disable(self) -> None:
        self._progress.disable = True

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
