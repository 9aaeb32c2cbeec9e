"""`data.density`: the reading of the setting that names a density of the mask ratio.

It names one of the table of ``densities`` with its arguments, or a class of the user's by ``class_path``, of which is
checked that its mask ratios and its values belong together.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, get_type_hints

import numpy as np

from llada_lightning.objectives.densities import DENSITIES, OURS, Density, Uniform, midpoints
from llada_lightning.support.errors import UserError
from llada_lightning.support.printing import shortened
from llada_lightning.support.security import import_named


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
        if kind not in OURS:
            _check_consistent(density)
    except UserError as error:
        raise UserError(f"{setting}: {who}: {error}") from error
    except Exception as error:  # whatever a class of the user raises
        raise UserError(f"{setting}: {who} fails ({type(error).__name__}: {shortened(error)}); correct it") from error
    plain = {key: getattr(value, "settings", value) for key, value in bound.items()}
    return DensitySetting(
        density, {"name": who, **plain} if "name" in given else {"class_path": who, "init_args": plain}
    )


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
        raise UserError(
            f"{setting}: '{shortened(class_path)}' is no subclass of {Density.__module__}.Density; name one"
        )
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


def _check_consistent(density: Density) -> None:
    """Refuse a class of the user's whose t and q do not belong together: its weights would be wrong without a sign.

    Raises:
        UserError: What does not hold.
    """
    u_N = np.concatenate([[2.0**-53], midpoints(4096), [1 - 2.0**-53]])
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
