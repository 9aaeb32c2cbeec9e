"""Rules that turn size, tokens and compute into hyperparameters; each is a default that a configuration may replace.

All were fitted to autoregressive models; they serve both objectives until a study has tuned its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import geometric_mean
from typing import Literal, get_args

LearningRateRule = Literal["deepseek", "step-law", "kaplan"]
BatchRule = Literal["deepseek", "step-law"]
LEARNING_RATE_RULES: tuple[LearningRateRule, ...] = get_args(LearningRateRule)
BATCH_RULES: tuple[BatchRule, ...] = get_args(BatchRule)

WARMUP_FRACTION = 0.05
MAX_WARMUP_STEPS = 2000
"""Warmup of LLaDA (paper, Sec. 2.2) where a run is long enough for it."""

DECAY_FRACTION = 0.2
"""Share of the steps over which the rate falls: 10 to 20 % suffice (Hägele et al. 2024, arXiv:2405.18392)."""


def learning_rate(rule: LearningRateRule, params_nonembedding: float, tokens: float, flops: float) -> float:
    """Peak learning rate by a named rule.

    - ``deepseek``: 0.3118 C^-0.1250 (Bi et al. 2024, arXiv:2401.02954, Sec. 3.1). Their C counts attention beside
      6ND; the exponent makes that a few per cent.
    - ``step-law``: 1.79 N^-0.713 D^0.307 (Li et al. 2025, arXiv:2503.04715).
    - ``kaplan``: 0.003239 - 0.0001395 ln N, never below 1e-4 (Kaplan et al. 2020, Eq. D.1).

    Args:
        rule: its name.
        params_nonembedding: N.
        tokens: D, training tokens.
        flops: C, training FLOPs (6ND).
    """
    match rule:
        case "deepseek":
            return 0.3118 * flops**-0.1250
        case "step-law":
            return 1.79 * params_nonembedding**-0.713 * tokens**0.307
        case "kaplan":
            return max(1e-4, 0.003239 - 0.0001395 * math.log(params_nonembedding))


def batch_tokens(rule: BatchRule, tokens: float, flops: float) -> float:
    """Tokens of a global batch by a named rule.

    - ``deepseek``: 0.2920 C^0.3271 (Bi et al. 2024, Sec. 3.1).
    - ``step-law``: 0.58 D^0.571, whatever the size (Li et al. 2025).

    Args:
        rule: its name.
        tokens: D, training tokens.
        flops: C, training FLOPs (6ND).
    """
    match rule:
        case "deepseek":
            return 0.2920 * flops**0.3271
        case "step-law":
            return 0.58 * tokens**0.571


def default_learning_rate(flops_6nd: float) -> float:
    """Peak learning rate of a run that sets none: ``deepseek``'s, of the run's 6ND."""
    return learning_rate("deepseek", math.nan, math.nan, flops_6nd)


def warmup_steps(lengths: Sequence[int], fraction: float = WARMUP_FRACTION) -> int:
    """Of runs of these lengths, which share a trunk: a share of their geometric mean, at least 1 and at most 2000.

    At most a quarter of the shortest one, too: most of a run is to be trained at its rate.
    """
    shared = round(fraction * geometric_mean(lengths))
    return max(1, min(MAX_WARMUP_STEPS, shared, min(lengths) // 4))
