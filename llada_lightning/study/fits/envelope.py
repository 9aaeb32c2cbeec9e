"""The envelope: the best loss at each budget, what is read off it, and the laws through it.

Runs of one size and one number of tokens (seeds) are averaged before the best is looked for. The best of several is
lucky too: among shapes that are nearly as good, the one whose noise was lowest wins. So the lines go through the points
less the luck that draws of the noise show, and one objective with more seeds or shapes gains nothing by it.

The read-off joins the points by a monotone cubic (PCHIP) of log loss in log FLOPs. It is no law, and tells nothing
beyond them. The bent curve is quadratic instead, and the power law straight.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.interpolate import PchipInterpolator

from llada_lightning.compute.flops import Convention
from llada_lightning.study.fits.least_squares import (
    MIN_BUDGETS,
    LossCurve,
    PowerLaw,
    linear_spread,
    loss_curve,
    power_law,
)
from llada_lightning.study.fits.lines import LossLine
from llada_lightning.study.fits.runs import Unit, budget_members, flops_column, is_budget, losses
from llada_lightning.study.fits.seeds import tokens_by_steps
from llada_lightning.study.fits.uncertainty import UNKNOWN, Array, Noise, Spread, blocks

LUCK_DRAWS = 200
"""Draws over which the luck of the best is averaged: its own error is then a tenth of it."""

ROUNDING = 1e-6
"""Of a logarithm of FLOPs."""


@dataclass(frozen=True)
class EnvelopePoint:
    """The best shape of a budget: its training FLOPs, its loss with standard error (NaN if unknown), its names."""

    flops: float
    loss: float
    stderr: float
    run: str
    shape: str
    replicates: int = 1
    """Runs of this shape and budget, whose mean the loss is; ``run`` names the first."""

    def as_dict(self) -> dict[str, Any]:
        return dict(vars(self))


@dataclass(frozen=True)
class EnvelopeFit:
    """One objective's envelope and, given enough budgets, the lines through it; else a ``note`` on why not."""

    convention: Convention
    points: list[EnvelopePoint]
    law: PowerLaw | None
    note: str | None = None
    spread: Spread = field(default=UNKNOWN, repr=False)
    """The spread of log loss between runs beyond their known errors."""
    curve: LossCurve | None = None
    """The bent curve through the points."""
    read_off: ReadOff | None = None
    """The points joined; None where there is but one."""

    @property
    def flops_range(self) -> tuple[float, float]:
        return self.points[0].flops, self.points[-1].flops

    def as_dict(self) -> dict[str, Any]:
        return {
            "convention": self.convention,
            "points": [point.as_dict() for point in self.points],
            **(self.law.as_dict() if self.law else {}),
            **({"curve": self.curve.as_dict()} if self.curve else {}),
            **({"note": self.note} if self.note else {}),
        }


@dataclass(frozen=True)
class ReadOff:
    """The points of an envelope, joined by a monotone cubic of log loss in log FLOPs (Fritsch and Carlson 1980)."""

    log_c: Array
    """log FLOPs of the points (m,), rising."""
    log_loss: Array
    """Their log losses (m,), less the luck of the best."""
    draws: Array
    """The same in every draw (samples, m)."""

    def line(self) -> LossLine:
        """The best loss against training FLOPs, over its own budgets alone."""
        ends = float(np.exp(self.log_c[0])), float(np.exp(self.log_c[-1]))
        return LossLine(ends, self.loss, self.drawn, np.nan, UNKNOWN, decades=0.0)

    def loss(self, flops: npt.ArrayLike) -> Array:
        """The loss at training FLOPs (k,); NaN beyond the points."""
        return self._joined(self.log_loss[None], flops)[0]

    def drawn(self, flops: npt.ArrayLike) -> Array:
        """The loss at training FLOPs (k,) in every draw: (samples, k)."""
        return self._joined(self.draws, flops)

    def _joined(self, log_loss: Array, flops: npt.ArrayLike) -> Array:
        log_c = np.log(np.atleast_1d(np.asarray(flops, float)))
        if np.isnan(log_loss).any():  # no spread is known
            return np.full((len(log_loss), len(log_c)), np.nan)
        inside = np.clip(log_c, self.log_c[0], self.log_c[-1])
        # More compute never makes the best loss worse: a point above an earlier one is that one's.
        falling = np.minimum.accumulate(log_loss, axis=1)
        joined = np.exp(PchipInterpolator(self.log_c, falling, axis=1)(inside))
        joined[:, np.abs(inside - log_c) > ROUNDING] = np.nan
        return np.asarray(joined, np.float64)


