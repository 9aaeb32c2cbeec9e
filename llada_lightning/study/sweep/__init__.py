"""A W&B sweep file, expanded into its runs, with commands as ``wandb agent`` would render them.

The same file serves ``wandb sweep`` with ``wandb agent`` and ``llada sweep run`` on this machine (``runner``). The
format is W&B's: https://docs.wandb.ai/guides/sweeps/define-sweep-configuration. A study keeps a copy of the file that
it was begun with, so that an edit half-way is noticed.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any, Literal

from llada_lightning.compute.flops import CONVENTIONS, Convention, cost_of_budgets
from llada_lightning.compute.rules import DECAY_FRACTION
from llada_lightning.records import CONFIG_FILE, has_diverged, is_done, read_records
from llada_lightning.support.errors import UserError
from llada_lightning.support.files import written_atomically
from llada_lightning.support.printing import shortened
from llada_lightning.support.reading import FormatError, parse_yaml, read_yaml

Point = dict[str, Any]
"""One run of a sweep: parameter -> value."""

DEFAULT_COMMAND = ("${env}", "${interpreter}", "${program}", "${args}")
"""What W&B runs where the file names no command."""

COPY_SUFFIX = ".sweep.yaml"
"""The end of the name of the copy of its sweep file that a study keeps."""

MAX_RUNS = 100_000
"""Most runs of a sweep."""

SHIPPED = {path.stem: path for path in sorted(Path(__file__).parent.glob("*.yaml"))}
"""The sweep files that come with the package, by the names by which ``llada sweep`` takes them."""

_ENVIRONMENT_VARIABLE = re.compile(r"\$\{envvar:([A-Z0-9_]*)\}")
_MACRO = re.compile(r"\$\{.*\}")


@dataclass(frozen=True)
class Sweep:
    """A sweep file, expanded.

    Args:
        name: The name that the file gives the sweep, else the name of the file.
        program: The value of ``${program}``.
        command: The command with its macros, ``${args}`` last.
        points: The runs, in the order of the grid.
        path: The path of the file, where there is one.
    """

    name: str
    program: str | None
    command: tuple[str, ...]
    points: tuple[Point, ...]
    path: Path | None = None


def read_sweep(path: Path | str) -> Sweep:
    """Reads a W&B sweep file and expands its grid.

    Args:
        path: The path of the file, or the name of one that comes with the package (``SHIPPED``).

    Raises:
        UserError: There is no such file, it is not a sweep, its method is not ``grid``, or a value is null.
    """
    path = Path(path)
    if str(path) in SHIPPED and not path.is_file():
        path = SHIPPED[str(path)]
    config = read_yaml(path)
    if not isinstance(config, dict):
        raise UserError(
            f"sweep: '{path}' is no W&B sweep file: it holds no keys such as method, parameters and command; give the "
            ".yaml file that llada plan --out wrote"
        )
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

    A parameter is ``{value: …}``, ``{values: […]}``, or ``{parameters: {…}}``, which nests and gives its parameter a
    dict as value, as in W&B.

    Raises:
        UserError: A parameter has none or several of the three, no values, or a null among them.
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
    if str(spec.get("distribution", "categorical")) not in ("constant", "categorical"):
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
        value = list(value.values())
    return any(map(_has_null, value)) if isinstance(value, list) else value is None


# --- commands --------------------------------------------------------------------------------------------------------


def render_command(sweep: Sweep, point: Point) -> list[str]:
    """The command of one run, word for word as ``wandb agent`` (0.31) renders it on Linux and macOS.

    Raises:
        UserError: The command has a macro other than env, envvar, interpreter, program and args.
    """
    words: list[str] = []
    for chunk in sweep.command:
        chunk = _ENVIRONMENT_VARIABLE.sub(lambda match: os.environ.get(match[1], match[1]), chunk)
        match chunk:
            case "${args}":
                words += [f"--{name}={value}" for name, value in point.items()]
            case "${env}":
                words.append("/usr/bin/env")
            case "${interpreter}":
                words.append("python")
            case "${program}" if sweep.program:
                words.append(sweep.program)
            case "${program}":
                raise UserError("sweep: command uses ${program}, but the file names no program")
            case _ if _MACRO.fullmatch(chunk):
                raise UserError(
                    f"sweep: {chunk} is not handled; use ${{env}}, ${{interpreter}}, ${{program}}, ${{args}}"
                )
            case _:
                words.append(chunk)
    return words


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

    Of ``llada launch … -- fit …`` these are the words after ``--``: each machine launches a run in its own way.

    Raises:
        UserError: The command is another one.
    """
    words = command[1:] if command[:1] == ["/usr/bin/env"] else command
    for start in (["llada"], ["python", "-m", "llada_lightning"]):
        if words[: len(start) + 1] == [*start, "launch"] and "--" in words:
            words = [*start, *words[words.index("--") + 1 :]]
        if words[: len(start) + 1] == [*start, "fit"]:
            return words[len(start) :]
    raise UserError(f"sweep: the command must start with `llada fit`, not `{' '.join(words[:2])}`")


def launch_fit(arguments: list[str]) -> list[str]:
    """The command of ``fit`` and its arguments by this interpreter and package, whatever ``llada`` is on the PATH."""
    return [sys.executable, "-m", "llada_lightning", *arguments]


