"""``llada fit``, ``validate``, ``test`` and ``predict``: the commands of LightningCLI."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise

from llada_lightning.support.errors import UserError
from llada_lightning.support.libraries import quiet_libraries
from llada_lightning.support.security import is_trusted, not_trusted

CLASSES = ("model", "data", "trainer.callbacks")
"""The options that take the path of a class."""


def main(argv: list[str]) -> int:
    """Run one of the four commands, from its name and its arguments."""
    refuse_untrusted(argv)
    quiet_libraries()
    from llada_lightning.training.cli import LladaCLI

    LladaCLI(argv)
    return 0


def refuse_untrusted(argv: Sequence[str]) -> None:
    """Refuse a class that is not trusted before the libraries are imported, which takes seconds.

    Those that only files name, and those within other values, are left to the parser.

    Raises:
        UserError: Names the option and the class.
    """
    for word, following in pairwise([*argv, ""]):
        option, given, value = word.partition("=")
        name, value = option.removeprefix("--").removesuffix("+"), value if given else following
        if (
            name in CLASSES
            and option != name
            and re.fullmatch(r"[A-Za-z_]\w*(\.\w+)+", value)
            and not is_trusted(value)
        ):
            raise UserError(f"{name}: {not_trusted(value)}")