@dataclass(frozen=True)
class Candidates:
    """The mean log losses of one objective's runs of the same N and D, and which of the means belong to each budget."""

    rows: list[npt.NDArray[np.intp]]
    """The runs of each mean, as positions in the objective's table."""
    log_loss: Array
    noise: Noise
    budgets: list[npt.NDArray[np.intp]]
    """The means of each planned budget; each alone where the runs are a cloud without budgets."""

    @classmethod
    def of(cls, runs: pd.DataFrame, planned: Convention, unit: Unit, noise: Noise) -> Candidates:
        told = runs.assign(tokens=tokens_by_steps(runs))
        numbers = told.groupby(["params_nonembedding", "tokens"], sort=False).ngroup().to_numpy()
        rows = [np.flatnonzero(numbers == number) for number in range(numbers.max() + 1)]
        log_loss = np.log(losses(runs, unit)[0])
        flops = _means(runs[flops_column(planned)], rows)
        budgets: list[npt.NDArray[np.intp]] = []
        for members in budget_members(flops):
            budgets += [members] if is_budget(flops[members]) else [members[[i]] for i in np.argsort(flops[members])]
        return cls(rows, np.array([log_loss[group].mean() for group in rows]), noise.averaged(rows), budgets)

    def best(self, budget: npt.NDArray[np.intp]) -> int:
        """The mean of the lowest loss."""
        return int(budget[np.argmin(self.log_loss[budget])])

    def envelope(self, flops: Array) -> list[npt.NDArray[np.intp]]:
        """The budgets whose best no cheaper one beats, cheapest first; ``flops`` (means,) say what is cheap."""
        rising = sorted(self.budgets, key=lambda budget: flops[self.best(budget)])
        kept: list[npt.NDArray[np.intp]] = []
        for budget in rising:
            if not kept or self.log_loss[self.best(budget)] < self.log_loss[self.best(kept[-1])]:
                kept.append(budget)
        return kept

    def luck(self, budget: npt.NDArray[np.intp], spread: Spread) -> float:
        """By how much the best is expected to look better than it is; zero where no other comes near."""
        return float(_luck(self.log_loss[None, budget], np.array([spread.tau]), *self._few_draws(budget, spread))[0])

    def errors(self, budget: npt.NDArray[np.intp], spread: Spread) -> Array:
        """True less observed log loss of a budget's best, in every draw (samples,). NaN where no spread is known.

        The estimate of the truth is the lowest loss and its expected luck. Each draw makes it anew from the losses with
        other errors, and the draws scatter about the estimate as these do. They are skewed: where shapes come close,
        the lowest loss has its long tail below. Whether the truth lies there or on the other side depends on how far
        the shapes are really apart, which is not known, so every other draw is mirrored.
        """
        signs = np.where(np.arange(self.noise.samples) % 2, -1.0, 1.0)
        seen = self.log_loss[budget] + signs[:, None] * self.noise.draws(spread, budget)
        estimates = np.min(seen, axis=1)
        if len(budget) > 1 and spread.known:
            tau, few = self.noise.drawn_tau(spread), self._few_draws(budget, spread)
            for block in blocks(len(seen), LUCK_DRAWS * len(budget)):
                estimates[block] += _luck(seen[block], tau[block], *few)
        return self.luck(budget, spread) + signs * (estimates - self.log_loss[self.best(budget)])

    def means(self, column: pd.Series) -> Array:
        """The means of a column of the runs' table, in the order of ``rows``."""
        return _means(column, self.rows)

    def _few_draws(self, budget: npt.NDArray[np.intp], spread: Spread) -> tuple[Array, Array]:
        """Draws of a budget's known errors, and of its spread in units of tau: each (LUCK_DRAWS, k)."""
        own = self.noise.take(budget)
        return own.errors[:LUCK_DRAWS], own.between(spread.shared)[:LUCK_DRAWS]


