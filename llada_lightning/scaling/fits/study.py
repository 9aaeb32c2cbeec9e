"""All fits of a results table: every objective, method and convention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llada_lightning.scaling.fits.checks import Disagreement, HeldOut
from llada_lightning.scaling.fits.envelope import EnvelopeFit
from llada_lightning.scaling.fits.estimate import INTERVAL
from llada_lightning.scaling.fits.isoflop import IsoflopFit
from llada_lightning.scaling.fits.multiplier import Multiplier
from llada_lightning.scaling.fits.parametric import ParametricFit
from llada_lightning.scaling.fits.runs import Unit
from llada_lightning.scaling.flops import Convention


@dataclass(frozen=True)
class ObjectiveFits:
    """One objective by all methods; ``parametric`` is None where there are too few runs, and its note says so."""

    objective: str
    envelope: dict[Convention, EnvelopeFit]
    isoflop: dict[Convention, IsoflopFit]
    parametric: ParametricFit | None
    parametric_note: str | None


@dataclass(frozen=True)
class StudyFits:
    """All fits of a results table in one unit, with their settings."""

    unit: Unit
    samples: int
    seed: int
    noise_model: str
    conventions: tuple[Convention, ...]
    objectives: dict[str, ObjectiveFits]
    compute_multiplier: list[Multiplier]
    multiplier_curve: list[Multiplier]
    held_out: list[HeldOut]
    disagreements: list[Disagreement]
    notes: list[str]

    def envelopes(self, convention: Convention) -> dict[str, EnvelopeFit]:
        """Each objective's envelope by a convention."""
        return {name: fits.envelope[convention] for name, fits in self.objectives.items()}
