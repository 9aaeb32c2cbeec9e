"""IsoFLOP: a parabola of log loss in log N at each budget, and the power laws of its optimum
(Hoffmann et al. 2022, Approach 2)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from llada_lightning.scaling.fits.estimate import Array, Estimate, interval
from llada_lightning.scaling.fits.power_law import PowerLaw
from llada_lightning.scaling.flops import Convention


@dataclass(frozen=True)
class IsoflopBudget:
    """The parabola of one budget: log loss = c[0] + c[1] x + c[2] x^2, x = log N - center."""

    flops: float
    """Geometric mean of the runs' training FLOPs."""
    runs: tuple[str, ...]
    log_n: Array
    """Of non-embedding parameters, one for each run, as ``losses`` and ``stderr``."""
    losses: Array
    stderr: Array
    center: float
    coefficients: Array
    n_opt: Estimate
    d_opt: Estimate
    tokens_per_param: Estimate
    loss_opt: Estimate
    interior: bool
    """Whether the optimum lies between the smallest and the largest shape; if not, the laws leave it out."""
    grid_sensitivity: float | None
    """The largest relative change of N_opt by a cubic term or without the outermost shapes; None with under 5 shapes."""
    biased: bool
    """Whether that change goes beyond N_opt's interval."""
    draws: Array = field(repr=False, compare=False)
    """Bootstrapped coefficients (samples, 3)."""

    def curve(self, n: npt.ArrayLike) -> Array:
        """Loss at N non-embedding parameters."""
        x = np.log(np.asarray(n, float)) - self.center
        return np.exp(np.polynomial.polynomial.polyval(x, self.coefficients))

    def band(self, n: npt.ArrayLike) -> tuple[Array, Array]:
        """Lower and upper end of the 95 % interval of the loss at N."""
        x = np.log(np.atleast_1d(np.asarray(n, float))) - self.center
        return interval(np.exp(self.draws @ np.stack([np.ones_like(x), x, x * x])))

    def as_dict(self) -> dict[str, Any]:
        estimates = ("n_opt", "d_opt", "tokens_per_param", "loss_opt")
        return {
            "flops": self.flops,
            "runs": list(self.runs),
            "center_log_n": self.center,
            "coefficients": self.coefficients.tolist(),
            **{name: getattr(self, name).as_dict() for name in estimates},
            **{name: getattr(self, name) for name in ("interior", "grid_sensitivity", "biased")},
        }


@dataclass(frozen=True)
class LossCurve:
    """Optimal loss against training FLOPs: log loss = c[0] + c[1] x + c[2] x^2, x = log(C / c0)."""

    c0: float
    coefficients: Array
    draws: Array = field(repr=False, compare=False)

    def loss(self, flops: npt.ArrayLike) -> Array:
        x = np.log(np.asarray(flops, float) / self.c0)
        return np.exp(np.polynomial.polynomial.polyval(x, self.coefficients))

    def drawn(self, flops: npt.ArrayLike) -> Array:
        """The loss at given FLOPs in every draw: (samples, *flops.shape)."""
        x = np.log(np.atleast_1d(np.asarray(flops, float)) / self.c0)
        return np.exp(self.draws @ np.stack([np.ones_like(x), x, x * x]))

    def band(self, flops: npt.ArrayLike) -> tuple[Array, Array]:
        """Lower and upper end of the 95 % interval of the loss at given FLOPs."""
        return interval(self.drawn(flops))

    def as_dict(self) -> dict[str, Any]:
        return {"c0": self.c0, "coefficients": self.coefficients.tolist()}


@dataclass(frozen=True)
class IsoflopFit:
    """One objective's parabolas and, given three budgets with an optimum inside, the laws of N_opt, D_opt and loss.

    ``loss_curve`` is what the compute multiplier reads: a loss with an irreducible part is no power law.
    """

    convention: Convention
    budgets: list[IsoflopBudget]
    n_law: PowerLaw | None
    d_law: PowerLaw | None
    loss_law: PowerLaw | None
    loss_curve: LossCurve | None
    note: str | None = None

    @property
    def flops_range(self) -> tuple[float, float]:
        """Of the budgets that the laws go through."""
        flops = [budget.flops for budget in self.budgets if budget.interior]
        return min(flops), max(flops)

    def as_dict(self) -> dict[str, Any]:
        laws = {name: getattr(self, name) for name in ("n_law", "d_law", "loss_law", "loss_curve")}
        return {
            "convention": self.convention,
            "budgets": [budget.as_dict() for budget in self.budgets],
            **{name: law.as_dict() for name, law in laws.items() if law},
            **({"note": self.note} if self.note else {}),
        }
