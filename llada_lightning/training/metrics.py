"""A mean with its standard error, over sequences and ranks."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

from llada_lightning.objectives.bounds import mean_and_stderr


class MeanEstimate(Metric):
    """Mean of per-sequence values and its standard error; sums are taken in fp64 over all ranks."""

    full_state_update = False
    total: Tensor
    total_of_squares: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("total_of_squares", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, values_B: Tensor) -> None:
        values_B = values_B.double()
        self.total += values_B.sum()
        self.total_of_squares += values_B.square().sum()
        self.count += values_B.numel()

    def compute(self) -> tuple[float, float]:
        """Mean and standard error (NaN for one value)."""
        return mean_and_stderr(self.total.item(), self.total_of_squares.item(), int(self.count.item()))
