"""Sweeps: a W&B sweep file expanded into the commands of its runs, as ``wandb agent`` would render them.

The same file serves ``wandb sweep`` with ``wandb agent`` and ``llada sweep run`` on this machine
(``study/sweep/runner.py``). The format is W&B's: https://docs.wandb.ai/guides/sweeps/define-sweep-configuration.
"""

from __future__ import annotations

import itertools
import math
import os
import re
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llada_lightning.support.errors import UserError
from llada_lightning.support.printing import shortened
from llada_lightning.support.reading import FormatError, parse_yaml, read_yaml

Point = dict[str, Any]
"""One run of a sweep: parameter -> value."""

DEFAULT_COMMAND = ("${env}", "${interpreter}", "${program}", "${args}")
"""What W&B runs where the file names no command."""

MAX_RUNS = 100_000
"""Most runs of a sweep."""

_ENVIRONMENT_VARIABLE = re.compile(r"\$\{envvar:([A-Z0-9_]*)\}")
_MACRO = re.compile(r"\$\{.*\}")
_SINGLE_VALUE_DISTRIBUTIONS = frozenset({"constant", "categorical"})


@dataclass(frozen=True)
class Sweep:
    """A sweep file, expanded.

    Args:
        name: what the file calls the sweep, else the file's own name.
        program: what ``${program}`` stands for.
        command: the command with its macros, ``${args}`` last.
        points: the runs, in the grid's order.
        path: the file, where there is one.
    """

    name: str
    program: str | None
    command: tuple[str, ...]
    points: tuple[Point, ...]
    path: Path | None = None


def read_sweep(path: Path | str) -> Sweep:
    """Reads a W&B sweep file and expands its grid.

    Raises:
        UserError: there is no such file, it is not a sweep, its method is not ``grid``, or a value is null.
    """
    path = Path(path)
    config = read_yaml(path)
    if not isinstance(config, dict):
        raise UserError(f"sweep: {path} must hold method, parameters and command; it holds {type(config).__name__}")
    if config.get("method") != "grid":
        raise UserError(
            f"sweep: method {config.get('method')!r} in {path}; this runner handles grid, for others use "
            "`wandb sweep` and `wandb agent`"
        )
    return Sweep(
        name=str(config.get("name") or path.stem),
        program=None if config.get("program") is None else str(config["program"]),
        command=_checked_command(config.get("command") or DEFAULT_COMMAND),
        points=tuple(expand_grid(config.get("parameters"))),
        path=path,
    )


def _checked_command(command: Any) -> tuple[str, ...]:
    is_list = isinstance(command, (list, tuple))
    if not is_list or not all(isinstance(chunk, (str, int, float)) for chunk in command):
        raise UserError(f"sweep: command must be a list of words, not {shortened(repr(command))}")
    words = tuple(str(chunk) for chunk in command)
    if "${args}" not in words:
        raise UserError("sweep: command lacks ${args}, so every run would be the same; put it last")
    if words[-1] != "${args}":
        # What stands behind ${args} would overrule the values of the sweep in silence.
        raise UserError(f"sweep: ${{args}} must be the last word of the command, not {words[-1]!r}")
    return words


# --- grid ------------------------------------------------------------------------------------------------------------


def expand_grid(parameters: Any) -> list[Point]:
    """Every combination of the parameters' values: in the file's order, the last parameter fastest.

    Args:
        parameters: name -> ``{value: …}``, ``{values: […]}``, or ``{parameters: {…}}``, which nests and gives its
            parameter a dict as value, as in W&B.

    Raises:
        UserError: a parameter has none or several of the three, no values, or a null among them.
    """
    if not isinstance(parameters, dict) or not parameters:
        raise UserError("sweep: parameters is empty; give each parameter a value or values")
    names = [str(name) for name in parameters]
    choices = [_choices(name, spec) for name, spec in zip(names, parameters.values(), strict=True)]
    size = math.prod(map(len, choices))
    if size > MAX_RUNS:
        raise UserError(f"sweep: the grid has {size:,} runs; {MAX_RUNS:,} are the most: leave values out")
    return [dict(zip(names, values, strict=True)) for values in itertools.product(*choices)]


