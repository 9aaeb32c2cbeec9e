"""The ways to a run from Python: fit one, as ``llada fit`` does, or ask where it would lie."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from llada_lightning.records import read_records
from llada_lightning.support.command_line import as_keys
from llada_lightning.support.errors import UserError
from llada_lightning.support.locks import check_unlocked
from llada_lightning.training.cli import LladaCLI
from llada_lightning.training.phases import RunIsDone


def fit(**settings: Any) -> list[dict[str, Any]]:
    """Do what `llada fit` does, with the same settings, and return what it writes into ``result.json``.

    ``fit(model="LladaModule", data={"path": "data/books"}, budget={"flops": 1e12}, run={"study": "mine"})`` is
    ``llada fit --model LladaModule --data.path data/books --budget.flops 1e12 --run.study mine``. A run that is done is
    not trained again, and one that was stopped resumes.

    Args:
        settings: The settings by their names, nested as in a configuration file. ``model`` and ``data`` may be the name
            of a class, a mapping of its arguments, or a mapping with ``class_path`` and ``init_args``.

    Returns:
        One record for each budget, smallest first, with the columns of a results table.

    Raises:
        UserError: A setting is wrong; the message says which, and how to correct it.
    """
    try:
        folder = LladaCLI(["fit", *(word for name, value in settings.items() for word in _words(name, value))]).folder
    except RunIsDone as done:
        folder = done.folder
    except UserError as error:
        if (said := as_keys(str(error))) == str(error):
            raise
        raise UserError(said) from error
    return read_records(folder)


def _words(name: str, value: Any) -> list[str]:
    """A setting as the command takes it."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, Mapping) and "class_path" in value:
        inner = value.get("init_args", {})
        return [f"--{name}={value['class_path']}", *(w for k, v in inner.items() for w in _words(f"{name}.{k}", v))]
    if isinstance(value, Mapping) and value and name not in ("data.path", "data.held_out"):  # whose keys are names
        return [word for key, item in value.items() for word in _words(f"{name}.{key}", item)]
    return [f"--{name}={value if isinstance(value, str) else json.dumps(value)}"]


def run_folder(args: list[str]) -> Path:
    """The folder that `llada ARGS` (from `fit` on) would run in; builds and starts nothing."""
    return LladaCLI(args, execute=False).folder


def resolved_run(args: list[str]) -> tuple[Path, str]:
    """The folder that `llada ARGS` (from `fit` on) would run in, and its resolved configuration as YAML."""
    cli = LladaCLI(args, execute=False)
    cli.check_folder()
    check_unlocked(cli.folder)
    return cli.folder, cli.resolved
