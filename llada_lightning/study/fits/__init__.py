"""Fits of validation loss against training FLOPs, and ratios of compute between objectives.

Three methods: the power law of the loss envelope, isoFLOP parabolas, and the parametric law L(N, D). ``fit_table`` runs
all of them; ``noise`` explains the intervals.
"""

from llada_lightning.study.fits.envelope import EnvelopeFit, EnvelopePoint, fit_envelope
from llada_lightning.study.fits.fit_table import StudyFits, fit_table
from llada_lightning.study.fits.isoflop import MIN_SHAPES, IsoflopBudget, IsoflopFit, LossCurve, fit_isoflop
from llada_lightning.study.fits.least_squares import INTERVAL, MIN_BUDGETS, Estimate, PowerLaw
from llada_lightning.study.fits.multiplier import Disagreement, Multiplier, compute_multipliers
from llada_lightning.study.fits.objective import METHODS, HeldOut, Method, ObjectiveFits, fit_objective
from llada_lightning.study.fits.parametric import HUBER_DELTA, Frontier, ParametricFit, fit_parametric
from llada_lightning.study.fits.runs import (
    BUDGET_TOLERANCE,
    UNIT_NAMES,
    UNITS,
    Unit,
    best_of_budgets,
    budget_groups,
    check_comparable,
    flops_column,
    losses,
    named_variants,
    objective_names,
    usable_runs,
)
from llada_lightning.study.fits.uncertainty import NOISE_MODELS, Noise, NoiseModel, noise_of_runs, run_names

__all__ = [
    "BUDGET_TOLERANCE", "HUBER_DELTA", "INTERVAL", "METHODS", "MIN_BUDGETS", "MIN_SHAPES", "NOISE_MODELS", "UNITS",
    "UNIT_NAMES", "Disagreement", "EnvelopeFit", "EnvelopePoint", "Estimate", "Frontier", "HeldOut", "IsoflopBudget",
    "IsoflopFit", "LossCurve", "Method", "Multiplier", "Noise", "NoiseModel", "ObjectiveFits", "ParametricFit",
    "PowerLaw", "StudyFits", "Unit", "best_of_budgets", "budget_groups", "check_comparable", "compute_multipliers",
    "fit_envelope", "fit_isoflop", "fit_objective", "fit_parametric", "fit_table", "flops_column", "losses",
    "named_variants", "noise_of_runs", "objective_names", "run_names", "usable_runs",
]  # fmt: skip
