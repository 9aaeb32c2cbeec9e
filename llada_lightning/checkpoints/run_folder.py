"""The checkpoints in a run's folder, one file or shards: their paths, their content, and the check of their bytes.

``torch.load`` reads a file with flipped bits without an error. But the archives that ``torch.save`` writes hold a
CRC-32 of each of their members, and a shard is a row of such archives; so every checkpoint can be checked, without a
file beside it. A sharded checkpoint is a folder that every process wrote a part of, in Lightning's layout: tensors and
optimizer settings in the format of ``torch.distributed.checkpoint``, everything else in ``meta.pt``. That library reads
its index, and whatever is no tensor, as pickles that may run code; the reader here takes only what a checkpoint is made
of.
"""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import re
import shutil
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import metadata as dcp_metadata
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem

from llada_lightning.identity import with_stable_names
from llada_lightning.records import read_records
from llada_lightning.support.errors import UserError
from llada_lightning.support.torch_internals import index_names, set_nested

CONFIG = "config.yaml"
CHECKPOINTS = "checkpoints"
BRANCHES = "branches"
"""The folder, in a run's folder, with one folder for each branch, named by its length in steps."""
META = "meta.pt"
"""The file, in a sharded checkpoint, of everything but tensors: step, loops, callbacks, identity."""
PARTIAL = ".partial"
"""The end of the name of a file or folder that is being written or removed."""


def checkpoint_of_step(folder: Path, step: int) -> Path:
    """The path of the checkpoint of a step in a folder."""
    return folder / f"step={step:08d}.ckpt"


def checkpoints_by_step(folder: Path) -> dict[int, Path]:
    """The checkpoints of a folder that have been written to their end."""
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


def result_checkpoints(folder: Path) -> list[Path]:
    """The checkpoint of each result of a run's folder that still has one, of its milestones and budgets alike.

    Raises:
        UserError: The folder holds no result, or its results have no checkpoints.
    """
    records = read_records(folder)
    steps = sorted(record["steps"] for record in records)
    found = []
    for step in steps:
        places = (folder / BRANCHES / str(step) / CHECKPOINTS, folder / CHECKPOINTS)
        found += [path for place in places if (path := checkpoint_of_step(place, step)).exists()][:1]
    if not found:
        what = f"{len(records)} results without a checkpoint" if records else "no result"
        raise UserError(f"checkpoint: '{folder}' holds {what}; give the folder of a run that has reached a budget")
    return found


def run_folder_of(checkpoint: Path) -> Path | None:
    """The folder of the run of a checkpoint, also of a branch or of a half-written copy; None where there is none."""
    folder = checkpoint.absolute().parent
    phase = folder.parent
    run = phase.parent.parent if phase.parent.name == BRANCHES else phase
    return run if folder.name == CHECKPOINTS or (run / CONFIG).is_file() else None


def saved_identity(checkpoint: Path) -> dict[str, Any]:
    """The identity of the run that wrote a checkpoint, without reading its weights."""
    return with_stable_names(_saved(checkpoint, "identity"))


def saved_step(checkpoint: Path) -> int:
    """The optimizer step after which a checkpoint was written."""
    return _saved(checkpoint, "global_step")


def saved_threads(checkpoint: Path) -> int | None:
    """The number of threads that a run on the CPU computed with; None: on another device, or of an older version."""
    return _saved(checkpoint, "threads", None)


def _saved(checkpoint: Path, key: str, *default: Any) -> Any:
    path = checkpoint / META if checkpoint.is_dir() else checkpoint
    try:
        content = torch.load(path, mmap=True, weights_only=True, map_location="cpu")
        return content.get(key, *default) if default else content[key]
    except FileNotFoundError as error:
        raise UserError(f"checkpoint: '{checkpoint}' does not exist; give one of a run's checkpoints/") from error
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"checkpoint: '{checkpoint}' is damaged or of another program; take another one") from error


def whole_checkpoint(folder: Path, before: int | None = None) -> tuple[Path | None, dict[Path, str]]:
    """The whole checkpoint of the highest step (below ``before``), and those of higher steps with their damage."""
    damaged: dict[Path, str] = {}
    for step, checkpoint in sorted(checkpoints_by_step(folder).items(), reverse=True):
        if before is not None and step >= before:
            continue
        found = damage(checkpoint)
        if found is None:
            return checkpoint, damaged
        damaged[checkpoint] = found
    return None, damaged


def whole_neighbour(checkpoint: Path) -> Path | None:
    """The checkpoint of the highest step that is whole, in the folder of one that cannot be used; None: no other."""
    whole, _ = whole_checkpoint(checkpoint.parent)
    return None if whole == checkpoint else whole


