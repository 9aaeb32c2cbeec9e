"""The compute multiplier: training FLOPs that ``llada`` needs over those that ``arm`` needs for equal loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from llada_lightning.scaling.flops import Convention

Method = Literal["envelope", "isoflop", "parametric"]
METHODS: tuple[Method, ...] = get_args(Method)


@dataclass(frozen=True)
class Multiplier:
    """FLOPs of ``llada`` over FLOPs of ``arm`` at the loss that ``arm`` reaches at ``arm_flops``; 95 % interval."""

    convention: Convention
    method: Method
    arm_flops: float
    multiplier: float
    low: float
    high: float
    extrapolated: bool
    """Whether ``llada`` reaches that loss only outside of its own budgets (within a decade)."""

    def as_dict(self) -> dict[str, Any]:
        return dict(vars(self))
