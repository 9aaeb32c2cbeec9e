"""Marked text in lines of a fixed width, for a figure, where nothing else breaks lines."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from rich.cells import cell_len

from llada_lightning.generation.pictures.dialogue import Mark

NEWLINE = "↵"
TAB = "→   "
_HANGING = 2
"""Cells of spaces that may stand beyond a line's end."""


@dataclass(frozen=True)
class Run:
    """Text of one mark within a line.

    Args:
        column: of its first cell, from 0.
        cells: that it fills.
    """

    mark: Mark
    text: str
    column: int
    cells: int


def wrap(marks: Sequence[Mark], columns: int) -> list[list[Run]]:
    """Lines of runs, broken at newlines, before words that do not fit, and within words wider than a line.

    A newline that appeared in the sampling is drawn as a sign, because it is a token like any other; one that was
    given only ends its line.

    Args:
        marks: the text.
        columns: cells of a line; a Chinese character fills two.
    """
    lines = _Lines(columns)
    text = "".join(mark.text for mark in marks)
    owners = [mark for mark in marks for _ in mark.text]
    place = 0
    for word in re.findall(r"\n|[^\S\n]+|[^\s]+", text):
        if word != "\n" and not word.isspace():
            lines.make_room(cell_len(word))
        for char, mark in zip(word, owners[place : place + len(word)], strict=True):
            lines.add(char, mark)
        place += len(word)
    return lines.runs()


class _Lines:
    def __init__(self, columns: int) -> None:
        self._columns = columns
        self._lines: list[list[tuple[str, Mark, int]]] = [[]]
        self._column = 0

    def make_room(self, cells: int) -> None:
        if self._column and self._column + cells > self._columns and cells <= self._columns:
            self._break()

    def add(self, char: str, mark: Mark) -> None:
        if char == "\n":
            if mark.step:
                self._put(NEWLINE, mark)
            self._break()
        else:
            for shown in TAB if char == "\t" else char:
                self._put(shown, mark)

    def runs(self) -> list[list[Run]]:
        return [_grouped(line) for line in self._lines]

    def _put(self, char: str, mark: Mark) -> None:
        cells = cell_len(char)
        room = _HANGING if char.isspace() or char == NEWLINE else 0
        if self._column + cells > self._columns + room:
            self._break()
        self._lines[-1].append((char, mark, self._column))
        self._column += cells

    def _break(self) -> None:
        self._lines.append([])
        self._column = 0


def _grouped(line: Sequence[tuple[str, Mark, int]]) -> list[Run]:
    """Neighbours of one mark together; marks of equal content stay apart."""
    runs: list[Run] = []
    for char, mark, column in line:
        if runs and runs[-1].mark is mark:
            last = runs.pop()
            runs.append(Run(mark, last.text + char, last.column, last.cells + cell_len(char)))
        else:
            runs.append(Run(mark, char, column, cell_len(char)))
    return runs
