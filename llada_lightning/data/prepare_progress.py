"""What a person sees of ``llada prepare``: a live line on a terminal, else one line at the end, on stderr."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Protocol

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from llada_lightning.support.printing import people_console

_SECONDS_BETWEEN_UPDATES = 0.2


class Counts(Protocol):
    """Anything that counts documents, tokens and bytes of text."""

    @property
    def documents(self) -> int: ...
    @property
    def tokens(self) -> int: ...
    @property
    def bytes(self) -> int: ...


class PrepareProgress:
    """Reports the phases of a preparation; a context manager.

    Args:
        enabled: without it nothing is written.
        console: where to write; stderr by default.
    """

    def __init__(self, *, enabled: bool = True, console: Console | None = None) -> None:
        self._console = console or people_console(stderr=True)
        self._enabled = enabled
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[counts]}"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            disable=not (enabled and self._console.is_terminal),
        )
        self._task: TaskID | None = None
        self._limit: int | None = None
        self._size: int | None = None
        self._started = self._shown = time.monotonic()
        self._documents = self._tokens = self._bytes = 0

    def __enter__(self) -> PrepareProgress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def phase(self, name: str, *, total_bytes: int | None = None, max_bytes: int | None = None) -> None:
        """Begins a phase.

        Args:
            name: what is being done.
            total_bytes: size of the source as stored, where known.
            max_bytes: bytes of text after which reading ends, where limited.
        """
        if self._task is not None:
            self._bar.remove_task(self._task)
        self._started = time.monotonic()
        self._limit, self._size = max_bytes, total_bytes
        total = 1.0 if total_bytes or max_bytes else None
        self._task = self._bar.add_task(name, total=total, counts="", left="left" if total else "")

    def update(self, splits: Iterable[Counts], position: int, *, force: bool = False) -> None:
        """Shows how far it is; called for every document, drawn five times a second.

        Args:
            splits: what is counted.
            position: bytes of the source, as stored, that have been read.
            force: draw now.
        """
        now = time.monotonic()
        if not force and now - self._shown < _SECONDS_BETWEEN_UPDATES:
            return
        self._shown = now
        counts = list(splits)
        self._documents = sum(split.documents for split in counts)
        self._tokens = sum(split.tokens for split in counts)
        self._bytes = sum(split.bytes for split in counts)
        if self._task is not None:
            # Whichever end comes first: the source's or the limit's.
            shares = [self._bytes / self._limit] if self._limit else []
            shares += [position / self._size] if self._size else []
            self._bar.update(self._task, completed=max(shares, default=0.0), counts=self._counted())

    def finish(self, out: str, *, skipped: int) -> None:
        """The line that stays."""
        left_out = f"; {skipped} files skipped: not text" if skipped else ""
        self.line(f"prepared '{out}': {self._counted()}, in {time.monotonic() - self._started:.1f} s{left_out}")

    def line(self, text: str) -> None:
        """One line, as it is."""
        if self._enabled:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _counted(self) -> str:
        rate = self._tokens / max(time.monotonic() - self._started, 1e-9)
        return (
            f"{self._documents:,} documents, {self._tokens:,} tokens, {decimal(self._bytes)} "
            f"({rate / 1e6:.2f}M tokens/s)"
        )
