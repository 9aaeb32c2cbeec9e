"""The envelope: the best loss at each budget, and the power law through it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llada_lightning.scaling.fits.power_law import PowerLaw
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
