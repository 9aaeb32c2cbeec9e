"""The checkpoints in a run's folder: their paths, their metadata without their weights, and the check of their bytes.

`torch.load` reads a file with flipped bits without an error. But the archives that `torch.save` writes hold a CRC-32 of
each of their members, and a shard is a row of such archives; so every checkpoint can be checked, without a file beside
it.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import re
import zipfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from llada_lightning.checkpoints.sharded_checkpoints import META, ShardedCheckpointReader, is_sharded, read_lazily
from llada_lightning.identity import with_stable_names
from llada_lightning.support.errors import UserError

CONFIG = "config.yaml"
CHECKPOINTS = "checkpoints"
BRANCHES = "branches"
"""The folder, in a run's folder, with one folder for each branch, named by its length in steps."""


def checkpoint_of_step(folder: Path, step: int) -> Path:
    """The path of the checkpoint of a step in a folder."""
    return folder / f"step={step:08d}.ckpt"


def checkpoints_by_step(folder: Path) -> dict[int, Path]:
    """The whole checkpoints of a folder."""
    found = ((path, re.fullmatch(r"step=(\d+)", path.stem)) for path in folder.glob("step=*.ckpt"))
    return {int(match[1]): path for path, match in found if match}


def last_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of the highest step, or None."""
    steps = checkpoints_by_step(folder)
    return steps[max(steps)] if steps else None


def final_checkpoint(folder: Path) -> Path | None:
    """The last checkpoint of a run's folder: of its largest budget that has one, else of its only fit or trunk."""
    lengths = [int(branch.name) for branch in (folder / BRANCHES).glob("*") if branch.name.isdigit()]
    found = (last_checkpoint(folder / BRANCHES / str(length) / CHECKPOINTS) for length in sorted(lengths)[::-1])
    return next((path for path in found if path is not None), None) or last_checkpoint(folder / CHECKPOINTS)


def run_folder_of(checkpoint: Path) -> Path | None:
    """The folder of the run of a checkpoint, also of a branch or of a half-written copy; None where there is none."""
    folder = checkpoint.absolute().parent
    phase = folder.parent
    run = phase.parent.parent if phase.parent.name == BRANCHES else phase
    return run if folder.name == CHECKPOINTS or (run / CONFIG).is_file() else None


def saved_identity(checkpoint: Path) -> dict[str, Any]:
    """The identity of the run that wrote a checkpoint, without reading its weights.

    Raises:
        UserError: the file or folder is not a checkpoint of a run.
    """
    return with_stable_names(_saved(checkpoint, "identity"))


def saved_step(checkpoint: Path) -> int:
    """The optimizer step after which a checkpoint was written.

    Raises:
        UserError: the file is not a checkpoint of a run.
    """
    return _saved(checkpoint, "global_step")


def _saved(checkpoint: Path, key: str) -> Any:
    path = checkpoint / META if checkpoint.is_dir() else checkpoint
    try:
        return torch.load(path, mmap=True, weights_only=True, map_location="cpu")[key]
    except FileNotFoundError as error:
        raise UserError(f"checkpoint: '{checkpoint}' does not exist; give one of a run's checkpoints/") from error
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError, KeyError, TypeError) as error:
        raise UserError(f"checkpoint: '{checkpoint}' is damaged or of another program; take another one") from error


_CONTENT = ("global_step", "state_dict", "optimizer_states", "lr_schedulers", "guard")


def content_hash(path: Path) -> str:
    """sha256 of what a checkpoint holds of a run, the same for a file and for shards: weights, moments and counters.

    Clocks, versions and the packing of the bytes are left out: they differ between two undisturbed runs of one
    configuration.
    """
    if is_sharded(path):
        content = read_lazily(path)
    else:
        content = torch.load(path, mmap=True, weights_only=True, map_location="cpu")
    return digest({key: content.get(key) for key in _CONTENT})


def digest(value: Any) -> str:
    """sha256 over nested dicts and sequences of tensors and plain values: names, types, shapes and every bit.

    Args:
        value: The value; a function in it counts as the value that it returns.
    """
    found = hashlib.sha256()
    _feed(found.update, value)
    return found.hexdigest()


def _feed(update: Callable[[Any], None], value: Any) -> None:
    if callable(value):
        value = value()
    if isinstance(value, dict):
        update(f"{{{len(value)}".encode())
        for key in sorted(value, key=repr):
            update(f"{key!r}:".encode())
            _feed(update, value[key])
    elif isinstance(value, (list, tuple)):
        update(f"[{len(value)}".encode())
        for item in value:
            _feed(update, item)
    elif isinstance(value, torch.Tensor):
        update(f"{value.dtype}{tuple(value.shape)}".encode())
        update(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    else:
        update(f"{value!r},".encode())


def checkpoint_hash(path: Path) -> str:
    """sha256 of a checkpoint's bytes: of its file, or of all files of a sharded one, in order of name."""
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            with file.open("rb") as content:
                while block := content.read(1 << 22):
                    digest.update(block)
    return digest.hexdigest()


def damage(checkpoint: Path) -> str | None:
    """A short description of the damage to a checkpoint's bytes; None: there is none.

    Reads all of it, once a process and state of the files (about 3 GB/s from the page cache); runs nothing.

    Args:
        checkpoint: The path of a file, or of the folder of a sharded checkpoint.
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
        fix = "take another one" if whole is None else f"take '{whole}', which is whole"
        raise UserError(f"checkpoint: '{checkpoint}' is damaged ({found}) or of another program; {fix}")


def whole_neighbour(checkpoint: Path) -> Path | None:
    """The checkpoint of the highest step that is whole, in the folder of one that cannot be used; None: no other."""
    whole, _ = whole_checkpoint(checkpoint.parent)
    return None if whole == checkpoint else whole


def whole_checkpoint(folder: Path, before: int | None = None) -> tuple[Path | None, dict[Path, str]]:
    """The checkpoint of the highest step that is whole, and those of higher steps with their damage.

    Args:
        folder: The folder of the checkpoints.
        before: The step below which checkpoints count; None: all count.
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
    # zipfile, zlib, pickle and torch raise all kinds of errors for damaged bytes: any byte may be read as any field.
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'unreadable'}"


def _damage_of_archive(path: Path) -> str | None:
    with zipfile.ZipFile(path) as archive:
        member = archive.testzip()
    return None if member is None else f"'{member}' in {path.name} fails its checksum"


def _damage_of_shards(folder: Path) -> str | None:
    for entry in ShardedCheckpointReader(folder).read_metadata().storage_data.values():
        with (folder / entry.relative_path).open("rb") as file:
            file.seek(entry.offset)  # one tensor at a time in memory
            with zipfile.ZipFile(io.BytesIO(file.read(entry.length))) as archive:
                if archive.testzip() is not None:
                    return f"{entry.relative_path} fails its checksum at byte {entry.offset}"
    return None