def require_whole(checkpoint: Path) -> None:
    """Refuse a checkpoint that is not there, cut short or altered."""
    if not checkpoint.exists():
        raise UserError(f"checkpoint: '{checkpoint}' does not exist; give one of a run's checkpoints/")
    found = damage(checkpoint)
    if found is not None:
        whole = whole_neighbour(checkpoint)
        fix = "take another one" if whole is None else f"take '{whole}', which is whole"
        raise UserError(f"checkpoint: '{checkpoint}' is damaged ({found}) or of another program; {fix}")


def damage(checkpoint: Path) -> str | None:
    """A short description of the damage to the bytes of a checkpoint, file or folder; None: there is none.

    Reads all of it, once a process and state of the files (about 3 GB/s from the page cache); runs nothing.
    """
    files = sorted(checkpoint.iterdir()) if checkpoint.is_dir() else [checkpoint]
    stats = [(path, path.stat()) for path in files if path.is_file()]
    return _damage(checkpoint, tuple((path, stat.st_size, stat.st_mtime_ns) for path, stat in stats))


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


def put_in_place(partial: Path, target: Path) -> None:
    """Give a checkpoint that is written whole, file or folder, its name; what had the name before is removed."""
    if partial.is_dir():  # the shards are on disk by now, their writer sees to it
        with (partial / META).open("rb") as file:
            os.fsync(file.fileno())
    if target.is_dir() or (partial.is_dir() and target.exists()):
        discard(target)
    os.replace(partial, target)


def discard(path: Path) -> None:
    """Remove a checkpoint, file or folder, such that no half of it is ever found under its name."""
    if path.is_dir() and not path.name.endswith(PARTIAL):
        doomed = path.with_name(f"{path.name}.old{PARTIAL}")
        shutil.rmtree(doomed, ignore_errors=True)
        path = path.rename(doomed)
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


_CONTENT = ("global_step", "state_dict", "optimizer_states", "lr_schedulers", "guard")


def content_hash(path: Path) -> str:
    """SHA-256 of what a checkpoint holds of a run, the same for a file and for shards: weights, moments and counters.

    Clocks, versions and the packing of the bytes are left out: they differ between two undisturbed runs of one
    configuration.
    """
    if is_sharded(path):
        content = read_sharded(path, lazily=True)
    else:
        content = torch.load(path, mmap=True, weights_only=True, map_location="cpu")
    return digest({key: content.get(key) for key in _CONTENT})


def digest(value: Any) -> str:
    """SHA-256 over nested dicts and sequences of tensors and plain values: names, types, shapes and every bit.

    A function in it counts as the value that it returns.
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
    """SHA-256 of a checkpoint's bytes: of its file, or of all files of a sharded one, in order of name."""
    found = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            with file.open("rb") as content:
                while block := content.read(1 << 22):
                    found.update(block)
    return found.hexdigest()


def is_sharded(path: Path) -> bool:
    """Whether ``path`` is a checkpoint in shards."""
    return (path / META).is_file()


class ShardedCheckpointReader(dcp.FileSystemReader):
    """Reads the shards of a folder. The index is read once, and no code in it is run."""

    _index: Metadata | None = None

    def read_metadata(self, *arguments: Any, **keywords: Any) -> Metadata:
        """The index of the tensors and of the bytes that the shards hold.

        Raises:
            pickle.UnpicklingError: It holds other objects than an index does.
        """
        if self._index is None:
            with (Path(self.path) / ".metadata").open("rb") as file:
                self._index = _IndexUnpickler(file).load()
            if not isinstance(self._index, Metadata):
                raise pickle.UnpicklingError(f"{type(self._index).__name__} is not an index")
            self._index.storage_meta = self._index.storage_meta or StorageMeta()
        return self._index

    def tensors(self) -> dict[str, TensorStorageMetadata]:
        """What the index holds of each tensor, by its full name, such as ``state_dict.model.norm.weight``."""
        stored = self.read_metadata().state_dict_metadata
        return {key: entry for key, entry in stored.items() if isinstance(entry, TensorStorageMetadata)}

    def read_tensor(self, key: str) -> torch.Tensor:
        """One tensor by its full name, whole, on the CPU."""
        stored = self.tensors()[key]
        tensor = torch.empty(stored.size, dtype=stored.properties.dtype)
        self.fill({key: tensor})
        return tensor

    def fill(self, values: dict[str, Any], together: bool = False) -> None:
        """Reads, in place, the value of each full name, or of each nested one; a tensor is read into the given one.

        Args:
            values: The values that are filled.
            together: Whether all processes of the run read, each its shards.

        Raises:
            UserError: A shard is missing or damaged, or holds other things than plain values and tensors.
        """
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", ".*torch.distributed is disabled.*")  # as asked
                dcp.load(values, storage_reader=self, planner=_Planner(), no_dist=not together)
        except CheckpointException as error:
            cause, _ = next(iter(error.failures.values()))
            raise UserError(
                f"checkpoint '{self.path}' is damaged ({type(cause).__name__}: {str(cause).splitlines()[0]}); copy it "
                "again, or take another one"
            ) from cause


