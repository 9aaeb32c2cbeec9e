"""Folders of safetensors: one file, or shards with an index, read tensor by tensor and written shard by shard."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from llada_lightning.checkpoints.description import ConfigFile
from llada_lightning.checkpoints.stored_tensors import StoredTensor
from llada_lightning.support.errors import LibraryPanicError, UserError, panics_as_exceptions

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
_USUAL = re.compile(r"(model(-\d+-of-\d+)?\.safetensors)|(pytorch_model(-\d+-of-\d+)?\.bin)")
_ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
_PICKLES = ("pytorch_model*.bin", "pytorch_model*.bin.index.json", "consolidated*.pth")
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def read_folder(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of a folder, by the names in its files; views of them, so nothing is in memory yet.

    Raises:
        UserError: there are no weights, only pickled ones, or a file is missing or damaged.
    """
    if (folder / WEIGHTS_NAME).is_file():
        return _read_file(folder / WEIGHTS_NAME)
    if (folder / INDEX_NAME).is_file():
        return _read_shards(folder)
    raise UserError(f"'{folder}' {_instead_of_weights(folder)}")


def refuse_adapter(folder: Path) -> None:
    """Refuses a folder with an adapter, such as LoRA's: it is no model, and a model beside it is another one with it.

    Raises:
        UserError: names the adapter's files and how to get a model.
    """
    names = [name for name in _ADAPTER if (folder / name).is_file()]
    if names:
        raise UserError(
            f"'{folder}' holds an adapter ({', '.join(names)}), which changes a model and is none by itself; merge it "
            "into its base model first (peft: merge_and_unload, then save_pretrained), or remove its files"
        )


def weights_in(folder: Path) -> list[str]:
    """The names of the files in a folder that hold weights by their names, of whatever layout."""
    return sorted({path.name for pattern in ("*.safetensors", *_PICKLES) for path in folder.glob(pattern)})


def is_usual(name: str) -> bool:
    """Whether a file of weights is named as transformers names a whole model's, in one file or in shards."""
    return _USUAL.fullmatch(name) is not None


def _instead_of_weights(folder: Path) -> str:
    """What a folder without weights that can be read holds, and what to do about it."""
    names = weights_in(folder)
    shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    others = [name for name in names if name.endswith(".safetensors")]
    if any(is_usual(name) for name in others):
        return f"holds {shown} and no {INDEX_NAME}: it is half-written; copy it again"
    if others and all(name.startswith("consolidated") for name in others):
        return f"holds no {WEIGHTS_NAME}, but {shown}, which is its authors' layout; take the model in transformers'"
    if others:
        return (
            f"holds no {WEIGHTS_NAME}, but {shown}; if that is the whole model, such as in another precision, rename "
            f"it to {WEIGHTS_NAME}, or save it again without a variant"
        )
    if names:
        return (
            "holds its weights as pickles only, and to read one may run its code; save it as safetensors: "
            "save_pretrained(..., safe_serialization=True) where it comes from"
        )
    return f"holds no {WEIGHTS_NAME}: it is half-written; copy it again"


def _read_shards(folder: Path) -> dict[str, StoredTensor]:
    places = ConfigFile.read(folder / INDEX_NAME).get("weight_map", {})
    if not places or not isinstance(places, dict) or any(Path(str(file)).name != file for file in places.values()):
        raise UserError(f"'{folder / INDEX_NAME}' names no files of its folder; copy the folder again")
    files = sorted(set(places.values()))
    absent = [file for file in files if not (folder / file).is_file()]
    if absent:
        raise UserError(
            f"'{folder}' lacks {absent[0]}, one of {len(absent)} missing of the {len(files)} files that its index "
            "names: it is half-written; copy it again"
        )
    return {name: tensor for file in files for name, tensor in _read_file(folder / file).items()}


def _read_file(path: Path) -> dict[str, StoredTensor]:
    try:
        with panics_as_exceptions():
            file = safe_open(str(path), framework="pt")
            return {name: _stored(file, name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, LibraryPanicError, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"'{path}' is damaged or half-written ({reason}); copy it again") from error


def _stored(file: safe_open, name: str) -> StoredTensor:
    view = file.get_slice(name)
    dtype = _DTYPES.get(view.get_dtype())
    if dtype is None:  # refused by name when the weights are found to be such
        dtype = file.get_tensor(name).dtype
    return StoredTensor(tuple(view.get_shape()), dtype, partial(file.get_tensor, name))


def write_folder(
    folder: Path,
    weights: Mapping[str, StoredTensor],
    dtype: torch.dtype | None,
    max_shard_bytes: int,
    progress: Callable[[int], None],
) -> list[str]:
    """Writes tensors to one file, or to as many as are needed for none to be larger than asked.

    No more than one file's tensors are held in memory, and only where their type changes or their source is not a file
    that can be viewed.

    Args:
        folder: The folder to write into.
        weights: The weights by the names under which they are written.
        dtype: The type to store them in; None: the type that each has.
        max_shard_bytes: The largest size of a file's tensors, in bytes; a larger tensor gets a file of its own.
        progress: The function that is called with the number of bytes of each file that has been written.

    Returns:
        The files' names.

    Raises:
        UserError: a value is too large for the type.
        OSError, SafetensorError: the folder cannot be written.
    """
    shards = _shards(weights, dtype, max_shard_bytes)
    count = len(shards)
    names = [f"model-{n:05d}-of-{count:05d}.safetensors" if count > 1 else WEIGHTS_NAME for n in range(1, count + 1)]
    for file, shard in zip(names, shards, strict=True):
        tensors = {name: _converted(name, weights[name], dtype) for name in shard}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(folder.stat().st_mode & 0o666)  # the library closes its files to others
        progress(sum(tensor.nbytes for tensor in tensors.values()))
    if count > 1:
        total = sum(_bytes(weight, dtype) for weight in weights.values())
        places = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return names


def _shards(weights: Mapping[str, StoredTensor], dtype: torch.dtype | None, most: int) -> list[list[str]]:
    """The names of each file, in order."""
    shards: list[list[str]] = [[]]
    room = most
    for name, weight in weights.items():
        size = _bytes(weight, dtype)
        if size > room and shards[-1]:
            shards.append([])
            room = most
        shards[-1].append(name)
        room -= size
    return shards


def _bytes(weight: StoredTensor, dtype: torch.dtype | None) -> int:
    return weight.elements * (dtype or weight.dtype).itemsize


def _converted(name: str, weight: StoredTensor, dtype: torch.dtype | None) -> torch.Tensor:
    tensor = weight.read()
    converted = tensor.to(dtype or tensor.dtype).contiguous()
    if converted.dtype == torch.float16 != tensor.dtype and not converted.isfinite().all():
        raise UserError(f"{name} holds values beyond float16's 65504; choose --dtype bfloat16")
    return converted
