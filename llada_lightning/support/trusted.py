"""Which classes a configuration may name: the parser imports what a `class_path` says, and an import runs code.

A configuration may come from a stranger. So it may name classes of this package, of Lightning and of torch, without
those parts that run commands or unpickle, and of the modules that the user names by an environment variable: trusted
ones, and plugins.
"""

from __future__ import annotations

from jsonargparse import set_parsing_settings

from llada_lightning.support.plugins import VARIABLE as PLUGINS
from llada_lightning.support.plugins import named_modules

VARIABLE = "LLADA_TRUSTED_MODULES"
"""Environment variable: further modules, separated by commas."""

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
"""Parts of the known modules that start commands, compile or unpickle what their arguments say."""


def trust_known_modules() -> None:
    """From here on the parser refuses other modules before it imports them, for the life of this process.

    Raises:
        UserError: an environment variable holds something else than modules' names.
    """
    set_parsing_settings(
        import_path_denylist=["*", *_NEVER],
        import_path_allowlist=[*_KNOWN, *named_modules(VARIABLE), *named_modules(PLUGINS)],
        # Else any class that a value of no declared type names would be built.
        instantiate_subclass_spec_in_any=False,
    )


def not_trusted(class_path: str) -> str:
    """What is wrong with a class path, and the mend."""
    module = class_path.rpartition(".")[0] or class_path
    return (
        f"'{class_path}' is not of llada_lightning, lightning or torch, or may run what it is told, so it was not "
        f"imported; if you trust it, set {VARIABLE}={module}"
    )
