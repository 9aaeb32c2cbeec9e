"""The parser of Lightning's verbs, in our manners."""

from __future__ import annotations

from typing import Any, NoReturn, Union, get_args

from lightning.pytorch.cli import LightningArgumentParser

from llada_lightning.command_line import one_line
from llada_lightning.errors import UserError


class OneLineParser(LightningArgumentParser):
    """A parser whose errors are UserErrors of one line, and that takes no abbreviated keys."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise UserError(one_line(message, "llada fit")) from ex


def whole_numbers_first(parser: LightningArgumentParser) -> None:
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


def class_first(args: list[str]) -> list[str]:
    """The arguments with each `--model=NAME` before its `--model.…`: the parser needs the class before its settings,
    and a sweep's agent hands arguments over in an order of its own."""
    args = list(args)
    for key in ("--model", "--data"):
        named = next((i for i, arg in enumerate(args) if arg.startswith(f"{key}=")), None)
        setting = next((i for i, arg in enumerate(args) if arg.startswith(f"{key}.")), None)
        if named is not None and setting is not None and setting < named:
            args.insert(setting, args.pop(named))
    return args
