"""The compute multiplier read off the measured envelopes, with no law through them.

Between two budgets of ``arm`` its best loss is a straight line in log loss over log FLOPs; beyond its ends the
outermost line goes on. Where a loss of ``llada`` lies on it, the FLOPs of both give the multiplier. No law, so no
misfit of one; and no smoothing either.

Errors: of the validation books, shared by all runs; of seeds, one for each trunk, whose branches share part of their
training, or one for each run; and the choice of the best of several shapes, anew in every draw (``fits.envelope``).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pandas as pd

from llada_lightning.compute.flops import Convention
from llada_lightning.study.fits import Estimate, Noise, Spread, budget_members, flops_column
from llada_lightning.study.fits.envelope import Candidates

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Envelope:
    """One objective's best loss at each budget less the luck of a best of several, cheapest first, and its draws."""

    flops: Array
    """(k,) rising."""
    losses: Array
    """(k,) falling."""
    drawn_losses: Array
    """(samples, k)"""

    @classmethod
    def of(
        cls, runs: pd.DataFrame, noise: Noise, seeds: Spread, convention: Convention, *, by_trunk: bool = True
    ) -> Envelope:
        """The best of equal budgets by 6ND, at their FLOPs by a convention.

        Args:
            runs: of one objective; a trunk is one shape at one learning rate.
            noise: of these runs, in their order.
            seeds: deviation of log loss over seeds, and its degrees of freedom.
            convention: by which FLOPs are counted.
            by_trunk: whether all branches of a trunk have the same error of seeds; else each has its own.
        """
        seeds = replace(seeds, shared=float(by_trunk))
        shapes = Candidates.of(runs, "6nd", "nats_per_token", noise)
        flops = shapes.means(runs[flops_column(convention)])
        budgets = shapes.envelope(flops)
        best = [shapes.best(budget) for budget in budgets]
        luck = np.array([shapes.luck(budget, seeds) for budget in budgets])
        errors = np.stack([shapes.errors(budget, seeds) for budget in budgets], axis=1)
        losses, drawn = np.exp(shapes.log_loss[best] + luck), np.exp(shapes.log_loss[best] + errors)
        return cls(flops[best], losses, drawn)

    def take(self, budgets: npt.ArrayLike) -> Envelope:
        """Of some of the budgets, by their positions."""
        every = (self.flops, self.losses, self.drawn_losses)
        return Envelope(*(values[..., np.asarray(budgets, np.intp)] for values in every))

    def without(self, budget: int) -> Envelope:
        return self.take(np.delete(np.arange(len(self.flops)), budget))

    def exponent(self) -> tuple[float, Array]:
        """c of loss ~ C^-c by least squares over the budgets, and its draws (samples,)."""
        slopes = slope_weights(np.log(self.flops))
        return float(-slopes @ np.log(self.losses)), -np.log(self.drawn_losses) @ slopes


@dataclass(frozen=True)
class Matched:
    """At one budget of ``llada``: its FLOPs, its best loss, the FLOPs of ``arm`` for that loss, and their ratio."""

    llada_flops: float
    loss: float
    arm_flops: float
    multiplier: Estimate


@dataclass(frozen=True)
class ReadOff:
    """The multipliers, cheapest budget of ``llada`` first, and how they change together."""

    rows: list[Matched]
    growth: Estimate
    """The last over the first."""
    exponent: Estimate
    """Of the multiplier in the FLOPs of ``llada``, least squares over the rows."""


def read_off(arm: Envelope, llada: Envelope) -> ReadOff:
    """Each of ``llada``'s losses that lies between two of ``arm``'s."""
    values = multipliers(arm, llada)
    kept = llada.take([number for number, flops in enumerate(llada.flops) if float(flops) in values])
    found = np.array(list(values.values()))
    drawn = np.log(kept.flops) - log_flops_for(kept.drawn_losses, arm.flops, arm.drawn_losses)
    with np.errstate(over="ignore"):  # infinite where a draw is nearly flat
        estimates = [Estimate.of(value, np.exp(draws)) for value, draws in zip(found, drawn.T, strict=True)]
        growth = Estimate.of(found[-1] / found[0], np.exp(drawn[:, -1] - drawn[:, 0]))
    rows = [
        Matched(float(own), float(loss), float(own / estimate.value), estimate)
        for own, loss, estimate in zip(kept.flops, kept.losses, estimates, strict=True)
    ]
    slopes = slope_weights(np.log(kept.flops))
    return ReadOff(rows, growth, Estimate.of(slopes @ np.log(found), drawn @ slopes))


def shared_budgets(arm_flops: npt.ArrayLike, llada_flops: npt.ArrayLike) -> list[tuple[int, int]]:
    """Positions of the budgets that both have, one of each, cheapest first."""
    arm, llada = np.asarray(arm_flops, float), np.asarray(llada_flops, float)
    groups = budget_members(np.concatenate([arm, llada]))
    return [(int(own[0]), int(own[1]) - len(arm)) for own in groups if len(own) == 2]


def slope_weights(x: Array) -> Array:
    """The least-squares slope of y (n,) over x (n,) is ``slope_weights(x) @ y``."""
    centred = x - x.mean()
    return np.asarray(centred / (centred @ centred), float)


def multipliers(arm: Envelope, llada: Envelope) -> dict[float, float]:
    """FLOPs of ``llada`` -> multiplier, where its loss lies between two of ``arm``'s."""
    needed = np.exp(log_flops_for(llada.losses[None], arm.flops, arm.losses[None])[0])
    return {
        float(flops): float(flops / own)
        for flops, loss, own in zip(llada.flops, llada.losses, needed, strict=True)
        if arm.losses[-1] <= loss <= arm.losses[0]
    }


def log_flops_for(goals: Array, flops: Array, losses: Array) -> Array:
    """log FLOPs at which a falling envelope has a loss, per draw: goals (S, b), flops (a,) rising, losses (S, a)."""
    x, best = np.log(flops), np.log(np.minimum.accumulate(losses, axis=1))
    needed, rows = np.empty_like(goals), np.arange(len(goals))
    for column, goal in enumerate(np.log(goals).T):
        right = np.clip(np.sum(best > goal[:, None], axis=1), 1, len(x) - 1)
        before, after = best[rows, right - 1], best[rows, right]
        slope = np.minimum((after - before) / (x[right] - x[right - 1]), -1e-6)  # a draw may be flat
        needed[:, column] = x[right - 1] + (goal - before) / slope
    return needed
