"""The envelope: the best loss at each budget, and the power law through it.

Runs of one size and one number of tokens (seeds) are averaged before the best is looked for. The best of several is
lucky too: among shapes that are nearly as good, the one whose noise was lowest wins. So every draw looks for the best
anew, the law goes through the points less the luck that the draws show, and one objective with more seeds or shapes
gains nothing by it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from llada_lightning.compute.flops import Convention
from llada_lightning.study.fits.least_squares import MIN_BUDGETS, PowerLaw, linear_spread, power_law
from llada_lightning.study.fits.runs import Unit, budget_members, flops_column, is_budget, losses
from llada_lightning.study.fits.uncertainty import UNKNOWN, Array, Noise, Spread


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
    """One objective's envelope and, given enough budgets, the power law through it; else a ``note`` on why not."""

    convention: Convention
    points: list[EnvelopePoint]
    law: PowerLaw | None
    note: str | None = None
    spread: Spread = field(default=UNKNOWN, repr=False)
    """The spread of log loss between runs beyond their known errors."""

    @property
    def flops_range(self) -> tuple[float, float]:
        return self.points[0].flops, self.points[-1].flops

    def as_dict(self) -> dict[str, Any]:
        return {
            "convention": self.convention,
            "points": [point.as_dict() for point in self.points],
            **(self.law.as_dict() if self.law else {}),
            **({"note": self.note} if self.note else {}),
        }


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
        numbers = runs.groupby(["params_nonembedding", "tokens"], sort=False).ngroup().to_numpy()
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

    def errors(self, budget: npt.NDArray[np.intp], spread: Spread) -> Array:
        """True less observed log loss of a budget's best, in every draw (samples,), the choice of the best included."""
        return self._missed(budget, self.noise.draws(spread, budget))

    def chosen(self, budget: npt.NDArray[np.intp], spread: Spread) -> npt.NDArray[np.intp]:
        """The mean that is a budget's best in every draw (samples,), as ``errors`` takes it."""
        return budget[np.argmin(self._seen(budget, self.noise.draws(spread, budget)), axis=1)]

    def luck(self, budget: npt.NDArray[np.intp], spread: Spread) -> float:
        """By how much the best is expected to look better than it is; zero where no other comes near."""
        own = self.noise.take(budget)
        errors = own.errors + spread.tau * own.normals
        of_best = errors[:, int(np.argmin(self.log_loss[budget]))]
        return float(np.mean(self._missed(budget, errors) - of_best))

    def means(self, column: pd.Series) -> Array:
        """The means of a column of the runs' table, in the order of ``rows``."""
        return _means(column, self.rows)

    def _missed(self, budget: npt.NDArray[np.intp], errors: Array) -> Array:
        return self.log_loss[self.best(budget)] - np.min(self._seen(budget, errors), axis=1)

    def _seen(self, budget: npt.NDArray[np.intp], errors: Array) -> Array:
        # Observed less error is what might have been seen; its minimum over the shapes falls short of the truth as
        # much as the observed minimum did. The sign keeps an error that all runs share the same in all fits.
        return self.log_loss[budget] - errors


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
    if len(points) < MIN_BUDGETS:
        note = f"no fit, budgets on the envelope: {len(points)}; at least {MIN_BUDGETS} are needed"
        return EnvelopeFit(convention, points, None, note, spread)
    log_c, log_loss = np.log(flops[best]), shapes.log_loss[best]
    if not spread.known:
        spread = linear_spread(np.stack([np.ones_like(log_c), log_c], axis=1), log_loss, shapes.noise.take(best))
    log_true = log_loss + [shapes.luck(budget, spread) for budget in budgets]
    drawn = log_loss + np.stack([shapes.errors(budget, spread) for budget in budgets], axis=1)
    law = power_law(log_c, log_true, Noise.of_draws(log_true, drawn, seed))
    return EnvelopeFit(convention, points, law, spread=spread)


def _means(column: pd.Series, rows: list[npt.NDArray[np.intp]]) -> Array:
    values = column.to_numpy(float)
    return np.array([values[group].mean() for group in rows])


def _point(members: pd.DataFrame, flops: float, shapes: Candidates, number: int, unit: Unit) -> EnvelopePoint:
    loss = float(np.exp(shapes.log_loss[number]))
    known, alone = shapes.noise.known, float(losses(members, unit)[1][0])
    stderr = float(np.sqrt(shapes.noise.variances[number])) * loss if known else alone if len(members) == 1 else np.nan
    first = members.iloc[0]
    return EnvelopePoint(float(flops), loss, stderr, str(first["run"]), str(first["shape"]), len(members))
