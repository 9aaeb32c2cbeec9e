"""``llada fit``, ``validate``, ``test`` and ``predict``: the commands of LightningCLI."""

from __future__ import annotations

from llada_lightning.support.libraries import quiet_libraries


def main(argv: list[str]) -> int:
    """Run one of the four commands, from its name and its arguments."""
    quiet_libraries()
    from llada_lightning.training.cli import LladaCLI

    LladaCLI(argv)
    return 0
