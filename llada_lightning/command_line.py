"""What the commands beside ``llada fit`` share: the parser, and the console of the people who read."""

from __future__ import annotations

from typing import NoReturn

from jsonargparse import ArgumentParser
from rich.console import Console

from llada_lightning.errors import UserError


class CommandParser(ArgumentParser):
    """A parser whose errors are UserErrors of one line.

    The inherited ``error`` prints pages of usage before the mistake and leaves the process; here the mistake alone
    goes to whoever called, who prints it and chooses the exit code.
    """

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raises UserError: the command, what is wrong, and where to read the options."""
        words = " ".join(message.split()).rstrip(".")
        raise UserError(f"{words}; see '{self.prog} --help'") from ex


def people_console(*, stderr: bool = False) -> Console:
    """A console for tables and progress: on stdout for results, on stderr for what passes by."""
    return Console(stderr=stderr)
