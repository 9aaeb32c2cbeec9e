"""The parametric law L(N, D) = E + A / N^alpha + B / D^beta (Hoffmann et al. 2022, Approach 3)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from llada_lightning.scaling.fits.estimate import Array, Estimate, interval
from llada_lightning.scaling.fits.runs import TokenCost
from llada_lightning.scaling.flops import Convention


@dataclass(frozen=True)
class Frontier:
    """The optimum at given training FLOPs by the parametric law; each with the ends of its 95 % interval."""

    convention: Convention
    flops: Array
    n_opt: Array
    n_low: Array
    n_high: Array
    d_opt: Array
    d_low: Array
    d_high: Array
    loss: Array
    loss_low: Array
    loss_high: Array


@dataclass(frozen=True)
class ParametricFit:
    """E + A / N^alpha + B / D^beta, N non-embedding parameters and D training tokens."""

    E: Estimate
    A: Estimate
    alpha: Estimate
    B: Estimate
    beta: Estimate
    rms_residual: float
    """Root mean square of the residuals of log loss."""
    r_squared: float
    """Share of the variance of log loss that the law explains."""
    reduced_chi_square: float | None
    """Of log loss with the runs' own errors; None where they are not known."""
    spread: float
    """Standard deviation of log loss beyond the errors that are known (tau of the noise model)."""
    huber_delta: float
    gradient: float
    """Largest component of the objective's gradient at the point estimate over the sum of its terms' sizes."""
    identified: bool
    note: str | None
    theta: Array = field(repr=False)
    """(log E, log A', log alpha, log B', log beta) with N and D in units of their geometric means."""
    draws: Array = field(repr=False, compare=False)
    """Bootstrapped theta (samples, 5)."""
    log_n0: float = field(repr=False)
    log_d0: float = field(repr=False)
    costs: dict[Convention, TokenCost] = field(repr=False, compare=False)
    flops_ranges: dict[Convention, tuple[float, float]] = field(repr=False, compare=False)
