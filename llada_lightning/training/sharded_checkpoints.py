"""Sharded checkpoints: folders that every process of a run wrote a part of, read as ordinary ones by a single process.

The layout is Lightning's: tensors and optimizer settings in the format of ``torch.distributed.checkpoint``, and
everything else in ``meta.pt``.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

META = "meta.pt"
"""What is no tensor: step, loops, callbacks, identity."""
PARTIAL = ".partial"
"""Ends the name of what is being written or removed."""


def is_sharded(path: Path) -> bool:
    """Whether ``path`` is a checkpoint in shards."""
    return (path / META).is_file()


def read_sharded(folder: Path) -> dict[str, Any]:
    """A sharded checkpoint as the file that one process would have written: whole tensors, moments by number.

    Args:
        folder: that any number of processes wrote.

    Returns:
        What Lightning's checkpoint files hold, on the CPU. Nothing is exchanged with other processes.
    """
    checkpoint: dict[str, Any] = torch.load(folder / META, weights_only=True, map_location="cpu")
    reader = dcp.FileSystemReader(folder)
    metadata = reader.read_metadata()
    flat: dict[str, Any] = {
        key: torch.empty(stored.size, dtype=stored.properties.dtype)
        if isinstance(stored, TensorStorageMetadata)
        else None
        for key, stored in metadata.state_dict_metadata.items()
    }
    dcp.load(flat, storage_reader=reader, no_dist=True)
    weights: dict[str, torch.Tensor] = {}
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
        saved: keyed by numbers.
        names: of the parameters, in the order of the optimizer's groups.
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
