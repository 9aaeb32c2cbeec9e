"""Hyperparameter rules: tables of functions that turn size, tokens and compute into rate, batch and warmup.

A rule is a function and one row of a table; :func:`register` adds one (`docs/extending.md`). A run names its rules
(:class:`Rules`), and a plan does, too. Each rule is a default that a number in the configuration replaces. All were
fitted to autoregressive models. They serve every objective until a study has tuned its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import geometric_mean
from typing import Any, Literal

from llada_lightning.support.errors import UserError

WARMUP_FRACTION = 0.05
MAX_WARMUP_STEPS = 2000
"""Warmup of LLaDA (paper, Sec. 2.2) where a run is long enough for it."""

DECAY_FRACTION = 0.2
"""Share of the steps over which the rate falls: 10 to 20 % suffice (Hägele et al. 2024, arXiv:2405.18392)."""

LONE_BATCH = 16
"""The global batch, in sequences, of the rule `lone`."""


@dataclass(frozen=True)
class Size:
    """What a rule may depend on. Of several budgets, each number is the geometric mean.

    Args:
        params_nonembedding: The number of parameters without embedding and head, N.
        tokens: The number of training tokens, D.
        flops: The training FLOPs by 6ND, C.
        flops_of_steps: The training FLOPs by 6ND of the whole steps that the budgets make.
    """

    params_nonembedding: float
    tokens: float
    flops: float
    flops_of_steps: float = math.nan


def _deepseek_rate(size: Size) -> float:
    """0.3118 C^-0.1250 (Bi et al. 2024, arXiv:2401.02954, Sec. 3.1). Their C counts attention beside 6ND; the exponent
    makes that a few per cent."""
    return 0.3118 * size.flops**-0.1250


def _step_law_rate(size: Size) -> float:
    """1.79 N^-0.713 D^0.307 (Li et al. 2025, arXiv:2503.04715)."""
    return 1.79 * size.params_nonembedding**-0.713 * size.tokens**0.307


def _kaplan_rate(size: Size) -> float:
    """0.003239 - 0.0001395 ln N, never below 1e-4 (Kaplan et al. 2020, Eq. D.1)."""
    return max(1e-4, 0.003239 - 0.0001395 * math.log(size.params_nonembedding))


def _lone_rate(size: Size) -> float:
    """As `deepseek`, of the FLOPs of whole steps, with all digits: the rule of fits outside of a plan up to 0.1."""
    return 0.3118 * size.flops_of_steps**-0.1250


def _deepseek_batch(size: Size) -> float:
    """0.2920 C^0.3271 tokens (Bi et al. 2024, Sec. 3.1)."""
    return 0.2920 * size.flops**0.3271


def _step_law_batch(size: Size) -> float:
    """0.58 D^0.571 tokens, whatever the number of parameters (Li et al. 2025)."""
    return 0.58 * size.tokens**0.571


LearningRateRule = Callable[[Size], float]
LEARNING_RATE_RULES: dict[str, LearningRateRule] = {
    "deepseek": _deepseek_rate,
    "step-law": _step_law_rate,
    "kaplan": _kaplan_rate,
    "lone": _lone_rate,
}
"""Name -> function of the size that gives the peak learning rate."""

BatchRule = Callable[[Size], float]
BATCH_RULES: dict[str, BatchRule | None] = {"deepseek": _deepseek_batch, "step-law": _step_law_batch, "lone": None}
"""Name -> function of the size that gives the tokens of a global batch; None: :data:`LONE_BATCH` sequences."""


@dataclass(frozen=True)
class Outside:
    """A size beyond the range of a rule.

    Args:
        quantity: The field of :class:`Size` that is furthest beyond.
        value: Its value.
        ends: The least and the largest value that the rule was fitted on.
        factor: By what factor the value is beyond the nearer end, above 1.
    """

    quantity: str
    value: float
    ends: tuple[float, float]
    factor: float

    def __str__(self) -> str:
        side = "below" if self.value < self.ends[0] else "above"
        return (
            f"{self.value:.2g} {_QUANTITIES[self.quantity]}, {self.factor:.2g} times {side} "
            f"{self.ends[0]:.3g} to {self.ends[1]:.3g}"
        )


_QUANTITIES = {"params_nonembedding": "parameters", "tokens": "tokens", "flops": "FLOPs"}


@dataclass(frozen=True)
class Range:
    """The least and the largest sizes that a rule was fitted on. None: the rule's source does not bound it.

    Args:
        params_nonembedding: The number of parameters without embedding and head, N.
        tokens: The number of training tokens, D.
        flops: The training FLOPs by 6ND, C.
    """

    params_nonembedding: tuple[float, float] | None = None
    tokens: tuple[float, float] | None = None
    flops: tuple[float, float] | None = None

    def outside(self, size: Size) -> Outside | None:
        """What of a size is furthest beyond the range; None where nothing is."""
        found = []
        for quantity in _QUANTITIES:
            ends, value = getattr(self, quantity), getattr(size, quantity)
            factor = 1.0 if ends is None else max(ends[0] / value, value / ends[1])
            if ends is not None and factor > 1:
                found.append(Outside(quantity, value, ends, factor))
        return max(found, key=lambda own: own.factor, default=None)


RANGES: dict[str, Range] = {
    # "compute budgets ranging from 1e17 to 2e19" (Bi et al. 2024, Sec. 3.1); they tested the rules at 1e20.
    "deepseek": Range(flops=(1e17, 2e19)),
    "lone": Range(flops=(1e17, 2e19)),
    # The dense grid of losses that the authors released with the rule (step-law.github.io): 18 pairs of N and D.
    "step-law": Range(params_nonembedding=(2.15e8, 1.07e9), tokens=(4e9, 1e11)),
    # A rule of thumb without a fit, "used for most runs" (Kaplan et al. 2020, App. D.6): those of Sec. 3.
    "kaplan": Range(params_nonembedding=(768, 1.5e9)),
}
"""Name of a rule -> the sizes that it was fitted on. The range of a rule that is not listed is not known."""


def study_warmup(lengths: Sequence[int], fraction: float = WARMUP_FRACTION) -> int:
    """The warmup steps of runs that share a trunk: a share of the geometric mean of their lengths, from 1 to 2000.

    At most a quarter of the shortest run: most of a run is to be trained at its rate.

    Args:
        lengths: The number of steps of each run.
        fraction: The share.
    """
    shared = round(fraction * geometric_mean(lengths))
    return max(1, min(MAX_WARMUP_STEPS, shared, min(lengths) // 4))


def lone_warmup(lengths: Sequence[int], fraction: float = WARMUP_FRACTION) -> int:
    """A share of all steps, however many: the rule of fits outside of a plan up to 0.1. Several lengths: as a study."""
    return round(fraction * lengths[0]) if len(lengths) == 1 else study_warmup(lengths, fraction)


WarmupRule = Callable[[Sequence[int]], int]
WARMUP_RULES: dict[str, WarmupRule] = {"study": study_warmup, "lone": lone_warmup}
"""Name -> function of the runs' lengths in steps that gives the warmup steps they share."""

