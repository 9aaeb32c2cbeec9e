"""The picture of a sampling process as a figure, PNG or SVG."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from textwrap import wrap as wrap_text
from typing import Any

import matplotlib
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from rich.cells import cell_len

from llada_lightning.generation.pictures.dialogue import Dialogue, Turn
from llada_lightning.generation.pictures.ink import shade
from llada_lightning.generation.pictures.wrapping import Run, wrap
from llada_lightning.support.errors import UserError

_COLUMNS, _LABEL = 84, 8
"""Cells of the text, and of the speakers' names before it."""
_SIZE = 10.0
_CELL, _LINE, _GAP = 0.602 * _SIZE, 1.62 * _SIZE, 0.8 * _SIZE
"""Points: a character of DejaVu Sans Mono, a line, the space around a turn."""
_SMALL = 0.85
"""Size of the line of facts, of the text's."""
_MARGIN = 1.4 * _SIZE
_DPI = 160
_LONGEST = 400 * 72
"""Points; a PNG of more than 2^16 pixels cannot be drawn."""
_INK, _GREY, _RULE = "#1a1a1a", "#707070", "#d8d8d8"
_SWATCHES = 12

_FONTS = (
    "DejaVu Sans Mono", "DejaVu Sans", "Noto Sans Mono CJK SC", "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans SC",
    "Source Han Sans SC", "Source Han Sans CN", "WenQuanYi Micro Hei", "WenQuanYi Zen Hei", "Droid Sans Fallback",
    "PingFang SC", "Hiragino Sans GB", "Microsoft YaHei", "SimHei", "Arial Unicode MS", "Noto Emoji", "Symbola",
    "Segoe UI Symbol", "Unifont",
)  # fmt: skip
"""Tried in turn for each character; those of a machine that has them."""

_BOX = "□"


def save_figure(dialogues: Sequence[Dialogue], path: Path) -> str:
    """Draws dialogues below each other and writes them in the format of the file's ending.

    An SVG keeps its text as text, so the reader's fonts show it; a PNG has boxes for what no installed font has.

    Returns:
        Which characters these are, one line; empty where there is none.

    Raises:
        UserError: it is too long for a PNG.
    """
    as_svg = path.suffix.lower() == ".svg"
    drawing = _Drawing(dialogues, keep_all=as_svg)
    if not as_svg and drawing.height > _LONGEST:
        raise UserError(f"picture: {drawing.lines} lines are too many for a PNG; write .html or .svg, or fewer prompts")
    # Without a salt the identities in an SVG are random; without a date its bytes are the same tomorrow.
    settings: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": "llada-lightning",
        "font.family": list(_installed()),
    }
    settings |= {"text.hinting": "none"}  # else a character's width is rounded to pixels, and words outgrow their boxes
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # of an SVG, which needs none
        drawing.figure().savefig(path, dpi=_DPI, metadata={"Date": None} if as_svg else None)
    if not drawing.missing:
        return ""
    some = " ".join(sorted(drawing.missing)[:8])
    return (
        f"picture: no installed font has {some}; boxes stand for them (.html and .svg leave it to the reader's fonts)"
    )


