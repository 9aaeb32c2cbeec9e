"""Whether a checkpoint's bytes are those that were written.

`torch.load` reads a file with flipped bits without a word. But the archives that `torch.save` writes hold a CRC-32 of
each of their members, and a shard is a row of such archives; so every checkpoint can be checked, without a file beside
it.
"""

from __future__ import annotations

import io
import zipfile
from functools import lru_cache
from pathlib import Path

from llada_lightning.checkpoints.run_folder import checkpoints_by_step
from llada_lightning.checkpoints.sharded_checkpoints import META, ShardReader, is_sharded
from llada_lightning.errors import UserError


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's bytes, in a few words; None: nothing is.

    Reads all of it, once a process and state of the files (about 3 GB/s from the page cache); runs nothing.

    Args:
        checkpoint: a file, or the folder of a sharded one.
    """
    files = sorted(checkpoint.iterdir()) if checkpoint.is_dir() else [checkpoint]
    stats = [(path, path.stat()) for path in files if path.is_file()]
    return _damage(checkpoint, tuple((path, stat.st_size, stat.st_mtime_ns) for path, stat in stats))


def require_whole(checkpoint: Path) -> None:
    """Refuse a checkpoint that is not there, cut short or altered.

    Raises:
        UserError: it is.
    """
    if not checkpoint.exists():
        raise UserError(f"checkpoint: '{checkpoint}' does not exist; give one of a run's checkpoints/")
    found = damage(checkpoint)
    if found is not None:
        whole = whole_neighbour(checkpoint)
        mend = "take another one" if whole is None else f"take '{whole}', which is whole"
        raise UserError(f"checkpoint: '{checkpoint}' is damaged ({found}) or of another program; {mend}")


def whole_neighbour(checkpoint: Path) -> Path | None:
    """The checkpoint of the highest step that is whole, in the folder of one that does not serve; None: no other."""
    whole, _ = whole_checkpoint(checkpoint.parent)
    return None if whole == checkpoint else whole


def whole_checkpoint(folder: Path, before: int | None = None) -> tuple[Path | None, dict[Path, str]]:
    """The checkpoint of the highest step that is whole, and those of higher steps with what is wrong with them.

    Args:
        folder: of checkpoints.
        before: only those of lower steps than this count; None: all.
    """
    damaged: dict[Path, str] = {}
    for step, checkpoint in sorted(checkpoints_by_step(folder).items(), reverse=True):
        if before is not None and step >= before:
            continue
        found = damage(checkpoint)
        if found is None:
            return checkpoint, damaged
        damaged[checkpoint] = found
    return None, damaged


@lru_cache(maxsize=64)
def _damage(checkpoint: Path, files: tuple[tuple[Path, int, int], ...]) -> str | None:
    try:
        if not checkpoint.is_dir():
            return _damage_of_archive(checkpoint)
        if not is_sharded(checkpoint):
            return f"{META} is missing"
        return _damage_of_archive(checkpoint / META) or _damage_of_shards(checkpoint)
    # What zipfile, zlib, pickle and torch say of damaged bytes has no end: any byte may be read as any field.
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'unreadable'}"


def _damage_of_archive(path: Path) -> str | None:
    with zipfile.ZipFile(path) as archive:
        member = archive.testzip()
    return None if member is None else f"'{member}' in {path.name} fails its checksum"


def _damage_of_shards(folder: Path) -> str | None:
    for entry in ShardReader(folder).read_metadata().storage_data.values():
        with (folder / entry.relative_path).open("rb") as file:
            file.seek(entry.offset)  # one tensor at a time in memory
            with zipfile.ZipFile(io.BytesIO(file.read(entry.length))) as archive:
                if archive.testzip() is not None:
                    return f"{entry.relative_path} fails its checksum at byte {entry.offset}"
    return None
