"""Densities of the mask ratio t: how the points of the stratified uniform become mask ratios.

With t drawn from a density q, the weight 1/(p q(t)) keeps the expectation of Eq. 3, whatever q is. A density is given
by its quantiles (its inverse CDF), so that the points of the Weyl sequence stay stratified. A setting names one of the
table :data:`DENSITIES` with its arguments, or a class of the user's by ``class_path``.
"""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from typing import Any, get_type_hints

import numpy as np
import numpy.typing as npt

from llada_lightning.support.errors import UserError
from llada_lightning.support.printing import shortened
from llada_lightning.support.security import import_named

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
        return float(self.draw(_midpoints(1 << 14))[0].mean())

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


def _midpoints(count: int) -> Floats:
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


def _check_consistent(density: Density) -> None:
    """Refuse a class of the user's whose t and q do not belong together: its weights would be wrong without a sign.

    Raises:
        UserError: What does not hold.
    """
    u_N = np.concatenate([[2.0**-53], _midpoints(4096), [1 - 2.0**-53]])
    t_N, q_N = (np.asarray(values, dtype=np.float64) for values in density.draw(u_N))
    if t_N.shape != u_N.shape or q_N.shape != u_N.shape:
        raise UserError(
            f"draw gives shapes {t_N.shape} and {q_N.shape} for {len(u_N)} quantiles; give a value for each"
        )
    if not ((t_N >= 0) & (t_N <= 1)).all():
        raise UserError("draw gives mask ratios outside of (0, 1); correct it")
    steps_N, (below_N, above_N) = np.diff(t_N), (q_N[:-1], q_N[1:])
    inner = slice(1, -1)  # q may be infinite at the ends
    least_N, most_N = np.minimum(below_N, above_N)[inner], np.maximum(below_N, above_N)[inner]
    du = u_N[2] - u_N[1]
    holds_N = (least_N > 0) & (0.95 * du <= steps_N[inner] * most_N) & (steps_N[inner] * least_N <= 1.05 * du)
    if not holds_N.all():
        at = float(u_N[1 + int(np.argmin(holds_N))])
        raise UserError(f"draw gives t and q(t) of which q(t) dt is not du, near u = {at:.4g}; correct one of them")
    low, high = density.support
    if not 0 <= low < high <= 1:
        raise UserError(f"its support ({low:g}, {high:g}) is no part of (0, 1)")
    for end, place in ((low, 0), (high, -1)):
        if min(q_N[place], 1.0) * abs(t_N[place] - end) > 1e6 * 2.0**-53:
            raise UserError(f"it has no mass between its support's end {end:g} and {t_N[place]:.4g}; correct `support`")


# --- settings ---------------------------------------------------------------------------------------------------------

DENSITIES: dict[str, type[Density]] = {
    "uniform": Uniform,
    "beta": Beta,
    "logit_normal": LogitNormal,
    "range": Range,
    "curriculum": Curriculum,
}
"""The densities by their names in `data.density`."""


def register(name: str, density: type[Density]) -> None:
    """Add a density to the table.

    Raises:
        UserError: The table has another density of this name.
    """
    if DENSITIES.setdefault(name, density) is not density:
        raise UserError(f"density: there is another one '{name}'; choose another name")


@dataclass(frozen=True)
class DensitySetting:
    """A density with the setting that it was made from, in a form that is the same however it was written.

    Args:
        density: The density.
        settings: ``name`` or ``class_path``, and the arguments, defaults included.
    """

    density: Density
    settings: Mapping[str, Any]

    def __str__(self) -> str:
        """For people and tables: `beta(a=1.5,b=1)`."""
        return _shown(self.settings)


def density_setting(given: Any, setting: str = "data.density") -> DensitySetting | None:
    """The density of a setting; None where it is the uniform one, which is the default.

    Args:
        given: None, a name of :data:`DENSITIES`, a mapping with ``name`` and the arguments of the density, or a mapping
            with ``class_path`` and ``init_args``.
        setting: The name of the setting, for messages.

    Raises:
        UserError: There is no such density, or it refuses its arguments.
    """
    if given is None:
        return None
    made = _made(given, setting)
    return None if isinstance(made.density, Uniform) else made


