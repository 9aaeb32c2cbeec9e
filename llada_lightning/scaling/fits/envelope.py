"""The envelope: the best loss at each budget, and the power law through it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from llada_lightning.scaling.fits.noise import Noise
from llada_lightning.scaling.fits.power_law import MIN_BUDGETS, PowerLaw, power_law
from llada_lightning.scaling.fits.runs import Unit, budget_members, flops_column, is_budget, losses
from llada_lightning.scaling.flops import Convention


@dataclass(frozen=True)
class EnvelopePoint:
    """The best run of a budget: its training FLOPs, its loss with standard error (NaN if unknown), its names."""

    flops: float
    loss: float
    stderr: float
    run: str
    shape: str

    def as_dict(self) -> dict[str, Any]:
        return dict(vars(self))


@dataclass(frozen=True)
class EnvelopeFit:
    """One objective's envelope and, given enough budgets, the power law through it; else ``note`` says what lacks."""

    convention: Convention
    points: list[EnvelopePoint]
    law: PowerLaw | None
    note: str | None = None

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


def fit_envelope(runs: pd.DataFrame, convention: Convention, unit: Unit, noise: Noise) -> EnvelopeFit:
    """The envelope of one objective's runs and its power law.

    Args:
        runs: usable runs of one objective.
        convention: which FLOPs a budget counts.
        unit: of the losses.
        noise: of these runs, in their order.
    """
    rows = envelope_rows(runs, convention, unit)
    points = _points(runs, rows, convention, unit)
    if len(points) < MIN_BUDGETS:
        note = f"no fit, budgets on the envelope: {len(points)}; at least {MIN_BUDGETS} are needed"
        return EnvelopeFit(convention, points, None, note)
    log_c, log_loss = (np.log([getattr(point, name) for point in points]) for name in ("flops", "loss"))
    return EnvelopeFit(convention, points, power_law(log_c, log_loss, noise.take(rows)))


def envelope_points(runs: pd.DataFrame, convention: Convention, unit: Unit) -> list[EnvelopePoint]:
    """The points of ``envelope_rows``."""
    return _points(runs, envelope_rows(runs, convention, unit), convention, unit)


def envelope_rows(runs: pd.DataFrame, convention: Convention, unit: Unit) -> list[int]:
    """Row positions of the best run of each budget that no cheaper run beats, cheapest first.

    Where runs were planned to be equal by the other convention, by this one they do not fall into budgets: the
    envelope is then the edge of the cloud.
    """
    flops = runs[flops_column(convention)].to_numpy(float)
    loss, _ = losses(runs, unit)
    rows: list[int] = []
    for members in budget_members(flops):
        best = [members[np.argmin(loss[members])]] if is_budget(flops[members]) else members[np.argsort(flops[members])]
        for row in best:
            if not rows or loss[row] < loss[rows[-1]]:
                rows.append(int(row))
    return rows


def _points(runs: pd.DataFrame, rows: list[int], convention: Convention, unit: Unit) -> list[EnvelopePoint]:
    members = runs.iloc[rows]
    flops = members[flops_column(convention)].to_numpy(float)
    loss, stderr = losses(members, unit)
    names = zip(members["run"].astype(str), members["shape"].astype(str), strict=True)
    return [
        EnvelopePoint(float(flops[i]), float(loss[i]), float(stderr[i]), run, shape)
        for i, (run, shape) in enumerate(names)
    ]
