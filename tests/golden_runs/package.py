"""The only module of these tests that names modules of the package: where the package moves, this file follows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llada_lightning.commands.main import main
from llada_lightning.identity import as_hashed
from llada_lightning.support.libraries import quiet_libraries
from llada_lightning.training.cli import LladaCLI

__all__ = ["LONE_FIT_RULES", "Resolved", "main", "resolved"]

LONE_FIT_RULES = ("--rules.lr=lone", "--rules.warmup=lone")
"""Arguments of ``llada fit`` that ask for the rules by which a fit of one budget chose its warmup in the version that
made the fixtures. Commands that rely on those rules get them."""


@dataclass(frozen=True)
class Resolved:
    """What a command of ``llada fit`` would run.

    Args:
        name: The name of the run's folder.
        results: The names of the run's results, one a budget, smallest budget first.
        identities: The identity of each result, in exactly the form whose hash is in its name.
    """

    name: str
    results: list[str]
    identities: list[dict[str, Any]]


def resolved(arguments: Sequence[str]) -> Resolved:
    """Resolve ``llada fit`` and build nothing.

    Args:
        arguments: The arguments after ``llada``, with ``fit``.
    """
    quiet_libraries()
    command = LladaCLI(list(arguments), execute=False)
    ends = [phase for phase in command.phases if phase.run is not None and not phase.continues]  # no milestones
    return Resolved(command.run_name, [str(phase.run) for phase in ends], [as_hashed(phase.identity) for phase in ends])
