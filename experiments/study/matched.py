"""The compute multiplier read off the measured envelopes, with no law through them.

Between two budgets of ``arm`` its best loss is a straight line in log loss over log FLOPs. Where a loss of ``llada``
lies on that line, the FLOPs of both give the multiplier. No law, so no misfit of one; and no smoothing either.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from llada_lightning.scaling.fits import Estimate

DRAWS = 4000

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Matched:
    """At one budget of ``llada``: its FLOPs, its best loss, the FLOPs of ``arm`` for that loss, and their ratio."""

    llada_flops: float
    loss: float
    arm_flops: float
    multiplier: Estimate


def read_off(
    arm_flops: Array, arm_losses: Array, llada_flops: Array, llada_losses: Array, covariance: Array, seed: int = 0
) -> list[Matched]:
    """Each of ``llada``'s losses that lies between two of ``arm``'s, cheapest budget first.

    Args:
        arm_flops: (a,) rising.
        arm_losses: (a,) best losses, falling.
        llada_flops: (b,)
        llada_losses: (b,)
        covariance: (a + b, a + b) joint errors of the losses, ``arm``'s first, nats^2.
        seed: of the draws.
    """
    count = len(arm_flops)
    means = np.concatenate([arm_losses, llada_losses])
    draws = np.random.default_rng(seed).multivariate_normal(means, covariance, DRAWS)
    values, found = multipliers(arm_flops, arm_losses, llada_flops, llada_losses), []
    for number, (flops, loss) in enumerate(zip(llada_flops, llada_losses, strict=True)):
        if flops in values:
            drawn = [flops / flops_for(draw[count + number], arm_flops, draw[:count]) for draw in draws]
            estimate = Estimate.of(values[flops], np.array(drawn))
            found.append(Matched(float(flops), float(loss), float(flops / values[flops]), estimate))
    return found


def multipliers(arm_flops: Array, arm_losses: Array, llada_flops: Array, llada_losses: Array) -> dict[float, float]:
    """FLOPs of ``llada`` -> multiplier, where its loss lies between two of ``arm``'s; arguments as of ``read_off``."""
    return {
        float(flops): float(flops / flops_for(loss, arm_flops, arm_losses))
        for flops, loss in zip(llada_flops, llada_losses, strict=True)
        if arm_losses[-1] <= loss <= arm_losses[0]
    }


def flops_for(loss: float, flops: Array, losses: Array) -> float:
    """FLOPs at which a falling envelope first has a loss; beyond its ends the last line goes on."""
    best = np.minimum.accumulate(losses)
    right = int(np.clip(np.sum(best > loss), 1, len(flops) - 1))
    (x0, x1), (y0, y1) = np.log(flops[right - 1 : right + 1]), np.log(best[right - 1 : right + 1])
    slope = min((y1 - y0) / (x1 - x0), -1e-6)  # a draw may be flat
    return float(np.exp(x0 + (np.log(loss) - y0) / slope))
