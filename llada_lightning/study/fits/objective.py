"""All fits of one objective's runs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd

from llada_lightning.compute.flops import Convention
from llada_lightning.study.fits.envelope import EnvelopeFit, fit_envelope
from llada_lightning.study.fits.isoflop import IsoflopFit, fit_isoflop, parabola_spread
from llada_lightning.study.fits.least_squares import LossCurve
from llada_lightning.study.fits.lines import LossLine
from llada_lightning.study.fits.parametric import ParametricFit, fit_parametric, too_few
from llada_lightning.study.fits.runs import Unit, losses, planned_convention
from llada_lightning.study.fits.uncertainty import UNKNOWN, Noise, Spread, best_known

Method = Literal["read-off", "joint", "isoflop", "parametric", "envelope"]
METHODS: tuple[Method, ...] = get_args(Method)
"""``envelope``: the bent curve through the best losses. ``joint`` is a fit of two objectives (``joint``)."""


@dataclass(frozen=True)
class ObjectiveFits:
    """One objective by all methods; ``parametric`` is None where there are too few runs, as its note explains."""

    objective: str
    """The name of the objective, with the variant in brackets where it is not the default recipe."""
    envelope: dict[Convention, EnvelopeFit]
    isoflop: dict[Convention, IsoflopFit]
    parametric: ParametricFit | None
    parametric_note: str | None
    spread: Spread
    """The spread of log loss between runs beyond their known errors, which the envelope and the isoFLOP fit use."""
    error: float
    """The known standard error of log loss of a run, the median over the runs; 0 where none is known."""

    def line(self, method: Method, convention: Convention) -> LossLine | None:
        """The best loss against FLOPs by a method; None where it has no fit, or one that the data leave open."""
        envelope, isoflop, parametric = self.envelope[convention], self.isoflop[convention], self.parametric
        if method == "read-off":
            return envelope.read_off.line() if envelope.read_off else None
        if method == "envelope":
            return _line_of(envelope.curve, envelope.flops_range) if envelope.curve else None
        if method == "isoflop":
            return _line_of(isoflop.loss_curve, isoflop.flops_range) if isoflop.loss_curve else None
        if method == "parametric" and parametric and parametric.converged:
            return LossLine(
                parametric.flops_ranges[convention],
                partial(parametric.frontier_loss, convention),
                partial(parametric.drawn_frontier, convention),
                parametric.misfit,
                parametric.scatter.beyond(self.spread),
            )
        return None

    def notes(self) -> list[str]:
        """The notes of the fits, each with the name of its fit."""
        found = [
            f"{self.objective}, {method}, {convention}: {fit.note}"
            for method, fits in (("envelope", self.envelope), ("isoflop", self.isoflop))
            for convention, fit in fits.items()
            if fit.note
        ]
        biased = [
            f"{self.objective}, isoflop, {convention}: N_opt at {budget.flops:.2g} FLOPs moves by "
            f"{budget.bias:.0%} with a cubic term or without the outermost shapes, beyond its interval; narrow the "
            "grid about it"
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


def _line_of(curve: LossCurve, flops_range: tuple[float, float]) -> LossLine:
    return LossLine(flops_range, curve.loss, curve.drawn, curve.misfit, curve.scatter)


def fit_objective(
    objective: str,
    runs: pd.DataFrame,
    conventions: tuple[Convention, ...],
    unit: Unit,
    noise: Noise,
    seed: int = 0,
    *,
    borrowed: Spread = UNKNOWN,
) -> ObjectiveFits:
    """Every method on one objective's runs.

    Args:
        objective: The name of the objective, with its variant.
        runs: The usable runs of the objective.
        conventions: The conventions by which the FLOPs are counted.
        unit: The unit of the losses.
        noise: The noise of these runs, in their order.
        seed: The seed of the draws of the laws' own spread.
        borrowed: The residual spread of the parabolas of another objective, for where the parabolas of this one have
            no degrees of freedom.
    """
    lacking = too_few(runs)
    planned = planned_convention(runs, conventions)
    own = parabola_spread(runs, planned, unit, noise)
    by_parabolas = best_known(own, borrowed)
    parametric = None if lacking else fit_parametric(runs, conventions, unit, noise, parabolas=by_parabolas)
    borrowed = best_known(borrowed, parametric.scatter if parametric else UNKNOWN)
    # A fit that misses its points tells more than the losses scatter in all.
    scatter = float(np.std(np.log(losses(runs, unit)[0])))
    spread = best_known(own, borrowed).at_most(scatter)
    return ObjectiveFits(
        objective,
        {name: fit_envelope(runs, name, planned, unit, noise, seed, spread=spread) for name in conventions},
        {name: fit_isoflop(runs, name, unit, noise, seed, borrowed=borrowed) for name in conventions},
        parametric,
        lacking,
        spread,
        float(np.sqrt(np.median(noise.variances))),
    )
