"""The text of a sampling process, each token in the colour of the step at which it appeared (paper, Tables 3, 13, 14).

It is drawn on a terminal while the answer unfolds, with a dim block where a token is still masked, and into a file of
HTML or SVG.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Collection, Sequence
from html import unescape
from pathlib import Path
from typing import NamedTuple

from rich.box import SIMPLE
from rich.cells import cell_len
from rich.color import Color, blend_rgb
from rich.color_triplet import ColorTriplet
from rich.console import Console, Group
from rich.live import Live
from rich.padding import Padding
from rich.rule import Rule
from rich.style import Style
from rich.table import Table
from rich.terminal_theme import DEFAULT_TERMINAL_THEME
from rich.text import Text
from tokenizers import Tokenizer

from llada_lightning.data.encoding import decode, encode
from llada_lightning.generation.sampling import Generation, Snapshot
from llada_lightning.support.errors import UserError
from llada_lightning.support.files import expanded, require_replaceable, written_atomically
from llada_lightning.support.printing import recording_console, visible

ENDINGS = (".html", ".svg")
BLOCK = "▒"
MASKED = -1
"""In a list of ids: a token that is not known yet."""

_COLUMNS = 100
"""Width of a file's text in characters; a Chinese character fills two."""
_SWATCHES = 12
_BLUES = tuple(
    ColorTriplet(*rgb) for rgb in ((226, 238, 250), (158, 202, 225), (66, 146, 198), (8, 81, 156), (8, 36, 84))
)
"""One hue from light to dark, which everyone reads in the same order, with any colour vision and in grey."""
_WHITE_INK = 0.59
"""Share of the way through the blues from which white text has more contrast than black text."""

_ASPECT = 0.61
"""Width of a character in the SVG, divided by its height."""
_CELL = 20 * _ASPECT
"""The same width in the SVG's units; Rich's characters are 20 units high."""
_SVG = """\
<svg viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">
<title>Sampling process</title>
<style>
.{unique_id}-matrix {{ font-size: {char_height}px; font-family: "DejaVu Sans Mono", Menlo, Consolas, monospace; }}
{styles}
</style>
<rect width="100%" height="100%" fill="#ffffff"/>
<defs>{lines}</defs>
<g transform="translate({terminal_x}, 8)">
{backgrounds}
<g class="{unique_id}-matrix">
{matrix}
</g>
</g>
</svg>
"""
"""Rich's own has the frame of a window and loads a font from the network."""

_UNREADABLE = "\N{REPLACEMENT CHARACTER}"
_CHARACTER_BYTES = 4
"""The most bytes of a character in UTF-8."""
_WIDEST_GROUP = 16
"""Tokens tried together, where each ends within a character that the next one ends."""


class Piece(NamedTuple):
    """The text of the tokens from ``begin`` to before ``end``: of one token, or of neighbours that only together are
    whole characters. The text is empty where the token is not known yet."""

    text: str
    begin: int
    end: int


class Aligner:
    """Aligns tokens with the text that they decode to.

    A byte-level tokenizer may cut a character in two: such tokens become one piece. A special token has its name, and
    bytes that are no text and ids beyond the vocabulary have the id in angle brackets. Without a tokenizer every token
    is a piece of its own, its id and a space.
    """

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._texts: dict[tuple[int, ...], str] = {}
        self._special: dict[int, str] = {}
        self._anchor: list[int] = []
        if tokenizer is not None:
            added = tokenizer.get_added_tokens_decoder()
            self._special = {token_id: token.content for token_id, token in added.items() if token.special}
            # Some tokenizers drop a space at a text's beginning, which within a text is a space: decode behind a word.
            self._anchor = encode(tokenizer, "a")

    def pieces(self, ids: Sequence[int]) -> list[Piece]:
        """The pieces of a text, in order; together they hold each token once. A token not known yet is ``MASKED``."""
        found: list[Piece] = []
        while (begin := found[-1].end if found else 0) < len(ids):
            found.append(self._piece(ids, begin))
        return found

    def _piece(self, ids: Sequence[int], begin: int) -> Piece:
        first = ids[begin]
        if first == MASKED or first in self._special or self._tokenizer is None:
            text = "" if first == MASKED else self._special.get(first, f"{first} ")
            return Piece(text, begin, begin + 1)
        for end in range(begin + 1, min(len(ids), begin + _WIDEST_GROUP) + 1):
            if ids[end - 1] == MASKED or ids[end - 1] in self._special:
                break
            text = self._text(self._tokenizer, tuple(ids[begin:end]))
            if text and _UNREADABLE not in text:
                return Piece(text, begin, end)
            cut_off = len(text) - len(text.rstrip(_UNREADABLE))
            if not 0 < cut_off < _CHARACTER_BYTES or _UNREADABLE in text[:-cut_off]:
                break
        return Piece(f"⟨{first}⟩", begin, begin + 1)

    def _text(self, tokenizer: Tokenizer, ids: tuple[int, ...]) -> str:
        """What tokens add to the text before them."""
        if ids not in self._texts:
            before = decode(tokenizer, self._anchor)
            self._texts[ids] = decode(tokenizer, [*self._anchor, *ids])[len(before) :]
        return self._texts[ids]


