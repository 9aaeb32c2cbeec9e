"""Losses and gradients that are not usable: an update is judged, skipped if need be, and written down.

The verdict is reached on the device, from numbers that are the same on all ranks, and goes to the optimizer as a
tensor: torch's fused optimizers then leave weights, moments and step counts as they are (the mechanism of
``GradScaler``). The host reads it when it next waits for the device anyway.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from llada_lightning.checkpoints.run_folder import CHECKPOINTS, checkpoints_by_step
from llada_lightning.records import FAULT_COLUMNS, REPORTED, SKIPPED, read_faults, write_faults
from llada_lightning.support.signals import say
from llada_lightning.training.parallel import all_finite

Spikes = Literal["ignore", "report", "skip"]
Kind = Literal["loss", "gradient", "spike"]

WINDOW = 100
"""Losses of the last updates that a spike is measured by; fewer are not judged."""
_MAD_TO_DEVIATION = 1.4826
"""Standard deviation of a normal distribution over its median absolute deviation."""


@dataclass(frozen=True)
class Fault:
    """A step whose update was skipped, or reported.

    Attributes:
        kind: Whether the loss is not finite, the gradient is not, or the loss is a spike.
        loss, grad_norm: The loss in nats per token, and the norm of the gradient before clipping.
        zscore: The distance of the loss from the median in robust standard deviations; NaN where there is none.
    """

    step: int
    kind: Kind
    loss: float
    grad_norm: float
    zscore: float
    skipped: bool


class UpdateGuard:
    """Judges every step, and keeps count.

    A spike's robust z-score is its distance above the median of the last updates' losses, in units of their median
    absolute deviation, scaled to a standard deviation.

    Args:
        spikes: Whether the update of a spike is skipped, reported or ignored.
        spike_zscore: The z-score above which a loss is a spike.

    Attributes:
        skipped: The number of updates skipped so far. This and the next three are as of the last :meth:`settle`.
        streak: The number of updates skipped in a row.
        last_update: The last step whose update was made.
        faults: The faults that were found. The callback that writes them down empties the list.
    """

    def __init__(self, spikes: Spikes = "report", spike_zscore: float = 30.0) -> None:
        self.spikes, self.spike_zscore = spikes, spike_zscore
        self.skipped, self.streak, self.last_update = 0, 0, 0
        self.faults: list[Fault] = []
        self._losses_N = torch.full((WINDOW,), math.nan)
        self._pending: list[tuple[int, Tensor]] = []

    def verdict(self, loss: Tensor, grad_norm: Tensor) -> Tensor:
        """Whether the update of a step is to be skipped; does not wait for the device.

        What it remembers stays at one place of the device, so that a graph can hold the verdict.

        Args:
            loss: () of the global batch, equal on all ranks.
            grad_norm: () likewise.

        Returns:
            (5,) float32: the loss, the norm, the z-score, 1 where the loss is a spike, and 1 where the update is to be
            skipped, which is the optimizer's ``found_inf``.
        """
        if self._losses_N.device != loss.device:
            self._losses_N = self._losses_N.to(loss)
        zscore = torch.full_like(loss, math.nan)
        if self.spikes != "ignore":
            median = self._losses_N.median()
            zscore = (loss - median) / (_MAD_TO_DEVIATION * (self._losses_N - median).abs().median())
        spike = zscore > self.spike_zscore  # False of NaN: until the window is full
        skip = ~(loss.isfinite() & grad_norm.isfinite())
        if self.spikes == "skip":
            skip = skip | spike
        self._losses_N.copy_(torch.where(skip, self._losses_N, torch.cat([self._losses_N[1:], loss[None]])))
        return torch.stack([loss, grad_norm, zscore, spike, skip])

    def note(self, step: int, verdict: Tensor) -> None:
        """Keep the verdict on a step until it is settled; does not wait for the device."""
        self._pending.append((step, verdict))
        if len(self._pending) == WINDOW:  # a trainer without our callbacks never asks
            self.settle()

    def settle(self) -> None:
        """Take the verdicts since the last time from the device, and wait for it."""
        if not self._pending:
            return
        steps, verdicts = zip(*self._pending, strict=True)
        self._pending.clear()
        for step, (loss, grad_norm, zscore, spike, skip) in zip(steps, torch.stack(verdicts).tolist(), strict=True):
            if skip:
                self.skipped, self.streak = self.skipped + 1, self.streak + 1
            else:
                self.streak, self.last_update = 0, step
            if skip or spike:
                finite = (math.isfinite(loss), math.isfinite(grad_norm))
                kind: Kind = "spike" if all(finite) else "gradient" if finite[0] else "loss"
                self.faults.append(Fault(step, kind, loss, grad_norm, zscore, bool(skip)))

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to decide the same."""
        self.settle()
        counts = {"skipped": self.skipped, "streak": self.streak, "last_update": self.last_update}
        return {"losses": self._losses_N.cpu().clone(), **counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._losses_N = state["losses"].clone()
        self.skipped, self.streak, self.last_update = state["skipped"], state["streak"], state["last_update"]


class DivergedError(Exception):
    """Too many updates in a row were skipped, or weights are no numbers; the message is one line for people."""


class BadNumbers(Callback):
    """Prints what the module's guard has found, writes it to `faults.csv`, and ends a run of nothing but such updates.

    That is at logged steps, before a checkpoint, and every ``patience`` steps at the latest. Rows are keyed by step: a
    run that resumes from a checkpoint drops those of later steps, which it is about to repeat.

    Args:
        folder: The folder of `faults.csv`.
        global_batch: The number of sequences of a step.
        patience: The number of updates skipped in a row that ends the run.
    """

    def __init__(self, folder: Path, global_batch: int, patience: int) -> None:
        self._folder, self._global_batch, self._patience = folder, global_batch, patience
        self._step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step = trainer.global_step
        if trainer.is_global_zero:
            rows = read_faults(self._folder)
            kept = [row for row in rows if int(row["step"]) <= self._step]
            if len(kept) < len(rows):
                write_faults(self._folder, kept)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *arguments: Any) -> None:
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        logged = self._step % trainer.log_every_n_steps == 0 or self._step == trainer.max_steps  # type: ignore[attr-defined]
        if logged or self._step % self._patience == 0:
            guard = self._record(trainer, pl_module)
            # At these steps only, so that a run that resumes from a checkpoint ends at the same one. At its end a run
            # shorter than that has diverged where it has made no update at all.
            patience = min(self._patience, self._step) if self._step == trainer.max_steps else self._patience
            if guard.streak >= patience:
                raise DivergedError(
                    self._diverged(guard, f"no update since step {guard.last_update}, {guard.streak} skipped in a row")
                )

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """No checkpoint holds weights that are not numbers: an update of finite gradients, too, can make them so."""
        guard = self._record(trainer, pl_module)
        if not all_finite([parameter.detach() for parameter in pl_module.parameters()]):
            raise DivergedError(self._diverged(guard, f"weights are not finite after step {trainer.global_step}"))

    def _record(self, trainer: Trainer, pl_module: LightningModule) -> UpdateGuard:
        guard = pl_module.guard
        assert isinstance(guard, UpdateGuard)
        guard.settle()
        faults, guard.faults = guard.faults, []
        if faults and trainer.is_global_zero:
            write_faults(self._folder, [*read_faults(self._folder), *map(self._told, faults)])
        return guard

    def _told(self, fault: Fault) -> dict[str, Any]:
        """Prints a fault, and returns its row of `faults.csv`."""
        first, last = (fault.step - 1) * self._global_batch, fault.step * self._global_batch - 1
        height = f" ({fault.zscore:.1f} deviations above the median of {WINDOW} steps)" if fault.kind == "spike" else ""
        say(
            f"step {fault.step}: loss {fault.loss:.4f}{height}, gradient norm {fault.grad_norm:.4g}, sequences "
            f"{first}-{last}: update {'skipped' if fault.skipped else 'made all the same'}; "
            f"llada replay {self._folder} --step {fault.step} shows them"
        )
        action = SKIPPED if fault.skipped else REPORTED
        values = (fault.step, fault.kind, fault.loss, fault.grad_norm, first, last, action)
        return dict(zip(FAULT_COLUMNS, values, strict=True))

    def _diverged(self, guard: UpdateGuard, reason: str) -> str:
        saved = checkpoints_by_step(self._folder / CHECKPOINTS)
        good = [str(saved[step]) for step in sorted(saved) if step <= guard.last_update]
        return (
            f"diverged: {reason}; last good checkpoint: {good[-1] if good else 'none'}; lower --model.schedule.lr, or "
            "look at the sequences"
        )