# --- runs ------------------------------------------------------------------------------------------------------------

RunFolder = Callable[[list[str]], Path]
"""From ``fit`` and its arguments to the folder of that run. Injected: resolving a config needs torch."""


@dataclass(frozen=True)
class PlannedRun:
    """One run of a sweep: ``fit`` and its arguments, its folder and log, and its cost in FLOPs (1 if unknown)."""

    arguments: list[str]
    folder: Path
    cost: float
    convention: Convention = "6nd"
    """Which FLOPs its cost counts."""
    trunk: str = ""
    """All of its settings but its budget: runs with the same ones may share a trunk."""
    continues: bool = False
    """Whether it starts from a checkpoint of a run before it in the file (``budget.trunks``), if there is one."""

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def log(self) -> Path:
        return self.folder.parent / "logs" / f"{self.name}.log"


def planned_run(sweep: Sweep, point: Point, run_folder: RunFolder, extra: Sequence[str] = ()) -> PlannedRun:
    """One point of a sweep as the run that it describes, with ``extra`` behind its arguments.

    Raises:
        UserError: The command is not ``llada fit``, or ``run_folder`` refuses its arguments.
    """
    arguments, settings = [*fit_arguments(render_command(sweep, point)), *extra], settings_of(point)
    flops, given = settings.get("budget.flops"), settings.get("budget.convention")
    try:
        budgets = [float(budget) for budget in (flops if isinstance(flops, list) else [flops])]  # type: ignore[arg-type]
        decay = float(settings.get("model.init_args.schedule.decay_fraction", DECAY_FRACTION))
        cost = cost_of_budgets(budgets, decay)
    except (TypeError, ValueError):
        cost = 1.0
    shared = {key: value for key, value in settings.items() if not key.startswith(("budget.", "run."))}
    return PlannedRun(
        arguments,
        run_folder(arguments),
        cost,
        given if given in CONVENTIONS else "6nd",
        trunk=json.dumps(shared, sort_keys=True, default=str),
        continues=bool(settings.get("budget.trunks")),
    )


def plan_runs(sweep: Sweep, run_folder: RunFolder, extra: Sequence[str] = ()) -> list[PlannedRun]:
    """The sweep's runs in order, each folder once: points that describe the same run are run once."""
    runs: dict[Path, PlannedRun] = {}
    for point in sweep.points:
        run = planned_run(sweep, point, run_folder, extra)
        runs.setdefault(run.folder, run)
    return list(runs.values())


# --- a study's state -------------------------------------------------------------------------------------------------


def kept_copy(sweep: Sweep, study: Path) -> Path:
    """Where a study keeps the sweep file that it was begun with."""
    assert sweep.path is not None
    return study / f"{sweep.path.stem}{COPY_SUFFIX}"


def runs_that_left(sweep: Sweep, study: Path) -> list[list[str]]:
    """The commands of the runs that a study was begun with and that its sweep file no longer has."""
    now = _commands(sweep)
    return [command for command in _begun_with(sweep, study) if command not in now]


def check_unchanged(sweep: Sweep, study: Path, *, by_index: bool = False, edited: bool = False) -> int:
    """Compare a sweep file with the copy that its study was begun with, and keep a new copy.

    Runs may be added to a study. Runs that have left the file stay in the study's folder, and would be collected with
    the others as if they belonged to one design: that is refused, unless it is said to be meant.

    Args:
        sweep: The sweep.
        study: The folder of the study's runs.
        by_index: Whether runs are named by their number, so that earlier ones must keep theirs.
        edited: Whether the change is meant.

    Returns:
        The number of runs that were added to the file since the study was begun.
    """
    if sweep.path is None:
        return 0
    copy = kept_copy(sweep, study)
    before, now = _begun_with(sweep, study), _commands(sweep)
    gone = [command for command in before if command not in now]
    if gone and not edited:
        raise UserError(
            f"sweep: {sweep.path} was edited: {len(gone)} of the {len(before)} runs that {study} was begun with have "
            f"left it; restore the file ({copy} is its copy), choose another run.study, or say --edited to go on with "
            f"both in one study (the first: {shorten(gone[0][-1], 200)})"
        )
    if by_index and not edited and now[: len(before)] != before:
        raise UserError(
            f"sweep: {sweep.path} was edited: its runs have changed their numbers since {study} was begun; add new "
            f"runs at the end ({copy} is the file as it was), or say --edited"
        )
    if now != before:
        with written_atomically(copy) as temporary:
            temporary.write_bytes(sweep.path.read_bytes())
    return len([command for command in now if command not in before]) if before else 0


def _begun_with(sweep: Sweep, study: Path) -> list[list[str]]:
    """The commands of the runs that a study was begun with; none where it has no copy of the file."""
    copy = kept_copy(sweep, study)
    return _commands(read_sweep(copy)) if copy.is_file() else []


def _commands(sweep: Sweep) -> list[list[str]]:
    return [render_command(sweep, point) for point in sweep.points]


def state_of(folder: Path) -> Literal["done", "diverged", "begun", "not begun"]:
    """What has become of a run, by its folder."""
    if is_done(folder):
        return "diverged" if has_diverged(folder) else "done"
    return "begun" if (folder / CONFIG_FILE).exists() or read_records(folder) else "not begun"
