"""The loss by noise level: the mean over the tokens in each of ten equal bins of the level that they were noised at.

The mean of a training loss hides at which noise levels a model gets better. The losses hand over the negative
log-likelihoods that they have computed anyway (``objectives.batches.LevelSums``). They are summed up on the device, and
the host reads the sums where it waits for the device to log the loss.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from llada_lightning.records import NOISE_LEVELS, level_columns

UNITS_PER_NAT = 2**20
"""The values are rounded to this part of a nat. Sums of whole numbers in float64 are exact up to 2^53, which is 8.6e9
nats in one bin: so they do not depend on the order of the tokens, on how the tokens are spread over processes and
micro-batches, or on interruptions, and those of a CUDA device do not depend on the order of its atomic additions."""

_TOGETHER = 16
"""How many micro-batches are summed up at once: a small operation on its own costs as much as a large one."""


class LevelLosses:
    """Sums of the losses of tokens by noise level, until they are taken.

    Args:
        split: Which losses they are; it begins the names of the columns.

    Attributes:
        paused: Whether what is handed over is left out.
        at_once: Whether values are summed up as they come, on the device that the sums are on. A graph can hold that.
    """

    def __init__(self, split: Literal["train", "val"]) -> None:
        self._columns = level_columns(split)
        self.paused, self.at_once = False, False
        self._edges = torch.arange(1, NOISE_LEVELS) / NOISE_LEVELS
        self._totals_2T = torch.zeros(2, NOISE_LEVELS, dtype=torch.float64)  # units of nats, and tokens
        self._waiting: list[tuple[Tensor, Tensor, Tensor]] = []

    def add(self, levels_N: Tensor, nats_N: Tensor, counts_N: Tensor | None = None) -> None:
        """Add the values of tokens (see ``LevelSums``); does not wait for the device. A level of 0.1 is in the first
        bin."""
        if self.paused:
            return
        nats_N = nats_N.detach()
        self._waiting.append((levels_N.detach(), nats_N, torch.ones_like(nats_N) if counts_N is None else counts_N))
        if self.at_once or len(self._waiting) == _TOGETHER:
            self._sum_up()

    def _sum_up(self) -> None:
        if not self._waiting:
            return
        levels_N, nats_N, tokens_N = (torch.cat(parts) for parts in zip(*self._waiting, strict=True))
        self._waiting.clear()
        self._move(nats_N.device)
        bins_N = torch.bucketize(levels_N.float(), self._edges)
        self._totals_2T[0].index_add_(0, bins_N, (nats_N.double() * UNITS_PER_NAT).round())
        self._totals_2T[1].index_add_(0, bins_N, tokens_N.double())

    def take(self, device: torch.device) -> dict[str, float]:
        """The mean of each bin that has tokens, over all processes, by the name of its column; then all is 0 again.

        All processes call this together.

        Args:
            device: The device of this process, over which processes talk.
        """
        units_T, tokens_T = self.totals(device).tolist()
        self._totals_2T.zero_()
        found = zip(self._columns, units_T, tokens_T, strict=True)
        return {column: units / UNITS_PER_NAT / tokens for column, units, tokens in found if tokens}

    def totals(self, device: torch.device) -> Tensor:
        """(2, 10) float64 on the CPU: the sums over all processes, in units of nats, and the numbers of tokens.

        All processes call this together.
        """
        self._sum_up()
        self._move(device)
        totals_2T = self._totals_2T.clone()
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(totals_2T)
        return totals_2T.cpu()

    def go_on_from(self, totals_2T: Tensor, first: bool) -> None:
        """Continue from what :meth:`totals` gave, which is the sum over all processes.

        Args:
            totals_2T: (2, 10) float64.
            first: Whether this is the process that holds it; the others begin at 0.
        """
        self._waiting.clear()
        self._totals_2T = totals_2T.clone() if first else torch.zeros_like(totals_2T)

    @contextmanager
    def undone(self, device: torch.device) -> Iterator[None]:
        """What is added within counts nothing."""
        self._sum_up()
        self._move(device)
        before_2T = self._totals_2T.clone()
        try:
            yield
        finally:
            self._totals_2T.copy_(before_2T)

    def _move(self, device: torch.device) -> None:
        if self._totals_2T.device != device:
            self._totals_2T, self._edges = self._totals_2T.to(device), self._edges.to(device)