_TABLES: dict[str, dict[str, Any]] = {"lr": LEARNING_RATE_RULES, "batch": BATCH_RULES, "warmup": WARMUP_RULES}


def register(
    setting: Literal["lr", "batch", "warmup"], name: str, rule: LearningRateRule | BatchRule | WarmupRule
) -> None:
    """Add a rule to the table of a setting.

    Args:
        setting: The setting that it gives: `lr`, `batch` or `warmup`, as in `--rules.lr`.
        name: The name of the rule.
        rule: A function as the table of the setting describes it.

    Raises:
        UserError: There is no such setting, or its table has another rule of this name.
    """
    if setting not in _TABLES:
        raise UserError(f"rules: '{setting}' has no table of rules; choose from {', '.join(_TABLES)}")
    if _TABLES[setting].setdefault(name, rule) is not rule:
        raise UserError(f"rules.{setting}: there is another rule '{name}'; choose another name")


@dataclass(frozen=True)
class Rules:
    """Which rules give what a run does not set itself. `lone` in all three is how fits outside of a plan were set up to
    version 0.1, so that their names can be had again.

    Args:
        lr: The rule of the peak learning rate: deepseek, step-law, kaplan or lone.
        batch: The rule of the global batch: deepseek, step-law or lone.
        warmup: The rule of the warmup: study or lone.
    """

    lr: str = "deepseek"
    batch: str = "deepseek"
    warmup: str = "study"

    def check(self, name: str = "rules") -> None:
        """Refuse names that no table has.

        Args:
            name: The name of the setting, for messages.

        Raises:
            UserError: Names the rule and those there are.
        """
        for key, table in _TABLES.items():
            given = getattr(self, key)
            if given not in table:
                raise UserError(f"{name}.{key}: '{given}' is not a rule; choose from {', '.join(table)}")


def learning_rate(rule: str | LearningRateRule, size: Size, scale: float = 1.0) -> float:
    """The peak learning rate by a rule.

    Rules but `lone` give three significant digits: a rule is not known better, and people read the number.

    Args:
        rule: The name of the rule, or the rule itself.
        size: The size of the run.
        scale: A factor on the rate of the rule.
    """
    rate = (LEARNING_RATE_RULES[rule] if isinstance(rule, str) else rule)(size) * scale
    return rate if rule == "lone" else significant(rate)


def significant(value: float, digits: int = 3) -> float:
    """A number to so many significant digits."""
    return float(f"{value:.{digits}g}")
