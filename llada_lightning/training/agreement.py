"""What all processes of a run decide together, without the accelerators, whose queues it therefore does not drain."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from lightning import Trainer


class Agreement:
    """The largest of the processes' values, over the network; in one process its own."""

    def __init__(self) -> None:
        self._group: Any = None

    def begin(self, trainer: Trainer) -> None:
        """To be called by all processes, before the first :meth:`maximum`."""
        if trainer.world_size > 1 and self._group is None:
            self._group = dist.new_group(backend="gloo")

    def maximum(self, value: int) -> int:
        """The largest value of all processes, each of which gives its own."""
        if self._group is None:
            return value
        largest = torch.tensor(value)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self._group)
        return int(largest)
