"""Training FLOPs by three counts, side by side.

Each counts a multiply-add as two operations and the backward pass as twice the forward one (Kaplan et al. 2020,
Sec. 2.1). They add up to what a training step computes in matrix products:

- ``flops_6nd``: 6 N a token, the paper's convention (B.2), N without embedding and head;
- ``flops_attention``: 12 * layers * width * length a token for the two products of attention, half where causal;
- ``flops_head``: 6 * width * vocabulary a token whose logits are computed.

A budget of training FLOPs turned into optimizer steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from llada_lightning.compute.shapes import Shape
from llada_lightning.support.errors import UserError

Convention = Literal["6nd", "total"]
CONVENTIONS: tuple[Convention, ...] = get_args(Convention)

CONVENTION_NAMES: dict[Convention, str] = {"6nd": "6ND", "total": "6ND + attention + head"}
"""How a plot or a table names each convention."""


@dataclass(frozen=True)
class TrainingFlops:
    """FLOPs of one token, or of a run, by component."""

    flops_6nd: float
    flops_attention: float
    flops_head: float

    @property
    def flops_total(self) -> float:
        return self.flops_6nd + self.flops_attention + self.flops_head

    def by(self, convention: Convention) -> float:
        return self.flops_6nd if convention == "6nd" else self.flops_total

    def __mul__(self, tokens: float) -> TrainingFlops:
        return TrainingFlops(self.flops_6nd * tokens, self.flops_attention * tokens, self.flops_head * tokens)


def flops_6nd(params_nonembedding: float, tokens: float) -> float:
    """6 N D (paper, B.2)."""
    return 6.0 * params_nonembedding * tokens


def attention_flops_per_token(shape: Shape, sequence_length: int, causal: bool) -> float:
    """Scores and weighted sum over ``sequence_length`` keys, forward and backward; half of them where causal."""
    full = 12.0 * shape.n_layers * shape.d_model * sequence_length
    return full / 2 if causal else full


def head_flops_per_token(shape: Shape, vocab_size: int) -> float:
    """The output head for one position whose logits are computed, forward and backward."""
    return 6.0 * shape.d_model * vocab_size


def flops_per_token(
    shape: Shape, vocab_size: int, sequence_length: int, *, causal: bool, logit_share: float = 1.0
) -> TrainingFlops:
    """Training FLOPs of one token.

    Args:
        shape: The dimensions of the Transformer.
        vocab_size: The width of the output head.
        sequence_length: The number of positions that a token attends to, before the causal half.
        causal: Whether a position attends to earlier positions only.
        logit_share: The share of the positions whose logits are computed.
    """
    return TrainingFlops(
        flops_6nd=flops_6nd(shape.params_nonembedding, 1),
        flops_attention=attention_flops_per_token(shape, sequence_length, causal=causal),
        flops_head=head_flops_per_token(shape, vocab_size) * logit_share,
    )


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


def expected_mask_probability(eps: float = MASK_EPS, mean_ratio: float = 0.5) -> float:
    """E[p] of p = (1 - eps) t + eps: the share of positions that are masked. By default t ~ U[0, 1]."""
    return (1 + eps) / 2 if mean_ratio == 0.5 else (1 - eps) * mean_ratio + eps  # the same, but for rounding


def expected_length(sequence_length: int, share: float) -> float:
    """Mean tokens of a sequence when a ``share`` of them has a length uniform on 1..L (paper, Sec. 2.2)."""
    return (1 - share) * sequence_length + share * (1 + sequence_length) / 2


def steps_for_budget(
    flops: float,
    per_token: TrainingFlops,
    tokens_per_step: float,
    convention: Convention = "6nd",
    name: str = "budget.flops",
    who: str = "",
) -> int:
    """The number of steps whose FLOPs come nearest to the budget.

    Args:
        flops: The training FLOPs to spend, counted by ``convention``.
        per_token: The training FLOPs of one token.
        tokens_per_step: The expected number of tokens of one global batch.
        convention: Which FLOPs the budget counts.
        name: The name of the setting, for messages.
        who: The objective and the shape, for messages.

    Raises:
        UserError: The budget does not pay for one step.
    """
    check_budgets(name, [flops])
    per_step = per_token.by(convention) * tokens_per_step
    steps = round(flops / per_step)
    if flops < per_step:
        of_what = f" of {who}" if who else ""
        raise UserError(
            f"{name}: {flops:.4g} is below one step{of_what}, which costs {per_step:.4g} FLOPs ({convention}, "
            f"{tokens_per_step:.0f} tokens); raise the budget, or take a smaller batch, sequence length or shape"
        )
    check_steps(name, flops, steps)
    return steps


def check_budgets(name: str, budgets: Sequence[float]) -> None:
    """Refuse budgets that no run has.

    Args:
        name: The name of the setting, for messages.
        budgets: Training FLOPs.

    Raises:
        UserError: There are too many of them, or one is not a number of FLOPs or is too large.
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
        UserError: There are too many.
    """
    if steps > MAX_STEPS:
        raise UserError(f"{name}: {given:.4g} makes a run of {steps:.4g} steps; {MAX_STEPS:.0e} are the most: lower it")


def cost_of_budgets(budgets: Sequence[float], decay_fraction: float) -> float:
    """FLOPs of one trunk that serves several budgets, each with a decay of its own.

    The trunk goes as far as the largest budget's decay begins; every budget adds its decay.
    """
    return (1 - decay_fraction) * max(budgets) + decay_fraction * sum(budgets)
