"""Counts what a run consumes - tokens, FLOPs, seconds - and logs every step's figures."""

from __future__ import annotations

import sys
import time
from collections import deque
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer

from llada_lightning.compute.flops import TrainingFlops
from llada_lightning.compute.hardware import peak_flops
from llada_lightning.objectives.batches import TrainingBatch
from llada_lightning.training.modules import LanguageModule

_WINDOW = 20
"""Logged steps over which the rates of the log and the progress line are taken."""


class Accounting(Callback):
    """Tokens, FLOPs by the three counts, achieved FLOP/s, MFU, peak memory; counters survive with the checkpoint.

    Args:
        per_token: The training FLOPs of a token.

    Attributes:
        tokens: training tokens so far, padding not counted.
        train_seconds: seconds in training steps, without validation, over all starts of the run.
        wall_seconds: all seconds since the first start that checkpoints know of, validation included.
    """

    def __init__(self, per_token: TrainingFlops) -> None:
        self.per_token = per_token
        self.tokens = 0
        self.train_seconds = 0.0
        self.wall_seconds = 0.0
        self.last: dict[str, float] = {}
        self._lr = 0.0
        self._step = 0
        self._tick = 0.0
        self._window: deque[tuple[float, int]] = deque(maxlen=_WINDOW)

    @property
    def flops(self) -> TrainingFlops:
        """FLOPs so far."""
        return self.per_token * self.tokens

    def mean_tokens_per_second(self) -> float:
        """Over the whole run, all devices together."""
        return self.tokens / self.train_seconds if self.train_seconds else 0.0

    def mean_mfu(self, trainer: Trainer) -> float | None:
        """Achieved total FLOP/s over the devices' dense bf16 peak; None where the peak is not known."""
        peak = device_peak(trainer)
        if peak is None or not self.train_seconds:
            return None
        return self.flops.flops_total / self.train_seconds / (peak * trainer.world_size)

    def rates(self, trainer: Trainer, tokens_per_second: float) -> dict[str, float]:
        """A throughput as FLOP/s by each count, all devices together, and as MFU where the device's peak is known."""
        achieved = self.per_token * tokens_per_second
        peak = device_peak(trainer)
        return {
            "tokens_per_second": tokens_per_second,
            "flops_6nd_per_second": achieved.flops_6nd,
            "flops_attention_per_second": achieved.flops_attention,
            "flops_head_per_second": achieved.flops_head,
            "flops_total_per_second": achieved.flops_total,
            **({} if peak is None else {"mfu": achieved.flops_total / (peak * trainer.world_size)}),
        }

    def settled(self, trainer: Trainer) -> tuple[float, int]:
        """Seconds of training and tokens up to here; waits for the device, so it is nothing for every step."""
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.synchronize()
        self._advance(training=True)
        return self.train_seconds, self.tokens

    def leave_out(self) -> None:
        """What has passed since the last reading was no training."""
        self._advance()

    def state_dict(self) -> dict[str, Any]:
        self._advance(training=True)
        return {"tokens": self.tokens, "train_seconds": self.train_seconds, "wall_seconds": self.wall_seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.tokens = state_dict["tokens"]
        self.train_seconds, self.wall_seconds = state_dict["train_seconds"], state_dict["wall_seconds"]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._tick = time.monotonic()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step = trainer.global_step
        self._advance()
        self._window.append((self.train_seconds, self.tokens))

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit":
            self._advance()
            return
        self.settled(trainer)  # or the steps still in the queue would count as validation

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._advance()
        for logger in trainer.loggers:
            logger.log_metrics(getattr(pl_module, "validation", {}), step=trainer.global_step)
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

    def _log(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, LanguageModule) and pl_module.step_loss is not None
        loss = float(pl_module.step_loss)  # waits for the device, so the clock is read after it
        self._advance(training=True)
        values: dict[str, float] = {
            "tokens": self.tokens,
            "flops_6nd": self.flops.flops_6nd,
            "flops_attention": self.flops.flops_attention,
            "flops_head": self.flops.flops_head,
            "flops_total": self.flops.flops_total,
            "lr": self._lr,
            "train_nats_per_token": loss,
            "seconds": self.wall_seconds,
        }
        pl_module.guard.settle()
        values["skipped_updates"] = pl_module.guard.skipped
        if pl_module.grad_norm is not None:
            values["grad_norm"] = float(pl_module.grad_norm)
        values.update(self._rates(trainer))
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

    def _advance(self, training: bool = False) -> None:
        now = time.monotonic()
        self.wall_seconds += now - self._tick
        if training:
            self.train_seconds += now - self._tick
        self._tick = now


def device_name(trainer: Trainer) -> str:
    """The device's name as its driver gives it; `cpu` without a GPU."""
    device = trainer.strategy.root_device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def device_peak(trainer: Trainer) -> float | None:
    """Dense bf16 FLOP/s of one device, or None."""
    return peak_flops(device_name(trainer))


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
