"""Densities of the mask ratio t: how the points of the stratified uniform become mask ratios.

With t drawn from a density q, the weight 1/(p q(t)) keeps the expectation of Eq. 3, whatever q is. A density is given
by its quantiles (its inverse CDF), so that the points of the Weyl sequence stay stratified.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from llada_lightning.support.errors import UserError

Floats = npt.NDArray[np.float64]


class Density(ABC):
    """A density q of the mask ratio t.

    A class of one's own gives :meth:`draw`, and :attr:`support` where that is not (0, 1). The arguments of its
    constructor are its settings, and a part of the identity of a run.
    """

    @abstractmethod
    def draw(self, u_B: Floats) -> tuple[Floats, Floats]:
        """The quantiles of the density, and its values there.

        Args:
            u_B: (B,) float64 in (0, 1).

        Returns:
            (B,) float64 t with CDF(t) = u; (B,) float64 q(t), so that q(t) dt = du.
        """

    @property
    def support(self) -> tuple[float, float]:
        """The ends of the interval on which q is above 0."""
        return 0.0, 1.0

    @property
    def mean_ratio(self) -> float:
        """The mean of t. By default it is computed from the quantiles."""
        return self._mean_of_quantiles

    @cached_property
    def _mean_of_quantiles(self) -> float:
        return float(self.draw(midpoints(1 << 14))[0].mean())

    def at(self, step: int) -> Density:
        """The density of an optimizer step, counted from 0."""
        return self

    def mean_until(self, steps: int | None) -> float:
        """The mean of t over the first ``steps`` steps of a run; None: over a run without an end."""
        return self.mean_ratio

    @property
    def parts(self) -> tuple[Density, ...]:
        """The densities that it goes through."""
        return (self,)


@dataclass(frozen=True)
class Uniform(Density):
    """The uniform density on (0, 1), that of Eq. 3."""

    def draw(self, u_B: Floats) -> tuple[Floats, Floats]:
        return u_B, np.ones_like(u_B)

    @property
    def mean_ratio(self) -> float:
        return 0.5


@dataclass(frozen=True)
class Beta(Density):
    """The beta density t^(a-1) (1-t)^(b-1) / B(a, b).

    Args:
        a: The exponent at t = 0 plus 1.
        b: The exponent at t = 1 plus 1.
    """

    a: float
    b: float

    def __post_init__(self) -> None:
        for name, value in {"a": self.a, "b": self.b}.items():
            _check(value > 0, name, value, "it must be above 0")

    def draw(self, u_B: Floats) -> tuple[Floats, Floats]:
        from scipy import special  # here: most runs need none of it

        t_B = special.betaincinv(self.a, self.b, u_B)
        log_q_B = special.xlogy(self.a - 1, t_B) + special.xlog1py(self.b - 1, -t_B) - special.betaln(self.a, self.b)
        return t_B, np.exp(log_q_B)

    @property
    def mean_ratio(self) -> float:
        return self.a / (self.a + self.b)


@dataclass(frozen=True)
class LogitNormal(Density):
    """The density of t whose logit, ln(t / (1 - t)), is normal.

    Args:
        mean: The mean of the logit; the median of t is at 1 / (1 + exp(-mean)).
        deviation: The standard deviation of the logit.
    """

    mean: float = 0.0
    deviation: float = 1.0

    def __post_init__(self) -> None:
        _check(self.deviation > 0, "deviation", self.deviation, "it must be above 0")

    def draw(self, u_B: Floats) -> tuple[Floats, Floats]:
        from scipy import special

        z_B = special.ndtri(u_B)
        x_B = self.mean + self.deviation * z_B
        log_slope_B = special.log_expit(x_B) + special.log_expit(-x_B)  # of dt/dx = t (1 - t)
        log_q_B = -(z_B**2) / 2 - math.log(math.sqrt(2 * math.pi) * self.deviation) - log_slope_B
        return special.expit(x_B), np.exp(log_q_B)


@dataclass(frozen=True)
class Range(Density):
    """The uniform density on a part of (0, 1). Outside of it t is never drawn, so that its loss is a surrogate.

    Args:
        low: The lower end.
        high: The upper end.
    """

    low: float
    high: float

    def __post_init__(self) -> None:
        for name, value in {"low": self.low, "high": self.high}.items():
            _check(0 <= value <= 1, name, value, "it must lie within 0 and 1")
        _check(self.low < self.high, "low", self.low, f"it must be below high, {self.high:g}")

    def draw(self, u_B: Floats) -> tuple[Floats, Floats]:
        width = self.high - self.low
        return self.low + width * u_B, np.full_like(u_B, 1 / width)

    @property
    def support(self) -> tuple[float, float]:
        return self.low, self.high

    @property
    def mean_ratio(self) -> float:
        return (self.low + self.high) / 2


@dataclass(frozen=True)
class Between(Density):
    """The density whose quantiles are a share of the way from those of one density to those of another.

    So a range moves its ends. By q(t) dt = du, 1/q is the same mean of both 1/q.
    """

    start: Density
    end: Density
    share: float

    def draw(self, u_B: Floats) -> tuple[Floats, Floats]:
        (start_t_B, start_q_B), (end_t_B, end_q_B) = self.start.draw(u_B), self.end.draw(u_B)
        with np.errstate(divide="ignore"):  # where a q is 0, or infinite, so is this one
            inverse_B = (1 - self.share) / start_q_B + self.share / end_q_B
            return (1 - self.share) * start_t_B + self.share * end_t_B, 1 / inverse_B

    @property
    def support(self) -> tuple[float, float]:
        (start_low, start_high), (end_low, end_high) = self.start.support, self.end.support
        share = self.share
        return (1 - share) * start_low + share * end_low, (1 - share) * start_high + share * end_high

    @property
    def mean_ratio(self) -> float:
        return (1 - self.share) * self.start.mean_ratio + self.share * self.end.mean_ratio


@dataclass(frozen=True)
class Curriculum(Density):
    """A density that moves from one to another over the first steps of a run, and then stays; see :class:`Between`.

    It is a function of the step alone, so that runs of several lengths share their beginning.

    Args:
        start: The density of the first step.
        end: The density from step ``steps`` on.
        steps: The number of optimizer steps from one to the other.
    """

    start: Density
    end: Density
    steps: int

    def __post_init__(self) -> None:
        _check(self.steps >= 1, "steps", self.steps, "it must be at least 1")
        for name, density in {"start": self.start, "end": self.end}.items():
            if isinstance(density, Curriculum):
                raise UserError(f"{name}: a curriculum given; give a density that stays as it is")

    def draw(self, u_B: Floats) -> tuple[Floats, Floats]:
        """As at the end of the curriculum."""
        return self.end.draw(u_B)

    def at(self, step: int) -> Density:
        if step == 0:
            return self.start
        return self.end if step >= self.steps else Between(self.start, self.end, step / self.steps)

    @property
    def support(self) -> tuple[float, float]:
        return self.end.support

    @property
    def mean_ratio(self) -> float:
        return self.end.mean_ratio

    def mean_until(self, steps: int | None) -> float:
        if steps is None:
            return self.mean_ratio
        steps = max(1, steps)
        moving = min(steps, self.steps)  # steps s with a share of s / self.steps; all others have 1
        share = (moving * (moving - 1) / 2 / self.steps + steps - moving) / steps
        return (1 - share) * self.start.mean_ratio + share * self.end.mean_ratio

    @property
    def parts(self) -> tuple[Density, ...]:
        return self.start, self.end


def _check(holds: bool, name: str, value: float, wanted: str) -> None:
    if not holds:
        raise UserError(f"{name}: {value:g} given; {wanted}")


def midpoints(count: int) -> Floats:
    """(count,) float64: the middles of as many equal parts of (0, 1)."""
    return (np.arange(count) + 0.5) / count


# --- what a density allows --------------------------------------------------------------------------------------------


def covers_all_ratios(density: Density | None) -> bool:
    """Whether a density has mass on all of (0, 1), at every step. None is the uniform density."""
    return density is None or all(part.support == (0.0, 1.0) for part in density.parts)


def end_without_mass(density: Density) -> float | None:
    """The end of a support at which 1/q grows too fast for an average of it to settle; None: there is none.

    At t = 0, the weight 1/(p q(t)) of the bound times the tokens that are masked is about 1/q. Its second moment is
    that of dt/q, which is infinite where q falls faster than in proportion to the distance from the end. Then the mean
    over a run has no standard error. (In proportion, the moment grows with the logarithm of the number of sequences
    only, and means are still normal.) What less than one sequence of 10^9 draws counts as never drawn.
    """
    for part in density.parts:
        for end, u_2 in zip(part.support, (np.array([1e-9, 1e-6]), 1 - np.array([1e-9, 1e-6])), strict=True):
            (nearer_t, t), (nearer_q, q) = (values.tolist() for values in part.draw(u_2))
            nearer, distance = abs(nearer_t - end), abs(t - end)
            if nearer_q < q and (nearer_q == 0 or math.log(q / nearer_q) > (1 + 1e-3) * math.log(distance / nearer)):
                return end
    return None


DENSITIES: dict[str, type[Density]] = {
    "uniform": Uniform,
    "beta": Beta,
    "logit_normal": LogitNormal,
    "range": Range,
    "curriculum": Curriculum,
}
"""The densities by their names in `data.density`."""

OURS = frozenset(DENSITIES.values())
"""Those of the package, which need no check of a user's class."""


def register(name: str, density: type[Density]) -> None:
    """Add a density to the table.

    Raises:
        UserError: The table has another density of this name.
    """
    if DENSITIES.setdefault(name, density) is not density:
        raise UserError(f"density: there is another one '{name}'; choose another name")
