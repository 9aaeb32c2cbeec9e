"""The bound on the negative log-likelihood (Eq. 14), and a mean with its standard error."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def nll_bound(nll_M: Tensor, masked_BL: Tensor) -> Tensor:
    """One Monte Carlo sample of Eq. 14 for each sequence: L / l times the sum over its l masked tokens.

    Args:
        nll_M: (M,) negative log-likelihood of the masked tokens, in the order of ``masked_BL.nonzero()``.
        masked_BL: (B, L) bool, at least one True a row.

    Returns:
        (B,) float64, nats per sequence.
    """
    counts_B = masked_BL.sum(dim=1)
    assert bool((counts_B > 0).all()), "Eq. 14 masks at least one token"
    rows_M = masked_BL.nonzero()[:, 0]
    sums_B = torch.zeros(masked_BL.shape[0], dtype=torch.float64, device=nll_M.device)
    sums_B.index_add_(0, rows_M, nll_M.double())
    return sums_B * masked_BL.shape[1] / counts_B


def mean_and_stderr(total: float, total_of_squares: float, count: int) -> tuple[float, float]:
    """Mean of ``count`` values and its standard error, from their sum and sum of squares.

    The standard error takes the values as independent. Where they are stratified (the bound's l), it is an upper
    estimate: the part of the variance that stratification removes is still in it. It is NaN for one value.
    """
    mean = total / count
    if count < 2:
        return mean, math.nan
    variance = max(0.0, total_of_squares - count * mean * mean) / (count - 1)
    return mean, math.sqrt(variance / count)
