"""What a person sees of a prepared folder: the progress of its preparation, and tables of what it holds."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
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

from llada_lightning.data.manifest import Manifest, read_manifest
from llada_lightning.data.shards import Verification, verify
from llada_lightning.support.printing import people_console


class PrepareProgress:
    """Shows a preparation on stderr: a live line on a terminal, else one line at the end; a context manager."""

    def __init__(self, *, enabled: bool = True, console: Console | None = None) -> None:
        self._console, self._enabled = console or people_console(stderr=True), enabled
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[counts]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            disable=not (enabled and self._console.is_terminal),
        )
        self._task: TaskID | None = None
        self._limit: int | None = None
        self._size: int | None = None
        self._started = self._shown = time.monotonic()
        self._counted = ""

    def __enter__(self) -> PrepareProgress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def phase(self, name: str, *, total_bytes: int | None = None, max_bytes: int | None = None) -> None:
        """Begins a phase: of a source of so many bytes as stored, of which so many bytes of text are read at most."""
        if self._task is not None:
            self._bar.remove_task(self._task)
        self._started = time.monotonic()
        self._limit, self._size = max_bytes, total_bytes
        self._task = self._bar.add_task(name, total=1.0 if total_bytes or max_bytes else None, counts="")

    def update(self, splits: Iterable[Any], position: int, *, force: bool = False) -> None:
        """Shows the documents, tokens and bytes of text of the splits, and how far a source is read, in stored bytes.

        Called for every document, drawn five times a second.
        """
        now = time.monotonic()
        if self._task is None or (not force and now - self._shown < 0.2):
            return
        self._shown = now
        documents, tokens, size = np.sum([(split.documents, split.tokens, split.bytes) for split in splits], axis=0)
        rate = tokens / max(now - self._started, 1e-9)
        self._counted = f"{documents:,} documents, {tokens:,} tokens, {decimal(int(size))} ({rate / 1e6:.2f}M tokens/s)"
        # Whichever end comes first: the source's or the limit's.
        shares = [size / self._limit] if self._limit else []
        shares += [position / self._size] if self._size else []
        self._bar.update(self._task, completed=max(shares, default=0.0), counts=self._counted)

    def finish(self, out: str, *, skipped: int) -> None:
        """Prints the last line, which stays on the terminal."""
        left_out = f"; {skipped} files skipped: not text" if skipped else ""
        self.line(f"prepared '{out}': {self._counted}, in {time.monotonic() - self._started:.1f} s{left_out}")

    def line(self, text: str) -> None:
        """Prints one line as it is."""
        if self._enabled:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)


def verify_with_progress(folder: str, *, quiet: bool) -> Verification:
    """Verify a prepared folder, with a bar on stderr where that is a terminal."""
    console = people_console(stderr=True)
    columns = (TextColumn("verifying"), BarColumn(24), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    splits = read_manifest(folder).splits.values()
    with Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal) as bar:
        task = bar.add_task("", total=sum(shard.size for split in splits for shard in split.shards))
        return verify(folder, lambda size: bar.advance(task, size))


def prepared_table(manifest: Manifest, out: str) -> Table:
    """The counts of a prepared folder, split by split."""
    info = manifest.tokenizer
    caption = (
        f"vocabulary {info.vocab_size:,}, mask {info.mask_token} = {info.mask_id}, end of text "
        f"{info.eos_token} = {info.eos_id}; data fingerprint {manifest.fingerprint[:16]}"
    )
    rows = []
    for name, split in manifest.splits.items():
        lost = "" if split.lost_bytes is None else f"{split.lost_bytes:,}"
        counts = (f"{split.documents:,}", f"{split.tokens:,}", f"{split.bytes:,}", lost)
        rows.append((name, *counts, f"{split.bytes_per_token:.3f}", f"{len(split.shards):,}"))
    return _table(out, caption, ("split", "documents", "tokens", "bytes", "bytes lost", "bytes/token", "shards"), rows)


def verification_table(folder: str, found: Verification) -> Table:
    """The damaged files, or else what is whole."""
    state = f"{len(found.damaged)} of {found.files} files are damaged" if found.damaged else "whole"
    title = f"{folder}: {state}"
    caption = f"{found.files} files; data fingerprint {found.manifest.fingerprint[:16]}"
    if found.damaged:
        return _table(title, caption, ("file", "problem"), [(damage.file, damage.problem) for damage in found.damaged])
    rows = []
    for name, split in found.manifest.splits.items():
        size = sum(shard.size for shard in split.shards)
        rows.append((name, f"{split.documents:,}", f"{split.tokens:,}", f"{size:,}", f"{len(split.shards):,}"))
    return _table(title, caption, ("split", "documents", "tokens", "bytes of shards", "shards"), rows)


def _table(title: str, caption: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(title=title, caption=caption, caption_justify="left")
    for name in columns:
        text = name in ("split", "file", "problem")
        table.add_column(name, justify="left" if text else "right", overflow="fold" if text else "ellipsis")
    for row in rows:
        table.add_row(*row)
    return table