def _made(given: Any, setting: str) -> DensitySetting:
    if hasattr(given, "as_dict"):  # a Namespace, as which the parser holds what has a class_path
        given = given.as_dict()
    given = {"name": given} if isinstance(given, str) else given
    if not isinstance(given, Mapping) or ("name" in given) == ("class_path" in given):
        raise UserError(
            f"{setting}: {shortened(given)} given; it must be a name with its arguments, such as "
            "{name: beta, a: 1.5, b: 1}, or a class_path with its init_args"
        )
    who = str(given.get("name", given.get("class_path")))
    if "name" in given:
        kind, arguments = _named(who, setting), {key: value for key, value in given.items() if key != "name"}
    else:
        kind, arguments = _imported(who, setting), given.get("init_args") or {}
        if set(given) - {"class_path", "init_args"} or not isinstance(arguments, Mapping):
            raise UserError(f"{setting}: {shortened(given)} given; beside class_path there is init_args, a mapping")
    bound = _bound(kind, arguments, setting, who)
    try:
        density = kind(**{key: getattr(value, "density", value) for key, value in bound.items()})
        if kind not in _OURS:
            _check_consistent(density)
    except UserError as error:
        raise UserError(f"{setting}: {who}: {error}") from error
    except Exception as error:  # whatever a class of the user raises
        raise UserError(f"{setting}: {who} fails ({type(error).__name__}: {shortened(error)}); correct it") from error
    plain = {key: getattr(value, "settings", value) for key, value in bound.items()}
    return DensitySetting(
        density, {"name": who, **plain} if "name" in given else {"class_path": who, "init_args": plain}
    )


_OURS = frozenset(DENSITIES.values())


def _named(name: str, setting: str) -> type[Density]:
    if name not in DENSITIES:
        near = get_close_matches(name, DENSITIES, 1)
        nearest = f"the nearest is {near[0]}; " if near else ""
        raise UserError(
            f"{setting}: '{shortened(name)}' is no density; {nearest}choose from {', '.join(DENSITIES)}, or give a "
            "class_path"
        )
    return DENSITIES[name]


def _imported(class_path: str, setting: str) -> type[Density]:
    try:
        kind = import_named(class_path)
    except UserError as error:
        raise UserError(f"{setting}: {error}") from error
    if not (isinstance(kind, type) and issubclass(kind, Density)):
        raise UserError(f"{setting}: '{shortened(class_path)}' is no subclass of {__name__}.Density; name one")
    return kind


def _bound(kind: type[Density], arguments: Mapping[str, Any], setting: str, who: str) -> dict[str, Any]:
    """The arguments of a constructor with its defaults: numbers, and densities, where they are declared."""
    signature = inspect.signature(kind)
    taken = f"it takes {', '.join(signature.parameters) or 'none'}"
    for key in map(str, arguments):
        if key not in signature.parameters:
            near = get_close_matches(key, signature.parameters, 1)
            nearest = f"the nearest is {near[0]}" if near else taken
            raise UserError(f"{setting}: {who} has no argument '{shortened(key)}'; {nearest}")
    try:
        bound = signature.bind(**arguments)
    except TypeError as error:
        raise UserError(f"{setting}: {who}: {error}; {taken}") from error
    bound.apply_defaults()
    try:
        declared = get_type_hints(kind.__init__)
    except NameError:  # of a class of the user's, whose types only a type checker can read
        declared = {}
    return {
        key: _made(value, f"{setting}.{key}")
        if declared.get(key) is Density
        else _number(value, declared.get(key), f"{setting}: {who}: {key}")
        for key, value in bound.arguments.items()
    }


def _number(value: Any, declared: Any, who: str) -> Any:
    """A value of a setting: where a number is declared, one."""
    if declared not in (int, float):
        return value
    try:
        number = math.nan if isinstance(value, bool) else float(value)  # YAML 1.1 reads 1e-3 as a string
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number) or (declared is int and not number.is_integer()):
        raise UserError(f"{who}: {shortened(value)} given; it must be a {'whole ' * (declared is int)}number")
    return declared(number)


def _shown(value: Any) -> str:
    """A setting in one short line, with the same text for 1 and 1.0."""
    if isinstance(value, Mapping) and ("name" in value or "class_path" in value):
        arguments = value["init_args"] if "class_path" in value else {k: v for k, v in value.items() if k != "name"}
        inner = ",".join(f"{key}={_shown(item)}" for key, item in arguments.items())
        name = value.get("name", value.get("class_path"))
        return f"{name}({inner})" if inner else str(name)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).replace(";", ",")  # which parts the settings of a variant