def _enum_member(kind: Any, name: Any) -> Any:
    """An index's ``getattr``: early Python 3.11 (3.11.2, no longer 3.11.7) writes a member of an enum by it."""
    if isinstance(kind, type) and issubclass(kind, Enum) and kind.__module__ == dcp_metadata.__name__:
        members = kind.__members__
        if isinstance(name, str) and name in members:
            return members[name]
    raise pickle.UnpicklingError("an index takes getattr for members of its own enums only")


class _IndexUnpickler(pickle.Unpickler):
    _OTHERS = {  # noqa: RUF012 (read only)
        ("builtins", "getattr"): _enum_member,
        ("torch", "Size"): torch.Size,
        **index_names(),
        ("pathlib", "PosixPath"): Path,  # where it was written; for the record, and never opened
        ("pathlib._local", "PosixPath"): Path,
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self._OTHERS:
            return self._OTHERS[module, name]
        found = getattr(torch if module == "torch" else dcp_metadata, name, None)
        if module == "torch" and isinstance(found, torch.dtype):
            return found
        if module == dcp_metadata.__name__ == getattr(found, "__module__", None) and isinstance(found, type):
            return found
        raise pickle.UnpicklingError(f"{module}.{name} is not a part of an index")


class _Planner(dcp.DefaultLoadPlanner):
    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        # The library's own method runs what it reads; here nothing but plain values and tensors pass.
        plain = torch.load(value, weights_only=True)
        set_nested(self.original_state_dict, self.mappings[read_item.dest_index.fqn], plain)


@contextmanager
def refusing_strangers(path: Path) -> Iterator[None]:
    """Raises a UserError for a checkpoint that is damaged, or holds objects that could run code."""
    try:
        yield
    except (OSError, EOFError, LookupError, AttributeError, pickle.UnpicklingError) as error:
        raise UserError(
            f"checkpoint '{path}' is refused: it is damaged, or holds other things than a checkpoint, which may run "
            "code when they are read; take another one"
        ) from error


def read_sharded(folder: Path, lazily: bool = False) -> dict[str, Any]:
    """A sharded checkpoint as the file that one process would have written: whole tensors, moments by number.

    Args:
        folder: The folder, which any number of processes wrote.
        lazily: Whether a function that reads it takes the place of each tensor, so that one at a time is in memory.

    Returns:
        What Lightning's checkpoint files hold, on the CPU. Nothing is exchanged with other processes.
    """
    checkpoint: dict[str, Any] = torch.load(folder / META, weights_only=True, map_location="cpu")
    reader = ShardedCheckpointReader(folder)
    index, tensors = reader.read_metadata(), reader.tensors()
    flat: dict[str, Any] = {key: None for key in index.state_dict_metadata if key not in tensors}
    reader.fill(flat)
    for key in tensors:
        read = partial(reader.read_tensor, key)
        flat[key] = read if lazily else read()
    weights: dict[str, Any] = {}
    optimizers: dict[str, tuple[dict[str, Any], dict[int, Any]]] = {}
    for key, (part, *path) in index.planner_data.items():
        if part == "state_dict":
            weights[path[0]] = flat[key]
            continue
        state, groups = optimizers.setdefault(part, ({}, {}))
        kind, owner, name = path
        (state if kind == "state" else groups).setdefault(owner, {})[name] = flat[key]
    states = [_by_number(*optimizers[f"optimizer_{i}"]) for i in range(len(optimizers))]
    return {**checkpoint, "state_dict": weights, "optimizer_states": states}


def _by_number(state: dict[str, Any], groups: dict[int, Any]) -> dict[str, Any]:
    """An optimizer's state keyed by its parameters' names, keyed by their numbers as ``Optimizer.state_dict`` does."""
    ordered = [groups[i] for i in sorted(groups)]
    numbers = {name: n for n, name in enumerate(name for group in ordered for name in group["params"])}
    return {
        "state": {numbers[name]: values for name, values in state.items()},
        "param_groups": [{**group, "params": [numbers[name] for name in group["params"]]} for group in ordered],
    }
