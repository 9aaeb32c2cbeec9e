"""Modules that a user names, what a configuration may name, and what it must not hold.

A plugin is a module of the user that extends the package: it registers what it adds, such as an objective, when it is
imported.

A configuration may come from a stranger, and the parser imports what a ``class_path`` names: an import runs code. So a
configuration may name classes of this package, of Lightning and of torch, without those parts that run commands or
unpickle, and of the modules that the user names by environment variables: trusted ones, and plugins.

Secrets stay out of what a run writes: an address that holds a password or a token is refused, and not repeated.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from importlib import import_module
from typing import Any

from llada_lightning.support.errors import UserError
from llada_lightning.support.printing import shortened

PLUGINS = "LLADA_PLUGINS"
"""The environment variable that names plugins, separated by commas. Child processes inherit it."""

TRUSTED = "LLADA_TRUSTED_MODULES"
"""The environment variable that names further modules that a configuration may name, separated by commas."""

_MODULE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")

_KNOWN = ("llada_lightning", "lightning", "torch")
_NEVER = (
    "lightning.fabric.cli",
    "lightning.pytorch.cli",
    "torch.distributed.elastic",
    "torch.distributed.launcher",
    "torch.distributed.run",
    "torch.hub",
    "torch.jit",
    "torch.load",
    "torch.multiprocessing",
    "torch.package",
    "torch.serialization",
    "torch.utils.cpp_extension",
)
"""The parts of the known modules that start commands, compile or unpickle what their arguments name."""


def named_modules(variable: str) -> list[str]:
    """The modules that an environment variable names.

    Raises:
        UserError: The variable holds something other than names of modules.
    """
    names = [name.strip() for name in os.environ.get(variable, "").split(",") if name.strip()]
    for name in names:
        if not _MODULE.fullmatch(name) or name.split(".")[0] == "jsonargparse":
            raise UserError(
                f"{variable}: {name!r} is not the name of a module of yours; give names such as mine,yours.part"
            )
    return names


def import_plugins() -> None:
    """Import the plugins in the order in which :data:`PLUGINS` names them.

    Raises:
        UserError: A module cannot be imported, or what it registers is refused.
    """
    for name in named_modules(PLUGINS):
        try:
            import_module(name)
        except Exception as error:  # whatever a module of the user raises
            reason = f"{error}" if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            fix = "correct it, or put its folder on PYTHONPATH"
            raise UserError(f"{PLUGINS}: module '{name}' cannot be imported ({reason}); {fix}") from error


def trust_known_modules() -> None:
    """Makes the parser refuse other modules before it imports them, for the life of this process.

    Raises:
        UserError: An environment variable holds something other than names of modules.
    """
    from jsonargparse import set_parsing_settings  # here, so that those who only hide secrets do not load it

    set_parsing_settings(
        import_path_denylist=["*", *_NEVER],
        import_path_allowlist=[*_KNOWN, *named_modules(TRUSTED), *named_modules(PLUGINS)],
        # Else any class that a value of no declared type names would be built.
        instantiate_subclass_spec_in_any=False,
    )


def is_trusted(class_path: str) -> bool:
    """Whether a configuration may name a class, by the rules of :func:`trust_known_modules`."""

    def within(modules: Iterable[str]) -> bool:
        return any(class_path.startswith(f"{module}.") for module in modules)

    given = [*named_modules(TRUSTED), *named_modules(PLUGINS)]
    return within(given) or (within(_KNOWN) and not within(_NEVER) and class_path not in _NEVER)


def not_trusted(class_path: str) -> str:
    """Returns what is wrong with a class path, and how to fix it."""
    module = class_path.rpartition(".")[0] or class_path
    return (
        f"'{class_path}' is not of llada_lightning, lightning or torch, or may run commands from its arguments, so "
        f"it was not imported; if you trust it, set {TRUSTED}={module} "
        f"({PLUGINS}={module} if it registers an objective)"
    )


def import_named(class_path: str) -> Any:
    """The class of a class path, which is of this package or of a module that the user has named.

    For settings that the parser takes as plain mappings, and so does not import itself.

    Raises:
        UserError: The module is not trusted, cannot be imported, or has no such class.
    """
    module, _, name = class_path.rpartition(".")
    trusted = ("llada_lightning", *named_modules(TRUSTED), *named_modules(PLUGINS))
    if not any(module == own or module.startswith(f"{own}.") for own in trusted):
        raise UserError(not_trusted(shortened(class_path)))
    try:
        return getattr(import_module(module), name)
    except Exception as error:  # whatever a module of the user raises
        reason = f"{type(error).__name__}: {shortened(error)}"
        raise UserError(
            f"'{class_path}' cannot be imported ({reason}); correct it, or put its folder on PYTHONPATH"
        ) from error


# --- secrets ----------------------------------------------------------------------------------------------------------

_PASSWORD = re.compile(r"(?<=://)[^/@\s'\"]*:[^/@\s'\"]*(?=@)")
"""The `user:password` of `scheme://user:password@host`."""
_TOKEN = re.compile(
    r"(?i)(?<=[?&;])((?:[\w-]*(?:token|secret|password|passwd|signature|credential|api-?_?key|accesskeyid))|sig|key)"
    r"=[^&;#\s'\"]+"
)
"""A `token=…` and its like in the query of an address, signed addresses of clouds included."""


def redacted(text: str) -> str:
    """Returns the text with the secrets of its addresses left out."""
    return _TOKEN.sub(r"\1=***", _PASSWORD.sub("***", text))


def refuse_secrets(settings: dict[str, Any]) -> None:
    """Refuses settings that would put a secret into config.yaml, launch.yaml, logs and W&B.

    Args:
        settings: The nested settings, as parsed.

    Raises:
        UserError: An address holds a secret; the message names the setting, and not its value.
    """
    for key, value in _texts(settings):
        if redacted(value) != value:
            raise UserError(
                f"{key}: the address holds a password or a token, which config.yaml and W&B would keep; put it into "
                "the environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, HF_TOKEN), and give the bare address"
            )


def _texts(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yields every text below a value, keys of mappings too, behind the dotted name of its setting."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for name, item in value.items():
            yield key, str(name)
            name = name if isinstance(name, str) and name.isidentifier() else ""
            yield from _texts(item, f"{key}.{name}".strip("."))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _texts(item, key)
    elif not isinstance(value, (int, float, type(None))):
        yield key, str(value)