class _Drawing:
    """Lays dialogues out from top to bottom, in points; draws when the height is known."""

    def __init__(self, dialogues: Sequence[Dialogue], keep_all: bool) -> None:
        self._keep_all = keep_all
        self.missing: set[str] = set()
        self._laid: list[tuple[Dialogue, list[tuple[Turn, list[list[Run]]]]]] = [
            (dialogue, [(turn, wrap(turn.marks, _COLUMNS)) for turn in dialogue.turns]) for dialogue in dialogues
        ]
        self.lines = sum(len(lines) for _, turns in self._laid for _, lines in turns)
        turns = sum(len(turns) for _, turns in self._laid)
        self.height = self.lines * _LINE + turns * 2 * _GAP + len(self._laid) * 4 * _LINE + 2 * _MARGIN

    def figure(self) -> Figure:
        width = 2 * _MARGIN + (_LABEL + _COLUMNS + 2) * _CELL
        figure = Figure(figsize=(width / 72, self.height / 72), dpi=_DPI, facecolor="white")
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        axes.set(xlim=(0, width), ylim=(self.height, 0))
        y = _MARGIN
        for dialogue, turns in self._laid:
            for turn, lines in turns:
                y = self._turn(axes, turn, lines, y)
            y = self._foot(axes, dialogue, y)
        axes.set_ylim(y + _MARGIN, 0)
        figure.set_size_inches(width / 72, (y + _MARGIN) / 72)
        return figure

    def _turn(self, axes: Axes, turn: Turn, lines: list[list[Run]], y: float) -> float:
        self._rule(axes, y)
        y += _GAP
        self._text(axes, _MARGIN, y, turn.speaker, _INK, bold=True)
        for line in lines:
            for run in line:
                self._run(axes, run, turn.steps, y)
            y += _LINE
        return y + _GAP

    def _run(self, axes: Axes, run: Run, steps: int, y: float) -> None:
        x = _MARGIN + (_LABEL + run.column) * _CELL
        ink = _INK
        if run.mark.step:
            background, ink = shade(run.mark.step, steps)
            box = Rectangle((x, y), run.cells * _CELL, _LINE, facecolor=background, edgecolor="white", linewidth=0.9)
            axes.add_patch(box)
        column = 0
        for word in _words(run.text):
            if not word.isspace():
                self._text(axes, x + column * _CELL, y, word, ink)
            column += cell_len(word)

    def _text(
        self, axes: Axes, x: float, y: float, text: str, ink: str, *, size: float = 1.0, bold: bool = False
    ) -> None:
        style: dict[str, Any] = {"color": ink, "fontsize": size * _SIZE, "weight": "bold" if bold else "normal"}
        # The baseline is at the same height whatever the letters are; dollars are no mathematics.
        axes.text(x, y + 0.72 * _LINE, self._drawable(text), parse_math=False, **style)

    def _drawable(self, text: str) -> str:
        if self._keep_all:
            return text
        missing = {char for char in text if cell_len(char) and not _has_glyph(char)}
        self.missing |= missing
        return "".join(_BOX if char in missing else char for char in text if cell_len(char) or _has_glyph(char))

    def _foot(self, axes: Axes, dialogue: Dialogue, y: float) -> float:
        """The legend and the facts, and a space to the next dialogue."""
        self._rule(axes, y)
        y += 0.4 * _LINE
        x = _MARGIN + _LABEL * _CELL
        if dialogue.steps:
            self._text(axes, x, y, "step 1", _GREY)
            x += 7 * _CELL
            count = min(dialogue.steps, _SWATCHES)
            for number in range(count):
                colour = shade(number + 1, count)[0]
                axes.add_patch(Rectangle((x, y + 0.1 * _LINE), 2 * _CELL, 0.8 * _LINE, facecolor=colour, linewidth=0))
                x += 2 * _CELL
            meaning = f"{dialogue.last_step}: the darker, the later" if dialogue.steps > 1 else "all at once"
            self._text(axes, x + _CELL, y, meaning, _GREY)
            y += _LINE
        for line in wrap_text(dialogue.facts, int(_COLUMNS / _SMALL)):
            self._text(axes, _MARGIN + _LABEL * _CELL, y, line, _GREY, size=_SMALL)
            y += _SMALL * _LINE
        return y + _LINE

    def _rule(self, axes: Axes, y: float) -> None:
        axes.plot([_MARGIN, axes.get_xlim()[1] - _MARGIN], [y, y], color=_RULE, linewidth=0.8)


def _words(text: str) -> list[str]:
    """Runs of spaces, runs of narrow characters, and each wide character alone: its glyph is not two cells wide.

    An SVG drops spaces at the ends of a text. What has no width belongs to the character before it.
    """
    words: list[str] = []
    for char in text:
        kind = (char.isspace(), cell_len(char))
        if words and (kind[1] == 0 or (kind[1] == 1 and kind == (words[-1][0].isspace(), cell_len(words[-1][0])))):
            words[-1] += char
        else:
            words.append(char)
    return words


@lru_cache(maxsize=1)
def _installed() -> tuple[str, ...]:
    have = {font.name for font in font_manager.fontManager.ttflist}
    return tuple(name for name in _FONTS if name in have)


@lru_cache(maxsize=4096)
def _has_glyph(char: str) -> bool:
    fonts = (font_manager.get_font(font_manager.findfont(name)) for name in _installed())
    return any(font.get_char_index(ord(char)) for font in fonts)
