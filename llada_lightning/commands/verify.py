"""``llada prepare --verify``: reads all of a prepared folder, and names what is damaged."""

from __future__ import annotations

from typing import Any

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from llada_lightning.data.integrity import Damage, Verification, verify
from llada_lightning.data.manifest import COPY_AGAIN, read_manifest
from llada_lightning.support.command_line import print_json
from llada_lightning.support.errors import UserError
from llada_lightning.support.printing import people_console


def verify_command(folder: str, *, as_json: bool, quiet: bool) -> int:
    """Verifies a prepared folder; prints a table or one JSON object; returns the exit code 0.

    Raises:
        UserError: a file is damaged: the first one, and how many more; the table or the object has them all.
    """
    found = _verified(folder, quiet)
    if as_json:
        print_json(report(folder, found))
    else:
        people_console().print(_table(folder, found))
    if found.damaged:
        first, *more = found.damaged
        also = f", and {len(more)} more file{'s' * (len(more) > 1)}" if more else ""
        raise UserError(f"'{folder}' is damaged: {first.file} {first.problem}{also}; {COPY_AGAIN}")
    return 0


def _verified(folder: str, quiet: bool) -> Verification:
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


def report(folder: str, found: Verification) -> dict[str, Any]:
    """What ``--json`` prints."""
    return {
        "folder": folder,
        "whole": not found.damaged,
        "fingerprint": found.manifest.fingerprint,
        "files": found.files,
        "bytes": sum(shard.size for split in found.manifest.splits.values() for shard in split.shards),
        "documents": {name: split.documents for name, split in found.manifest.splits.items()},
        "tokens": {name: split.tokens for name, split in found.manifest.splits.items()},
        "damaged": [{"file": damage.file, "problem": damage.problem} for damage in found.damaged],
    }


def _table(folder: str, found: Verification) -> Table:
    """The damaged files, or else what is whole."""
    state = f"{len(found.damaged)} of {found.files} files are damaged" if found.damaged else "whole"
    table = Table(
        title=f"{folder}: {state}",
        caption=f"{found.files} files; data fingerprint {found.manifest.fingerprint[:16]}",
        caption_justify="left",
    )
    if found.damaged:
        return _with_rows(table, found.damaged)
    table.add_column("split")
    for name in ("documents", "tokens", "bytes of shards", "shards"):
        table.add_column(name, justify="right")
    for name, split in found.manifest.splits.items():
        size = sum(shard.size for shard in split.shards)
        table.add_row(name, f"{split.documents:,}", f"{split.tokens:,}", f"{size:,}", f"{len(split.shards):,}")
    return table


def _with_rows(table: Table, damaged: tuple[Damage, ...]) -> Table:
    table.add_column("file", overflow="fold")
    table.add_column("problem", overflow="fold")
    for damage in damaged:
        table.add_row(damage.file, damage.problem)
    return table
