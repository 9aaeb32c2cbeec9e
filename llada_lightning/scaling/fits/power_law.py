"""A power law of training FLOPs, fitted in log space."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from llada_lightning.errors import UserError
from llada_lightning.scaling.fits.estimate import Array, Estimate, interval

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
    spread: float
    """Standard deviation of log y beyond the errors that are known (tau of the noise model)."""
    draws: Array = field(repr=False, compare=False)
    """Bootstrapped (log a, b), one row a draw."""
    sign: Literal[-1, 1] = -1

    @property
    def exponent(self) -> Estimate:
        """b with its interval."""
        return Estimate(self.b, *self.interval_b)

    def value(self, flops: npt.ArrayLike) -> Array:
        """y at given training FLOPs."""
        return self.a * (np.asarray(flops, float) / self.c0) ** (self.sign * self.b)

    loss = value

    def flops(self, value: npt.ArrayLike) -> Array:
        """The training FLOPs at which y is reached."""
        return self.c0 * (np.asarray(value, float) / self.a) ** (self.sign / self.b)

    def drawn(self, flops: npt.ArrayLike) -> Array:
        """y at given FLOPs in every draw: (samples, *flops.shape)."""
        distance = self.sign * np.log(np.atleast_1d(np.asarray(flops, float)) / self.c0)
        return np.exp(self.draws[:, :1] + self.draws[:, 1:] * distance)

    def band(self, flops: npt.ArrayLike) -> tuple[Array, Array]:
        """Lower and upper end of the 95 % interval of y at given FLOPs."""
        return interval(self.drawn(flops))

    def as_dict(self) -> dict[str, Any]:
        names = ("a", "b", "c0", "interval_a", "interval_b", "residual", "spread")
        return {"sign": self.sign, **{name: getattr(self, name) for name in names}}


def check_budgets(count: int) -> None:
    """Raises UserError where a power law is asked of fewer than three budgets."""
    if count < MIN_BUDGETS:
        missing = MIN_BUDGETS - count
        raise UserError(
            f"fit: {count} budgets, a power law needs at least {MIN_BUDGETS}; run {missing} more budget"
            + ("s" if missing > 1 else "")
        )
