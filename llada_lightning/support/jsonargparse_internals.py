"""The private names of jsonargparse that the package relies on, all in this file. Seen in jsonargparse 4.53."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Union, get_args

from jsonargparse import ArgumentParser


def whole_numbers_first(parser: ArgumentParser) -> None:
    """Read `1` as a whole number wherever an option takes whole numbers and floats, as its declaration says.

    Python gives `Optional[Union[int, float]]` the order of the first such type that was made, by whatever library was
    imported first. The parser takes the first type that fits, so `1` would become 1.0, and a run's name another.
    """
    for action in parser._actions:
        kinds = list(get_args(getattr(action, "_typehint", None)))
        if int in kinds and float in kinds and kinds.index(float) < kinds.index(int):
            first, second = kinds.index(float), kinds.index(int)
            kinds[first], kinds[second] = int, float
            action._typehint = Union[tuple(kinds)]  # type: ignore[attr-defined]  # noqa: UP007 (keeps the order)


def option_names(parser: ArgumentParser) -> Iterator[str]:
    """The names of a parser's options and of those of its subcommands, such as `budget.flops`; some more than once."""
    for action in parser._actions:
        yield from (option.removeprefix("--") for option in action.option_strings if option.startswith("--"))
        for below in action.choices.values() if isinstance(action.choices, dict) else ():
            if isinstance(below, ArgumentParser):
                yield from option_names(below)
