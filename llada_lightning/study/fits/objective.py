"""All fits of one objective's runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from llada_lightning.compute.flops import Convention
from llada_lightning.study.fits.envelope import EnvelopeFit, fit_envelope
from llada_lightning.study.fits.isoflop import IsoflopFit, LossCurve, fit_isoflop, parabola_spread
from llada_lightning.study.fits.multiplier import FrontierLine, Line, LossLine, Method
from llada_lightning.study.fits.noise import UNKNOWN, Noise, Spread, best_known
from llada_lightning.study.fits.parametric import ParametricFit, fit_parametric, what_lacks
from llada_lightning.study.fits.power_law import PowerLaw
from llada_lightning.study.fits.runs import Unit, planned_convention


@dataclass(frozen=True)
class ObjectiveFits:
    """One objective by all methods; ``parametric`` is None where there are too few runs, and its note says so."""

    objective: str
    envelope: dict[Convention, EnvelopeFit]
    isoflop: dict[Convention, IsoflopFit]
    parametric: ParametricFit | None
    parametric_note: str | None
    spread: Spread
    """Of the runs beyond their known errors, as envelope and isoFLOP take it."""

    def line(self, method: Method, convention: Convention) -> LossLine | None:
        """The best loss against FLOPs by a method; None where it has no fit, or one that the data leave open."""
        if method == "envelope":
            envelope = self.envelope[convention]
            return Line(envelope.law, envelope.flops_range) if envelope.law else None
        if method == "isoflop":
            isoflop = self.isoflop[convention]
            return Line(isoflop.loss_curve, isoflop.flops_range) if isoflop.loss_curve else None
        identified = self.parametric is not None and self.parametric.identified
        return FrontierLine(self.parametric, convention) if self.parametric and identified else None

    def misfit(self, method: Method, convention: Convention) -> float:
        """p-value of the lack of fit of what ``line`` gives; NaN where there is none, or no test of it."""
        if method == "envelope":
            fit: PowerLaw | LossCurve | ParametricFit | None = self.envelope[convention].law
        elif method == "isoflop":
            fit = self.isoflop[convention].loss_curve
        else:
            fit = self.parametric
        return fit.misfit if fit else np.nan

    def notes(self) -> list[str]:
        """What is to be said of the fits, each with the fit's name."""
        found = [
            f"{self.objective}, {method}, {convention}: {fit.note}"
            for method, fits in (("envelope", self.envelope), ("isoflop", self.isoflop))
            for convention, fit in fits.items()
            if fit.note
        ]
        biased = [
            f"{self.objective}, isoflop, {convention}: N_opt at {budget.flops:.2g} FLOPs moves by "
            f"{budget.bias:.0%} with a cubic term or without the outermost shapes, beyond its interval"
            for convention, fit in self.isoflop.items()
            for budget in fit.budgets
            if budget.bias is not None
        ]
        parametric = self.parametric.note if self.parametric else self.parametric_note
        return [*found, *biased, *([f"{self.objective}, parametric: {parametric}"] if parametric else [])]

    def as_dict(self) -> dict[str, Any]:
        return {
            "parametric": self.parametric.as_dict() if self.parametric else {"note": self.parametric_note},
            "isoflop": {name: fit.as_dict() for name, fit in self.isoflop.items()},
            "envelope": {name: fit.as_dict() for name, fit in self.envelope.items()},
        }


def fit_objective(
    objective: str,
    runs: pd.DataFrame,
    conventions: tuple[Convention, ...],
    unit: Unit,
    noise: Noise,
    seed: int = 0,
    *,
    lent: Spread = UNKNOWN,
) -> ObjectiveFits:
    """Every method on one objective's runs.

    Args:
        objective: ``arm`` or ``llada``.
        runs: its usable runs.
        conventions: by which its FLOPs are counted.
        unit: of the losses.
        noise: of these runs, in their order.
        seed: of the draws of the laws' own spread.
        lent: the other objective's scatter about its parabolas, for where this one's go through all their points.
    """
    lacking = what_lacks(runs)
    planned = planned_convention(runs, conventions)
    own = parabola_spread(runs, planned, unit, noise)
    by_parabolas = best_known(own, lent)
    parametric = None if lacking else fit_parametric(runs, conventions, unit, noise, parabolas=by_parabolas)
    lent = best_known(lent, parametric.scatter if parametric else UNKNOWN)
    spread = best_known(own, lent)
    return ObjectiveFits(
        objective,
        {name: fit_envelope(runs, name, planned, unit, noise, seed, spread=spread) for name in conventions},
        {name: fit_isoflop(runs, name, unit, noise, seed, lent=lent) for name in conventions},
        parametric,
        lacking,
        spread,
    )
