"""Which predictions of a step stay, and how many."""

from __future__ import annotations

import torch
from torch import Tensor

TIE = 1e-5
"""Confidences whose share of the highest differs by less are equal."""


def counts_to_keep(masked_R: Tensor, step: int, steps: Tensor | int) -> Tensor:
    """(R,) int64: tokens to unmask in one step of a block.

    After step i of N, floor(n i / N) of a block's n tokens are unmasked: Algorithm 5's n_un = floor(L (1 - s)), which
    is the number to keep (as printed, the algorithm would remask so many).

    Args:
        masked_R: (R,) int64, tokens that were masked when the block began.
        step: from 1 to ``steps``.
        steps: of each row, (R,) int64, or of all.
    """
    return masked_R * step // steps - masked_R * (step - 1) // steps


def without_rounding(confidence_RK: Tensor) -> Tensor:
    """Confidences on a grid that starts at each row's highest, so that what is equal but for rounding is equal.

    Where nothing but masks is seen, all positions get the same prediction. Which of them comes first must not hang on
    the last bit, which another batch rounds in another way.
    """
    highest_R1 = confidence_RK.amax(dim=1, keepdim=True)
    width_R1 = (TIE * highest_R1.abs()).clamp(min=1e-30)
    below_RK = ((highest_R1 - confidence_RK) / width_R1).round()
    return torch.where(confidence_RK.isfinite(), highest_R1 - below_RK * width_R1, confidence_RK)


def most_confident(confidence_RK: Tensor, candidates_RK: Tensor, counts_R: Tensor) -> Tensor:
    """(R, K) bool: of the candidates of each row as many as ``counts_R`` says, the surest; of equals the first."""
    order_RK = confidence_RK.masked_fill(~candidates_RK, -torch.inf).argsort(dim=1, descending=True, stable=True)
    ranks_K = torch.arange(confidence_RK.shape[1], device=order_RK.device)
    chosen_RK = torch.zeros_like(candidates_RK).scatter(1, order_RK, ranks_K < counts_R[:, None])
    return chosen_RK & candidates_RK


def above_threshold(confidence_RK: Tensor, candidates_RK: Tensor, threshold: float) -> Tensor:
    """(R, K) bool: the candidates of more confidence than ``threshold``, and of every row the surest."""
    one_R = candidates_RK.any(dim=1).long()
    surest_RK = most_confident(without_rounding(confidence_RK), candidates_RK, one_R)
    return (candidates_RK & (confidence_RK > threshold)) | surest_RK


def by_the_reverse_process(uniform_RK: Tensor, candidates_RK: Tensor, step: int, steps_R: Tensor) -> Tensor:
    """(R, K) bool: of the candidates each one with probability 1 - s / t (Algorithm 4, Eq. 10).

    Between t = (N - i + 1) / N and s = (N - i) / N of step i of N; the last step keeps all.
    """
    left_R1 = (steps_R - step)[:, None]
    return candidates_RK & (uniform_RK >= left_R1 / (left_R1 + 1))
