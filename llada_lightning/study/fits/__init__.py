"""Fits of validation loss against training FLOPs, and the ratio of compute between the two objectives.

Three methods: the power law of the loss envelope, isoFLOP parabolas, and the parametric law L(N, D). ``fit_table`` runs
all of them; ``noise`` says where the intervals come from.
"""

from llada_lightning.study.fits.checks import Disagreement, HeldOut
from llada_lightning.study.fits.envelope import EnvelopeFit, EnvelopePoint, fit_envelope
from llada_lightning.study.fits.estimate import INTERVAL, Estimate
from llada_lightning.study.fits.isoflop import MIN_SHAPES, IsoflopBudget, IsoflopFit, LossCurve, fit_isoflop
from llada_lightning.study.fits.multiplier import METHODS, Method, Multiplier, compute_multipliers
from llada_lightning.study.fits.noise import NOISE_MODELS, Noise, NoiseModel, noise_of_runs, run_names
from llada_lightning.study.fits.objective import ObjectiveFits, fit_objective
from llada_lightning.study.fits.parametric import HUBER_DELTA, Frontier, ParametricFit, fit_parametric
from llada_lightning.study.fits.power_law import MIN_BUDGETS, PowerLaw
from llada_lightning.study.fits.runs import (
    BUDGET_TOLERANCE,
    OBJECTIVES,
    UNIT_NAMES,
    UNITS,
    VAL_KINDS,
    Unit,
    best_of_budgets,
    budget_groups,
    check_comparable,
    flops_column,
    losses,
    usable_runs,
)
from llada_lightning.study.fits.study import StudyFits, fit_table

__all__ = [
    "BUDGET_TOLERANCE", "HUBER_DELTA", "INTERVAL", "METHODS", "MIN_BUDGETS", "MIN_SHAPES", "NOISE_MODELS",
    "OBJECTIVES", "UNITS", "UNIT_NAMES", "VAL_KINDS", "Disagreement", "EnvelopeFit", "EnvelopePoint", "Estimate",
    "Frontier", "HeldOut", "IsoflopBudget", "IsoflopFit", "LossCurve", "Method", "Multiplier", "Noise", "NoiseModel",
    "ObjectiveFits", "ParametricFit", "PowerLaw", "StudyFits", "Unit", "best_of_budgets", "budget_groups",
    "check_comparable", "compute_multipliers", "fit_envelope", "fit_isoflop", "fit_objective",
    "fit_parametric", "fit_table", "flops_column", "losses", "noise_of_runs", "run_names",
    "usable_runs",
]  # fmt: skip
