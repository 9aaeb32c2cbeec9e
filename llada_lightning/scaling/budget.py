"""A budget of training FLOPs turned into optimizer steps."""

from __future__ import annotations

from llada_lightning.errors import UserError
from llada_lightning.scaling.flops import Convention, TrainingFlops


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
    per_step = per_token.by(convention) * tokens_per_step
    steps = round(flops / per_step)
    if flops < per_step:
        raise UserError(
            f"budget.flops: {flops:.4g} is below one step, which costs {per_step:.4g} FLOPs ({convention}, "
            f"{tokens_per_step:.0f} tokens); raise the budget, or lower the global batch"
        )
    return steps