def _choices(name: str, spec: Any) -> list[Any]:
    if not isinstance(spec, dict) or len({"value", "values", "parameters"} & set(spec)) != 1:
        raise UserError(
            f"sweep: parameter {name} must have one of value, values and parameters; it is {shortened(repr(spec))}"
        )
    if str(spec.get("distribution", "categorical")) not in _SINGLE_VALUE_DISTRIBUTIONS:
        given = shortened(repr(spec["distribution"]))
        raise UserError(f"sweep: parameter {name}: distribution {given} is no grid; list its values")
    if "parameters" in spec:
        return expand_grid(spec["parameters"])
    values = [spec["value"]] if "value" in spec else spec["values"]
    if not isinstance(values, list) or not values:
        raise UserError(
            f"sweep: parameter {name}: values must be a list of at least one, not {shortened(repr(values))}"
        )
    if any(_has_null(value) for value in values):
        raise UserError(f"sweep: parameter {name} holds null, which W&B hands over as the word None; leave it out")
    return values


def _has_null(value: Any) -> bool:
    if isinstance(value, dict):
        return any(_has_null(item) for item in value.values())
    if isinstance(value, list):
        return any(_has_null(item) for item in value)
    return value is None


# --- commands --------------------------------------------------------------------------------------------------------


def render_command(sweep: Sweep, point: Point) -> list[str]:
    """The command of one run, word for word as ``wandb agent`` (0.31) renders it on Linux and macOS.

    Raises:
        UserError: the command has a macro other than env, envvar, interpreter, program and args.
    """
    words: list[str] = []
    for chunk in sweep.command:
        chunk = _ENVIRONMENT_VARIABLE.sub(lambda match: os.environ.get(match[1], match[1]), chunk)
        words += _macro(chunk, sweep, point) if _MACRO.fullmatch(chunk) else [chunk]
    return words


def _macro(macro: str, sweep: Sweep, point: Point) -> list[str]:
    match macro[2:-1]:
        case "args":
            return [f"--{name}={value}" for name, value in point.items()]
        case "env":
            return ["/usr/bin/env"]
        case "interpreter":
            return ["python"]
        case "program":
            if not sweep.program:
                raise UserError("sweep: command uses ${program}, but the file names no program")
            return [sweep.program]
    raise UserError(f"sweep: {macro} is not handled; use ${{env}}, ${{interpreter}}, ${{program}}, ${{args}}")


def settings_of(point: Point) -> dict[str, Any]:
    """A point's settings by their dotted names; those within an inline ``config`` under their own."""
    flat: dict[str, Any] = {}
    for name, value in point.items():
        if name == "config" and isinstance(value, str):
            with suppress(FormatError):
                value = parse_yaml(value, f"sweep: {name}")
            flat |= settings_of(value) if isinstance(value, dict) else {}
        elif isinstance(value, dict):
            flat |= {f"{name}.{key}": inner for key, inner in settings_of(value).items()}
        else:
            flat[name] = value
    return flat


def fit_arguments(command: list[str]) -> list[str]:
    """What follows ``llada`` (or ``python -m llada_lightning``) in a rendered command: ``fit`` and its arguments.

    Of ``llada launch … -- fit …`` what is launched: how is the business of the machine.

    Raises:
        UserError: the command is another one.
    """
    words = command[1:] if command[:1] == ["/usr/bin/env"] else command
    for start in (["llada"], ["python", "-m", "llada_lightning"]):
        if words[: len(start) + 1] == [*start, "launch"] and "--" in words:
            words = [*start, *words[words.index("--") + 1 :]]
        if words[: len(start) + 1] == [*start, "fit"]:
            return words[len(start) :]
    raise UserError(f"sweep: the command must start with `llada fit`, not `{' '.join(words[:2])}`")


def launch_fit(arguments: list[str]) -> list[str]:
    """``llada fit …`` as this very interpreter and package run it, whatever ``llada`` is on the PATH.

    Args:
        arguments: ``fit`` and its arguments.
    """
    return [sys.executable, "-m", "llada_lightning", *arguments]
