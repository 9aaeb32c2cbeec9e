"""Output for people: consoles, and text in which control characters do not act and that fits a line."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

_PICTURES = {
    **{code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"},
    0x7F: 0x2421,
    **dict.fromkeys((*range(0x80, 0xA0), 0x200E, 0x200F, *range(0x2028, 0x202F), *range(0x2066, 0x206A)), 0xB7),
}


def visible(text: str) -> str:
    """Returns the text with a visible sign for each character that would act instead of being seen.

    Control characters move a terminal's cursor or are forbidden in HTML; those of direction turn the text behind them.
    Newlines and tabs stay.
    """
    return text.translate(_PICTURES)


def shortened(value: object, length: int = 200) -> str:
    """Returns a value as one visible line for a message, with its middle left out where it is long.

    Args:
        value: The value; its ``str`` is shown.
        length: Number of characters above which the middle is left out.
    """
    text = visible(" ".join(str(value).split()))
    half = length // 2
    return text if len(text) <= length else f"{text[:half]}…{text[-half:]}"


@cache
def _visible_console() -> type[Console]:
    from rich.console import Console  # not before a console is wanted: most messages need none

    class VisibleConsole(Console):
        def render_str(self, text: str, **options: Any) -> Text:
            return super().render_str(visible(text), **options)

    return VisibleConsole


def people_console(*, stderr: bool = False) -> Console:
    """Returns a console for tables and progress: on stdout for results, on stderr for what passes by.

    Text is seen as it is: neither control characters nor Rich's markup in it act. That holds for what is printed and
    for the titles, captions, headers and cells of tables, which hold names and paths of people. Styles are given as
    arguments, or as ``rich.text.Text``.
    """
    return _visible_console()(stderr=stderr, markup=False, emoji=False)


def recording_console(width: int) -> Console:
    """Returns a console that writes nowhere and keeps what is printed, for ``export_html`` and ``export_svg``.

    Its rules for text are those of :func:`people_console`.

    Args:
        width: Width of a line in characters.
    """
    console = _visible_console()
    return console(
        file=io.StringIO(), record=True, width=width, markup=False, emoji=False, highlight=False, legacy_windows=False
    )


def warn(line: str) -> None:
    """Prints a line on stderr, where notes, warnings and errors go; control characters in it do not act."""
    print(visible(line), file=sys.stderr, flush=True)


@cache
def warn_once(line: str) -> None:
    """Prints a line on stderr, at most once a process."""
    warn(line)


def print_what_the_encoding_holds() -> None:
    """Makes stdout and stderr replace the characters that their encoding lacks.

    Otherwise the first ``±`` or block character on an ASCII stream would end a command after all of its work.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="replace")


def counted(count: int, noun: str) -> str:
    """A number of things: 1 document, 1,024 documents."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


def listed(names: Sequence[str]) -> str:
    """Names in a sentence: `a`, `b` and `c`."""
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))
