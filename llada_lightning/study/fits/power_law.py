"""A power law of training FLOPs, fitted in log space."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from llada_lightning.study.fits.estimate import Array, Estimate, interval
from llada_lightning.study.fits.noise import Noise, Spread, fit_linear
from llada_lightning.support.errors import UserError

MIN_BUDGETS = 3
"""A line has two parameters: with fewer than three budgets nothing is left to judge it by."""


@dataclass(frozen=True)
class PowerLaw:
    """y = a * (C / c0)^(sign b): a loss falls with training FLOPs C (sign -1), an optimum of N or D grows (+1)."""

    a: float
    b: float
    c0: float
    interval_a: tuple[float, float]
    interval_b: tuple[float, float]
    residual: float
    """Root mean square of the residuals of log y."""
    scatter: Spread
    """Of log y beyond the errors that are known."""
    misfit: float
    """p-value of the test of lack of fit (``Noise.misfit``); NaN where it cannot be made."""
    draws: Array = field(repr=False, compare=False)
    """Bootstrapped (log a, b), one row a draw."""
    sign: Literal[-1, 1] = -1

    @property
    def exponent(self) -> Estimate:
        """b with its interval."""
        return Estimate(self.b, *self.interval_b)

    @property
    def spread(self) -> float:
        """tau of the noise model."""
        return self.scatter.tau

    def value(self, flops: npt.ArrayLike) -> Array:
        """y at given training FLOPs."""
        return self.a * (np.asarray(flops, float) / self.c0) ** (self.sign * self.b)

    loss = value

    def drawn(self, flops: npt.ArrayLike) -> Array:
        """y at given FLOPs in every draw: (samples, *flops.shape)."""
        distance = self.sign * np.log(np.atleast_1d(np.asarray(flops, float)) / self.c0)
        return np.exp(self.draws[:, :1] + self.draws[:, 1:] * distance)

    def band(self, flops: npt.ArrayLike) -> tuple[Array, Array]:
        """Lower and upper end of the 95 % interval of y at given FLOPs."""
        return interval(self.drawn(flops))

    def as_dict(self) -> dict[str, Any]:
        names = ("a", "b", "c0", "interval_a", "interval_b", "residual", "spread", "misfit")
        return {"sign": self.sign, **{name: getattr(self, name) for name in names}, "interval": self.exponent.interval}


def check_budgets(count: int) -> None:
    """Raises UserError where a power law is asked of fewer than three budgets."""
    if count < MIN_BUDGETS:
        missing = MIN_BUDGETS - count
        raise UserError(
            f"fit: {count} budgets, a power law needs at least {MIN_BUDGETS}; run {missing} more budget"
            + ("s" if missing > 1 else "")
        )


def power_law(log_c: Array, log_y: Array, noise: Noise, *, sign: Literal[-1, 1] = -1) -> PowerLaw:
    """A power law through points whose log y errs by ``noise``.

    Raises:
        UserError: fewer than three points.
    """
    check_budgets(len(log_c))
    log_c0 = float(log_c.mean())  # where a and b are nearly uncorrelated
    design = np.stack([np.ones_like(log_c), sign * (log_c - log_c0)], axis=1)
    fit = fit_linear(design, log_y, noise)
    low, high = interval(fit.draws)
    return PowerLaw(
        a=float(np.exp(fit.theta[0])),
        b=float(fit.theta[1]),
        c0=float(np.exp(log_c0)),
        interval_a=(float(np.exp(low[0])), float(np.exp(high[0]))),
        interval_b=(float(low[1]), float(high[1])),
        residual=fit.residual,
        scatter=fit.spread,
        misfit=noise.misfit(log_y, design),
        draws=fit.draws,
        sign=sign,
    )
