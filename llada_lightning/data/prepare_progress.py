"""What a person sees of ``llada prepare``: on stderr a live line, or one line at the end; on stdout a table."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Protocol

from rich.console import Console
from rich.filesize import decimal
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table

from llada_lightning.data.integrity import Verification, verify
from llada_lightning.data.manifest import Manifest, read_manifest
from llada_lightning.support.printing import people_console

_SECONDS_BETWEEN_UPDATES = 0.2


class Counts(Protocol):
    """The counts of documents, tokens and bytes of text of one split."""

    @property
    def documents(self) -> int: ...
    @property
    def tokens(self) -> int: ...
    @property
    def bytes(self) -> int: ...


class PrepareProgress:
    """Shows a preparation on stderr: a live line on a terminal, else one line at the end; a context manager.

    Args:
        enabled: Whether anything is written.
        console: The console that is written to; None: stderr.
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
            name: The name of the phase.
            total_bytes: The size of the source as stored, where known.
            max_bytes: The number of bytes of text after which reading ends, where limited.
        """
        if self._task is not None:
            self._bar.remove_task(self._task)
        self._started = time.monotonic()
        self._limit, self._size = max_bytes, total_bytes
        total = 1.0 if total_bytes or max_bytes else None
        self._task = self._bar.add_task(name, total=total, counts="", left="left" if total else "")

    def update(self, splits: Iterable[Counts], position: int, *, force: bool = False) -> None:
        """Shows the counts; called for every document, drawn five times a second.

        Args:
            splits: The counts of each split.
            position: The number of bytes of the source, as stored, that have been read.
            force: Whether it is drawn at once.
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
        """Prints the last line, which stays on the terminal."""
        left_out = f"; {skipped} files skipped: not text" if skipped else ""
        self.line(f"prepared '{out}': {self._counted()}, in {time.monotonic() - self._started:.1f} s{left_out}")

    def line(self, text: str) -> None:
        """Prints one line as it is."""
        if self._enabled:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _counted(self) -> str:
        rate = self._tokens / max(time.monotonic() - self._started, 1e-9)
        return (
            f"{self._documents:,} documents, {self._tokens:,} tokens, {decimal(self._bytes)} "
            f"({rate / 1e6:.2f}M tokens/s)"
        )


def verify_with_progress(folder: str, *, quiet: bool) -> Verification:
    """Verify a prepared folder, with a bar on stderr where that is a terminal."""
    console = people_console(stderr=True)
    columns = (
        TextColumn("verifying"),
        BarColumn(bar_width=24),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    splits = read_manifest(folder).splits.values()
    with Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal) as bar:
        task = bar.add_task("", total=sum(shard.size for split in splits for shard in split.shards))
        return verify(folder, lambda size: bar.advance(task, size))


def prepared_table(manifest: Manifest, out: str) -> Table:
    """The counts of a prepared folder, split by split."""
    info = manifest.tokenizer
    table = Table(
        title=out,
        caption=f"vocabulary {info.vocab_size:,}, mask {info.mask_token} = {info.mask_id}, end of text "
        f"{info.eos_token} = {info.eos_id}; data fingerprint {manifest.fingerprint[:16]}",
        caption_justify="left",
    )
    table.add_column("split")
    for name in ("documents", "tokens", "bytes", "bytes lost", "bytes/token", "shards"):
        table.add_column(name, justify="right")
    for name, split in manifest.splits.items():
        lost = "" if split.lost_bytes is None else f"{split.lost_bytes:,}"
        counts = (f"{split.documents:,}", f"{split.tokens:,}", f"{split.bytes:,}", lost)
        table.add_row(name, *counts, f"{split.bytes_per_token:.3f}", f"{len(split.shards):,}")
    return table


def verification_table(folder: str, found: Verification) -> Table:
    """The damaged files, or else what is whole."""
    state = f"{len(found.damaged)} of {found.files} files are damaged" if found.damaged else "whole"
    table = Table(
        title=f"{folder}: {state}",
        caption=f"{found.files} files; data fingerprint {found.manifest.fingerprint[:16]}",
        caption_justify="left",
    )
    if found.damaged:
        table.add_column("file", overflow="fold")
        table.add_column("problem", overflow="fold")
        for damage in found.damaged:
            table.add_row(damage.file, damage.problem)
        return table
    table.add_column("split")
    for name in ("documents", "tokens", "bytes of shards", "shards"):
        table.add_column(name, justify="right")
    for name, split in found.manifest.splits.items():
        size = sum(shard.size for shard in split.shards)
        table.add_row(name, f"{split.documents:,}", f"{split.tokens:,}", f"{size:,}", f"{len(split.shards):,}")
    return table