def shade(step: int, steps: int) -> Style:
    """The background and the ink of a token; text on it is readable (a contrast of 4.5 or more, WCAG 2.1).

    Args:
        step: The step at which the token appeared, from 1.
        steps: The number of steps of the whole process; the last one is the darkest.
    """
    share = 0.0 if steps <= 1 else min(max((step - 1) / (steps - 1), 0.0), 1.0)
    index, between = divmod(share * (len(_BLUES) - 1), 1)
    background = blend_rgb(_BLUES[int(index)], _BLUES[min(int(index) + 1, len(_BLUES) - 1)], between)
    ink = "#ffffff" if share >= _WHITE_INK else "#000000"
    return Style(color=ink, bgcolor=Color.from_triplet(background))


def coloured(
    aligner: Aligner, tokens: Sequence[int], step_of_token: Sequence[int], steps: int, newline: str = "\n"
) -> Text:
    """The text of tokens on backgrounds that tell their steps, a dim block for each masked token.

    Args:
        aligner: The aligner of the model's tokenizer.
        tokens: Token ids; those that are still masked may be any.
        step_of_token: The step at which each token appeared, from 1; 0 for a given token, -1 for a masked one.
        steps: The step of the darkest colour.
        newline: What is drawn for a newline that was sampled.
    """
    text = Text()
    ids = [MASKED if step < 0 else token for token, step in zip(tokens, step_of_token, strict=True)]
    for piece in aligner.pieces(ids):
        step = max(step_of_token[piece.begin : piece.end])
        if step < 0:
            text.append(BLOCK, Style(dim=True))
        elif step == 0:
            text.append(visible(piece.text))
        else:
            text.append(visible(piece.text).replace("\n", newline), shade(step, steps))
    return text


class Turn(NamedTuple):
    """What one speaker wrote, and the number of sampling steps that it took; 0 for a text that was given."""

    speaker: str
    text: Text
    steps: int = 0


class Dialogue(NamedTuple):
    """Turns that belong together, and a line about how they were sampled."""

    turns: Sequence[Turn]
    facts: str = ""


def question(text: str) -> Turn:
    """A turn that was given; newlines at its end are not drawn."""
    return Turn("User", Text(visible(text.rstrip("\n"))))


def answer(generation: Generation, index: int, aligner: Aligner, speaker: str) -> Turn:
    """The answer to the prompt ``index`` of a batch, with the step of each of its tokens as a colour."""
    steps = generation.step_of_token[index]
    last = max(steps, default=0)
    return Turn(speaker, coloured(aligner, generation.tokens[index], steps, last, newline="↵\n"), last)


def check_drawing_path(path: str) -> Path:
    """The path of a drawing; refused, before the work begins, where it cannot be written."""
    target = expanded(path)
    if target.suffix.lower() not in ENDINGS:
        raise UserError(f"picture '{path}': its ending is none of {', '.join(ENDINGS)}; give one of them")
    if target.is_dir() or not target.parent.is_dir():
        what = "it is a folder" if target.is_dir() else f"there is no folder '{target.parent}'"
        raise UserError(f"picture '{path}': {what}; give a file in a folder that exists")
    require_replaceable(target)
    return target