def _luck(log_loss: Array, tau: Array, known: Array, between: Array) -> Array:
    """The expected luck of the lowest of log losses (m, k), for the spread tau of each row (m,).

    Observed less error is what might have been true. Its minimum falls short of the observed one as much as that falls
    short of the truth.

    Args:
        log_loss: Log losses (m, k).
        tau: Their spread beyond their known errors (m,).
        known: Draws of their known errors (draws, k).
        between: Draws of their spread in units of tau (draws, k).
    """
    errors = known + tau[:, None, None] * between
    best = np.argmin(log_loss, axis=1)[:, None]
    lowest = np.min(log_loss[:, None] - errors, axis=2)
    of_best = np.take_along_axis(errors, best[:, None], axis=2)[:, :, 0]
    return np.asarray((np.take_along_axis(log_loss, best, axis=1) - lowest - of_best).mean(axis=1))


def fit_envelope(
    runs: pd.DataFrame,
    convention: Convention,
    planned: Convention,
    unit: Unit,
    noise: Noise,
    seed: int = 0,
    *,
    spread: Spread = UNKNOWN,
) -> EnvelopeFit:
    """The envelope of one objective's runs and its power law (arguments as for ``fit_objective``).

    Args:
        planned: The convention by which the runs' budgets are equal (``planned_convention``): a budget's best is the
            best of equals, whichever FLOPs are then read off it.
        spread: The spread of the runs beyond their known errors. Unknown: the scatter of the points about the law.
    """
    shapes = Candidates.of(runs, planned, unit, noise)
    flops = shapes.means(runs[flops_column(convention)])
    budgets = shapes.envelope(flops)
    best = [shapes.best(budget) for budget in budgets]
    points = [_point(runs.iloc[shapes.rows[i]], flops[i], shapes, i, unit) for i in best]
    log_c, log_loss = np.log(flops[best]), shapes.log_loss[best]
    if not spread.known and len(points) >= MIN_BUDGETS:
        spread = linear_spread(np.stack([np.ones_like(log_c), log_c], axis=1), log_loss, shapes.noise.take(best))
    luck = [shapes.luck(budget, spread) if spread.known else 0.0 for budget in budgets]
    log_true = log_loss + luck
    drawn = log_loss + np.stack([shapes.errors(budget, spread) for budget in budgets], axis=1)
    read_off = ReadOff(log_c, log_true, drawn) if len(points) > 1 else None
    if len(points) < MIN_BUDGETS:
        note = f"no fit, budgets on the envelope: {len(points)}; at least {MIN_BUDGETS} are needed; add budgets"
        return EnvelopeFit(convention, points, None, note, spread, read_off=read_off)
    errors = Noise.of_draws(log_true, drawn, seed)
    law = power_law(log_c, log_true, errors)
    curve = loss_curve(log_c, log_true, errors, law)
    return EnvelopeFit(convention, points, law, spread=spread, curve=curve, read_off=read_off)


def _means(column: pd.Series, rows: list[npt.NDArray[np.intp]]) -> Array:
    values = column.to_numpy(float)
    return np.array([values[group].mean() for group in rows])


def _point(members: pd.DataFrame, flops: float, shapes: Candidates, number: int, unit: Unit) -> EnvelopePoint:
    loss = float(np.exp(shapes.log_loss[number]))
    known, alone = shapes.noise.model != "scatter", float(losses(members, unit)[1][0])
    stderr = float(np.sqrt(shapes.noise.variances[number])) * loss if known else alone if len(members) == 1 else np.nan
    first = members.iloc[0]
    return EnvelopePoint(float(flops), loss, stderr, str(first["run"]), str(first["shape"]), len(members))
