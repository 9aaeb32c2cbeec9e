"""Whether a step's update is sound: loss and gradient are finite, and the loss is no spike.

The verdict is reached on the device, from figures that are the same on all ranks, and goes to the optimizer as a
tensor: torch's fused optimizers then leave weights, moments and step counts as they are (the mechanism of
``GradScaler``). The host learns of it when it next waits for the device anyway.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

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
        kind: the loss is not finite, the gradient is not, or the loss is a spike.
        loss: nats per token.
        grad_norm: before clipping.
        zscore: of the loss; NaN where there is none.
        skipped: the update was not made.
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
        spikes: skip the update of a spike, report it, or do not look.
        spike_zscore: a loss above this is a spike.

    Attributes:
        skipped: updates skipped so far. This and what follows hold up to the last :meth:`settle`.
        streak: updates skipped in a row.
        last_update: the last step whose update was made.
        faults: what was found; who writes it down empties the list.
    """

    def __init__(self, spikes: Spikes = "report", spike_zscore: float = 30.0) -> None:
        self.spikes, self.spike_zscore = spikes, spike_zscore
        self.skipped, self.streak, self.last_update = 0, 0, 0
        self.faults: list[Fault] = []
        self._losses_N = torch.full((WINDOW,), math.nan)
        self._pending: list[tuple[int, Tensor]] = []

    def judge(self, step: int, loss: Tensor, grad_norm: Tensor) -> Tensor:
        """Whether the update is to be skipped; does not wait for the device.

        Args:
            step: the count of steps with this one.
            loss: () of the global batch, equal on all ranks.
            grad_norm: () likewise.

        Returns:
            () float32, 1 to skip and 0 to go on: the optimizer's ``found_inf``.
        """
        self._losses_N = self._losses_N.to(loss)
        zscore = torch.full_like(loss, math.nan) if self.spikes == "ignore" else self._zscore(loss)
        spike = zscore > self.spike_zscore  # False of NaN: until the window is full
        skip = ~(loss.isfinite() & grad_norm.isfinite())
        if self.spikes == "skip":
            skip = skip | spike
        self._losses_N = torch.where(skip, self._losses_N, torch.cat([self._losses_N[1:], loss[None]]))
        self._pending.append((step, torch.stack([loss, grad_norm, zscore, spike, skip])))
        if len(self._pending) == WINDOW:  # a trainer without our callbacks never asks
            self.settle()
        return skip.float()

    def _zscore(self, loss: Tensor) -> Tensor:
        median = self._losses_N.median()
        deviation = _MAD_TO_DEVIATION * (self._losses_N - median).abs().median()
        return (loss - median) / deviation

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
        """What a run needs to go on and decide the same."""
        self.settle()
        counts = {"skipped": self.skipped, "streak": self.streak, "last_update": self.last_update}
        return {"losses": self._losses_N.cpu(), **counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._losses_N = state["losses"]
        self.skipped, self.streak, self.last_update = state["skipped"], state["streak"], state["last_update"]
