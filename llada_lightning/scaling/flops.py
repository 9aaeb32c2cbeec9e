"""Training FLOPs by three counts, side by side.

Each counts a multiply-add as two operations and the backward pass as twice the forward one (Kaplan et al. 2020,
Sec. 2.1). They add up to what a training step computes in matrix products:

- ``flops_6nd``: 6 N a token, the paper's convention (B.2), N without embedding and head;
- ``flops_attention``: 12 * layers * width * length a token for the two products of attention, half where causal;
- ``flops_head``: 6 * width * vocabulary a token whose logits are computed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from llada_lightning.scaling.shapes import Shape

Objective = Literal["arm", "llada"]
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
    shape: Shape, vocab_size: int, sequence_length: int, objective: Objective, logit_share: float = 1.0
) -> TrainingFlops:
    """Training FLOPs of one token.

    Args:
        shape: the Transformer's dimensions.
        vocab_size: width of the output head.
        sequence_length: keys that a token attends to (before the causal half).
        objective: ``arm`` attends causally, ``llada`` to everything.
        logit_share: share of the positions whose logits are computed.
    """
    return TrainingFlops(
        flops_6nd=flops_6nd(shape.params_nonembedding, 1),
        flops_attention=attention_flops_per_token(shape, sequence_length, causal=objective == "arm"),
        flops_head=head_flops_per_token(shape, vocab_size) * logit_share,
    )