def write_drawing(path: Path, dialogues: Sequence[Dialogue]) -> None:
    """Draws dialogues one below the other and writes them in the format of the file's ending.

    The same dialogues give the same bytes. A file loads nothing from elsewhere and holds its text as text.
    """
    console = recording_console(_COLUMNS)
    for dialogue in dialogues:
        table = Table(show_header=False, box=SIMPLE, show_lines=True, expand=True)
        table.add_column(style="bold", no_wrap=True, min_width=5)
        table.add_column(ratio=1, overflow="fold")
        for turn in dialogue.turns:
            table.add_row(turn.speaker, turn.text)
        console.print(Rule(style="dim"), table)
        sampled = {turn.steps for turn in dialogue.turns if turn.steps}
        if sampled:
            console.print(Padding(_legend(sampled), (0, 2)))
        if dialogue.facts:
            console.print(Padding(Text(visible(dialogue.facts), "dim"), (0, 2)))
    if path.suffix.lower() == ".svg":
        exported = console.export_svg(theme=DEFAULT_TERMINAL_THEME, code_format=_SVG, font_aspect_ratio=_ASPECT)
        exported = re.sub(r'textLength="[^"]*"([^>]*)>([^<]*)<', _with_true_width, exported)
    else:
        exported = console.export_html(theme=DEFAULT_TERMINAL_THEME)
    try:
        with written_atomically(path) as temporary:
            temporary.write_text(exported, encoding="utf-8")
    except OSError as error:
        raise UserError(f"picture '{path}' cannot be written ({error.strerror}); choose another file") from error


def _with_true_width(found: re.Match[str]) -> str:
    """Rich 15 takes each character for one cell wide here, which would squeeze Chinese to half of its width."""
    attributes, text = found.groups()
    return f'textLength="{cell_len(unescape(text)) * _CELL:g}"{attributes}>{text}<'


def _legend(steps: Collection[int]) -> Text:
    """The colours and their meaning; each answer has the darkest colour at its own last step."""
    legend, most = Text("step 1 ", "dim"), max(steps)
    for number in range(1, min(most, _SWATCHES) + 1):
        legend.append("  ", shade(number, min(most, _SWATCHES)))
    last = f"step {most}" if len(steps) == 1 else "last step"
    meaning = f"{last}: the darker, the later" if most > 1 else "all tokens at once"
    return legend.append(f" {meaning}; given text has no colour")


_SECONDS_BETWEEN_FRAMES = 1 / 15
_LARGEST_SHARE = 0.1
"""The largest share of the time that drawing may take from sampling."""
_LINES_BESIDE = 3
"""The lines of the screen that are left free, for the line of the step and the shell's prompt."""


class Unfolding:
    """Shows the snapshots of a sampling on a terminal; a context manager.

    What it shows goes away at its end; who called prints the answer.

    Args:
        aligner: The aligner of the model's tokenizer.
        prompts: A line for each answer, which tells several apart.
        console: The console to draw on.
        grows: Whether answers grow to the right, so that masked tokens at their ends are not shown.
    """

    def __init__(self, aligner: Aligner, prompts: Sequence[str], console: Console, *, grows: bool = False) -> None:
        self._aligner, self._prompts, self._console, self._grows = aligner, prompts, console, grows
        self._live = Live(console=console, auto_refresh=False, transient=True)
        self._answers: dict[int, Text] = {}
        self._next_frame = -math.inf

    def __enter__(self) -> Unfolding:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def observe(self, snapshot: Snapshot) -> None:
        """What ``generate`` calls after each step; draws at most 15 times a second and a tenth of the time."""
        began = time.monotonic()
        if began < self._next_frame:
            return
        for i, (tokens, steps) in enumerate(zip(snapshot.tokens, snapshot.step_of_token, strict=True)):
            text = coloured(self._aligner, tokens, steps, snapshot.steps)
            if self._grows:
                text.right_crop(len(text) - len(text.plain.rstrip(BLOCK)))
            self._answers[snapshot.first + i] = text
        self._live.update(self._frame(snapshot), refresh=True)
        ended = time.monotonic()
        self._next_frame = max(began + _SECONDS_BETWEEN_FRAMES, ended + (ended - began) / _LARGEST_SHARE)

    def _frame(self, snapshot: Snapshot) -> Group:
        """The step, and as many lines as the screen has room for, up to the line of the last token."""
        lines: list[Text] = []
        for number, text in sorted(self._answers.items()):
            if len(self._prompts) > 1:
                lines.append(Text(visible(self._prompts[number]).replace("\n", "↵"), "dim", no_wrap=True))
                lines[-1].truncate(self._console.width, overflow="ellipsis")
            lines += text.wrap(self._console, self._console.width, overflow="fold")
        room = max(1, self._console.height - _LINES_BESIDE)
        known = [n for n, line in enumerate(lines, 1) if line.plain.strip(BLOCK + " ")]
        end = max(known[-1] if known else 0, room)
        return Group(*lines[:end][-room:], Text(f"step {snapshot.step} of {snapshot.steps}", "dim"))
