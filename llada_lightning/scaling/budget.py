"""A budget of training FLOPs turned into optimizer steps."""

from __future__ import annotations

import math
from collections.abc import Sequence

from llada_lightning.errors import UserError
from llada_lightning.scaling.flops import Convention, TrainingFlops

MAX_FLOPS = 1e30
"""Largest budget: 100,000 times the largest trainings so far."""
MAX_BATCH = 2**24
"""Most sequences of a global batch."""
MAX_STEPS = 10**11
"""Longest run in steps, so that 64 bits count its sequences."""
MAX_BUDGETS = 1000
"""Most budgets of one run or plan."""

MASK_EPS = 1e-3
"""Smallest mask probability, as in the authors' training code: it bounds the weight 1/p of Eq. 3 by 1000."""


def expected_mask_probability(eps: float = MASK_EPS) -> float:
    """E[p] of p = (1 - eps) t + eps over t ~ U[0, 1]: the share of positions whose logits `llada`'s loss needs."""
    return (1 + eps) / 2


def expected_length(sequence_length: int, share: float) -> float:
    """Mean tokens of a sequence when a ``share`` of them has a length uniform on 1..L (paper, Sec. 2.2)."""
    return (1 - share) * sequence_length + share * (1 + sequence_length) / 2


def steps_for_budget(
    flops: float, per_token: TrainingFlops, tokens_per_step: float, convention: Convention = "6nd"
) -> int:
    """The number of steps whose FLOPs come nearest to the budget.

    Args:
        flops: training FLOPs to spend, counted by ``convention``.
        per_token: FLOPs of one token.
        tokens_per_step: (expected) tokens of one global batch.
        convention: which FLOPs the budget counts.

    Raises:
        UserError: the budget does not pay for one step.
    """
    check_budgets("budget.flops", [flops])
    per_step = per_token.by(convention) * tokens_per_step
    steps = round(flops / per_step)
    if flops < per_step:
        raise UserError(
            f"budget.flops: {flops:.4g} is below one step, which costs {per_step:.4g} FLOPs ({convention}, "
            f"{tokens_per_step:.0f} tokens); raise the budget, or lower the global batch"
        )
    check_steps("budget.flops", flops, steps)
    return steps


def check_budgets(name: str, budgets: Sequence[float]) -> None:
    """Refuse budgets that no run has.

    Args:
        name: The name of the setting, for messages.
        budgets: Training FLOPs.

    Raises:
        UserError: there are too many of them, or one is not a number of FLOPs or is too large.
    """
    if len(budgets) > MAX_BUDGETS:
        raise UserError(f"{name}: {len(budgets)} budgets given; {MAX_BUDGETS} are the most")
    for flops in budgets:
        if not math.isfinite(flops):
            raise UserError(f"{name}: {flops} is not a number of FLOPs; give one, such as 1e18")
        if flops > MAX_FLOPS:
            raise UserError(f"{name}: {flops:.4g} FLOPs given; {MAX_FLOPS:g} are the most")


def check_steps(name: str, given: float, steps: int) -> None:
    """Refuse a run of more than :data:`MAX_STEPS` steps.

    Args:
        name: The name of the setting that makes so many, for messages.
        given: Its value.
        steps: What follows from it.

    Raises:
        UserError: there are too many.
    """
    if steps > MAX_STEPS:
        raise UserError(f"{name}: {given:.4g} makes a run of {steps:.4g} steps; {MAX_STEPS:.0e} are the most: lower it")


def cost_of_budgets(budgets: Sequence[float], decay_fraction: float) -> float:
    """FLOPs of one trunk that serves several budgets, each with a decay of its own.

    The trunk goes as far as the largest budget's decay begins; every budget adds its decay.
    """
    return (1 - decay_fraction) * max(budgets) + decay_fraction * sum(budgets)
