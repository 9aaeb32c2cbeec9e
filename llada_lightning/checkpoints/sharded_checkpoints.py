"""Sharded checkpoints: folders that every process of a run wrote a part of, read as ordinary ones by a single process.

The layout is Lightning's: tensors and optimizer settings in the format of ``torch.distributed.checkpoint``, and
everything else in ``meta.pt``. The library reads its index, and whatever is no tensor, as pickles that may run code;
the reader here takes only what a checkpoint is made of.
"""

from __future__ import annotations

import io
import os
import pickle
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import metadata as dcp_metadata
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem

from llada_lightning.support.errors import UserError
from llada_lightning.support.torch_internals import index_names, set_nested

META = "meta.pt"
"""The file of everything but tensors: step, loops, callbacks, identity."""
PARTIAL = ".partial"
"""The end of the name of a file or folder that is being written or removed."""


def is_sharded(path: Path) -> bool:
    """Whether ``path`` is a checkpoint in shards."""
    return (path / META).is_file()


class ShardedCheckpointReader(dcp.FileSystemReader):
    """Reads the shards of a folder. The index is read once, and no code in it is run."""

    _index: Metadata | None = None

    def read_metadata(self, *arguments: Any, **keywords: Any) -> Metadata:
        """The index of the tensors and of the bytes that the shards hold.

        Raises:
            pickle.UnpicklingError: it holds other objects than an index does.
        """
        if self._index is None:
            with (Path(self.path) / ".metadata").open("rb") as file:
                self._index = _IndexUnpickler(file).load()
            if not isinstance(self._index, Metadata):
                raise pickle.UnpicklingError(f"{type(self._index).__name__} is not an index")
            self._index.storage_meta = self._index.storage_meta or StorageMeta()
        return self._index

    def tensor_shapes(self, part: str) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and type of each tensor of a part, such as ``state_dict``, by its name in the part."""
        stored = self.read_metadata().state_dict_metadata
        return {
            key.removeprefix(f"{part}."): (tuple(entry.size), entry.properties.dtype)
            for key, entry in stored.items()
            if key.startswith(f"{part}.") and isinstance(entry, TensorStorageMetadata)
        }

    def read_tensor(self, part: str, name: str) -> torch.Tensor:
        """One tensor, whole, on the CPU."""
        stored = self.read_metadata().state_dict_metadata[f"{part}.{name}"]
        assert isinstance(stored, TensorStorageMetadata)
        tensor = torch.empty(stored.size, dtype=stored.properties.dtype)
        self.fill({f"{part}.{name}": tensor})
        return tensor

    def fill(self, values: dict[str, Any], together: bool = False) -> None:
        """Reads, in place, the value of each full name, or of each nested one; a tensor is read into the given one.

        Args:
            values: The values that are filled.
            together: Whether all processes of the run read, each its shards.

        Raises:
            UserError: a shard is missing or damaged, or holds other things than plain values and tensors.
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
    """Raises the error for a checkpoint with foreign contents.

    Raises:
        UserError: it is damaged, or holds objects that could run code.
    """
    try:
        yield
    except (OSError, EOFError, LookupError, AttributeError, pickle.UnpicklingError) as error:
        raise UserError(
            f"checkpoint '{path}' is refused: it is damaged, or holds other things than a checkpoint, which may run "
            "code when they are read; take another one"
        ) from error


def read_sharded(folder: Path) -> dict[str, Any]:
    """A sharded checkpoint as the file that one process would have written: whole tensors, moments by number.

    Args:
        folder: The folder, which any number of processes wrote.

    Returns:
        What Lightning's checkpoint files hold, on the CPU. Nothing is exchanged with other processes.
    """
    reader = ShardedCheckpointReader(folder)
    flat: dict[str, Any] = {
        key: torch.empty(stored.size, dtype=stored.properties.dtype)
        if isinstance(stored, TensorStorageMetadata)
        else None
        for key, stored in reader.read_metadata().state_dict_metadata.items()
    }
    reader.fill(flat)
    return _as_file(folder, reader, flat)


def read_lazily(folder: Path) -> dict[str, Any]:
    """As :func:`read_sharded`, but a function that reads it in place of each tensor: one at a time fits in memory."""
    reader = ShardedCheckpointReader(folder)
    stored = reader.read_metadata().state_dict_metadata
    plain: dict[str, Any] = {key: None for key, entry in stored.items() if not isinstance(entry, TensorStorageMetadata)}
    reader.fill(plain)
    tensors = {key: partial(reader.read_tensor, *key.split(".", 1)) for key in stored.keys() - plain.keys()}
    return _as_file(folder, reader, plain | tensors)


def _as_file(folder: Path, reader: ShardedCheckpointReader, flat: dict[str, Any]) -> dict[str, Any]:
    checkpoint: dict[str, Any] = torch.load(folder / META, weights_only=True, map_location="cpu")
    metadata = reader.read_metadata()
    weights: dict[str, Any] = {}
    optimizers: dict[str, tuple[dict[str, Any], dict[int, Any]]] = {}
    for key, (part, *path) in metadata.planner_data.items():
        if part == "state_dict":
            weights[path[0]] = flat[key]
            continue
        state, groups = optimizers.setdefault(part, ({}, {}))
        kind, owner, name = path
        (state if kind == "state" else groups).setdefault(owner, {})[name] = flat[key]
    states = [by_number(*optimizers[f"optimizer_{i}"]) for i in range(len(optimizers))]
    return {**checkpoint, "state_dict": weights, "optimizer_states": states}


def by_number(state: dict[str, Any], groups: dict[int, Any]) -> dict[str, Any]:
    """An optimizer's state keyed by its parameters' names, keyed by their numbers as ``Optimizer.state_dict`` does."""
    numbers = {name: n for n, name in enumerate(name for i in sorted(groups) for name in groups[i]["params"])}
    return {
        "state": {numbers[name]: values for name, values in state.items()},
        "param_groups": [
            {**groups[i], "params": [numbers[name] for name in groups[i]["params"]]} for i in sorted(groups)
        ],
    }


def by_name(saved: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """An optimizer's state as ``Optimizer.state_dict`` makes it, keyed by its parameters' names.

    Args:
        saved: The state, keyed by the numbers of the parameters.
        names: The names of the parameters, in the order of the optimizer's groups.
    """
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    named = dict(zip(numbers, names, strict=True))
    return {
        "state": {named[number]: values for number, values in saved["state"].items()},
        "param_groups": [{**group, "params": [named[n] for n in group["params"]]} for group in saved["param_groups"]],
    }


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
