"""Modules of the user that extend the package. Each registers what it adds, such as an objective, on its import."""

from __future__ import annotations

import os
import re
from importlib import import_module

from llada_lightning.support.errors import UserError

VARIABLE = "LLADA_PLUGINS"
"""Environment variable: names of modules, separated by commas. Child processes inherit it."""

_MODULE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")


def named_modules(variable: str) -> list[str]:
    """The modules that an environment variable names.

    Raises:
        UserError: It holds something other than names of modules.
    """
    names = [name.strip() for name in os.environ.get(variable, "").split(",") if name.strip()]
    for name in names:
        if not _MODULE.fullmatch(name) or name.split(".")[0] == "jsonargparse":
            raise UserError(
                f"{variable}: {name!r} is not the name of a module of yours; give names such as mine,yours.part"
            )
    return names


def import_plugins() -> None:
    """Import the modules that :data:`VARIABLE` names, in their order.

    Raises:
        UserError: A module cannot be imported, or what it registers is refused.
    """
    for name in named_modules(VARIABLE):
        try:
            import_module(name)
        except Exception as error:  # whatever a module of the user raises
            reason = f"{error}" if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            fix = "correct it, or put its folder on PYTHONPATH"
            raise UserError(f"{VARIABLE}: module '{name}' cannot be imported ({reason}); {fix}") from error
