"""A checkpoint of any kind, written as another: ours, Hugging Face LLaDA or Hugging Face Llama."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from llada_lightning.checkpoints import hugging_face
from llada_lightning.checkpoints.card import CARD_NAME, TRAINING_NAME, model_card, training_facts, training_file
from llada_lightning.checkpoints.description import CONFIG_NAME, Description, write_config
from llada_lightning.checkpoints.stored_model import StoredModel
from llada_lightning.checkpoints.stored_tensors import (
    HF_LLADA,
    HF_LLAMA,
    INDEX_NAME,
    OURS,
    WEIGHTS_NAME,
    Layout,
    StoredTensor,
    common_dtype,
    name_of,
)
from llada_lightning.data import TOKENIZER_CONFIG_NAME
from llada_lightning.data.chat import ChatTemplate
from llada_lightning.data.start_token import with_start_token
from llada_lightning.data.tokenizers import GENERATION_CONFIG_NAME, TokenizerFiles
from llada_lightning.objectives import get_objective
from llada_lightning.support.errors import UserError
from llada_lightning.support.files import building, json_bytes, write_json

Target = Literal["llada", "hf-llada", "hf-llama"]
TARGETS: dict[Target, Layout] = {"llada": OURS, "hf-llada": HF_LLADA, "hf-llama": HF_LLAMA}


@dataclass(frozen=True)
class Written:
    """The contents of a written folder: of its weights, whose type is the widest of mixed ones, and all its files."""

    tensors: int
    parameters: int
    bytes: int
    dtype: str
    files: list[str]


def convert(
    model: StoredModel,
    out: Path,
    to: Target,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5 * 10**9,
    progress: Callable[[int], None] = lambda _: None,
) -> Written:
    """Writes a folder, which appears when it is complete.

    Args:
        model: The opened model. Its weights are not read yet: they go through memory one file at a time.
        out: The folder to write, which does not exist or is empty.
        to: The layout.
        dtype: The type of the weights; None: as stored.
        max_shard_bytes: The largest size of one file, in bytes; a larger tensor gets a file of its own.
        progress: The function that is called with the number of bytes of each file that has been written.

    Raises:
        UserError: The layout is of another objective, a value is too large for the type, or ``out`` is taken or cannot
            be written.
    """
    description, layout = model.description, TARGETS[to]
    fitting = (*get_objective(description.objective).layouts, "llada")
    if to not in fitting:
        choice = " or ".join(f"--to {target}" for target in fitting)
        raise UserError(f"--to {to}: '{model.path}' is of {description.objective}; choose {choice}")
    if description.qk_norm and layout.qk_norm is None:
        raise UserError(
            f"--to {to}: '{model.path}' normalises queries and keys (qk_norm), and a {layout.title} has no such norm; "
            "choose --to llada"
        )
    if description.shift_targets and to != "llada":
        raise UserError(
            f"--to {to}: '{model.path}' predicts a token from the position before it (shift_targets), which a "
            f"{layout.title} cannot say; choose --to llada"
        )
    if out.exists() and not out.is_dir():
        raise UserError(f"'{out}' is a file; give the name of a folder that is not there yet")
    if out.exists() and any(out.iterdir()):
        raise UserError(f"'{out}' is there already and is not empty; choose another name")
    if out.is_symlink() or (out.exists() and out.samefile(Path.cwd())):
        raise UserError(f"'{out}' is the folder you are in, or a link, and cannot be replaced; choose a new name")
    names = layout.names(description.shape.n_layers, description.qk_norm)
    weights = {names[name]: weight for name, weight in model.weights.items()}
    stored_as = name_of(dtype or common_dtype(weights.values()))
    try:
        with building(out) as partial:
            files = _write_weights(partial, weights, dtype, max_shard_bytes, progress)
            write_json(partial / CONFIG_NAME, _config(model, to, stored_as))
            for name, content in _companions(model, to, stored_as).items():
                (partial / name).write_bytes(content)
            written = sorted(path.name for path in partial.iterdir())
            size = sum((partial / file).stat().st_size for file in files)
    except (OSError, SafetensorError) as error:
        raise UserError(f"'{out}' cannot be written ({error}); free space, or choose another folder") from error
    parameters = sum(weight.elements for weight in weights.values())
    return Written(len(weights), parameters, size, stored_as, written)


def _write_weights(
    folder: Path,
    weights: Mapping[str, StoredTensor],
    dtype: torch.dtype | None,
    max_shard_bytes: int,
    progress: Callable[[int], None],
) -> list[str]:
    """Writes as many files as are needed for none to be larger than asked, and returns their names.

    At most one file's tensors are in memory, and only where their type changes or their source cannot be viewed.
    """
    sizes = {name: weight.elements * (dtype or weight.dtype).itemsize for name, weight in weights.items()}
    shards: list[list[str]] = [[]]
    room = max_shard_bytes
    for name, size in sizes.items():
        if size > room and shards[-1]:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(name)
        room -= size
    count = len(shards)
    files = [f"model-{n:05d}-of-{count:05d}.safetensors" if count > 1 else WEIGHTS_NAME for n in range(1, count + 1)]
    for file, shard in zip(files, shards, strict=True):
        tensors = {name: _converted(name, weights[name], dtype) for name in shard}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(folder.stat().st_mode & 0o666)  # the library closes its files to others
        progress(sum(tensor.nbytes for tensor in tensors.values()))
    if count > 1:
        places = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": places}
        (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return files


def _converted(name: str, weight: StoredTensor, dtype: torch.dtype | None) -> torch.Tensor:
    tensor = weight.read()
    converted = tensor.to(dtype or tensor.dtype).contiguous()
    if converted.dtype == torch.float16 != tensor.dtype and not converted.isfinite().all():
        raise UserError(f"{name} holds values beyond float16's 65504; choose --dtype bfloat16")
    return converted


def _config(model: StoredModel, to: Target, dtype: str) -> dict[str, Any]:
    if to == "llada":
        return write_config(model.description, dtype)
    write = hugging_face.write_llada if to == "hf-llada" else hugging_face.write_llama
    auto_map = {"auto_map": model.auto_map} if model.auto_map and model.kind == to else {}
    return {**write(model.description, dtype), **auto_map}


def _companions(model: StoredModel, to: Target, dtype: str) -> dict[str, bytes]:
    """Tokenizer, card, what is known of the training, and the modelling code of a folder that names some."""
    facts = training_facts(model)
    files = {CARD_NAME: model_card(model, to, dtype, facts).encode()}
    if facts:
        files[TRAINING_NAME] = training_file(facts)
    if model.tokenizer is not None:
        files |= tokenizer_files(model.tokenizer, model.description, to)
    files = _with_generation(files, model.description, to)
    places = [place for place in model.auto_map.values() if isinstance(place, str)] if model.kind == to else []
    code = {f"{place.split('.')[0]}.py" for place in places}
    beside = {path.name: path for path in model.path.glob("*.py")} if code else {}
    return {**files, **{name: path.read_bytes() for name, path in beside.items() if name in code}}


def _with_generation(files: dict[str, bytes], description: Description, to: Target) -> dict[str, bytes]:
    """The files with ``generation_config.json`` of a Llama that has none, and without the one that comes from here."""
    values = hugging_face.llama_generation(description)
    if values is None:
        return files
    ours = json_bytes(values)
    if to == "hf-llama":
        return {GENERATION_CONFIG_NAME: ours, **files}
    return {name: content for name, content in files.items() if (name, content) != (GENERATION_CONFIG_NAME, ours)}


def tokenizer_files(files: TokenizerFiles, description: Description, to: Target) -> dict[str, bytes]:
    """Returns the tokenizer's files to write beside a model, with a configuration for transformers if it lacks one.

    In transformers' layout they put the token before every sequence that the model was trained with.
    """
    with_config = _with_tokenizer_config(files, description)
    start = description.start_token_id
    token = None if start is None else files.tokenizer.id_to_token(start)
    if to != "hf-llama" or start is None or token is None:
        return with_config
    assert files.config is not None  # a damaged one is refused here
    template = files.chat_template or ""
    chat = ChatTemplate.of(template, files.tokenizer, description.eos_token_id, (), files.name, files.special_tokens)
    return with_start_token(with_config, token, start, chat.roles["bos_token"])


def _with_tokenizer_config(files: TokenizerFiles, description: Description) -> dict[str, bytes]:
    if TOKENIZER_CONFIG_NAME in files.files:
        return files.files
    ids = {
        "bos_token": description.bos_token_id,
        "eos_token": description.eos_token_id,
        "pad_token": description.eos_token_id if description.pad_token_id is None else description.pad_token_id,
        "mask_token": description.mask_token_id,
    }
    if files.special_tokens.get("bos_token") == "":  # a file says that there is none
        ids["bos_token"] = None
    tokens = {key: files.tokenizer.id_to_token(i) for key, i in ids.items() if i is not None}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": description.context_length,
        "clean_up_tokenization_spaces": False,
        **{key: token for key, token in tokens.items() if token is not None},
    }
    return {**files.files, TOKENIZER_CONFIG_NAME: json_bytes(config)}


def bytes_of(text: str) -> int:
    """A size such as `5GB`, `200MB` or `1000` in bytes."""
    units = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(|KB|MB|GB)", text.strip().upper())
    size = float(match[1]) * units[match[2]] if match else 0.0
    if not 1 <= size < 2**63:
        raise UserError(f"--max-shard-size: '{text:.40}' is no size of a file; give one such as 5GB or 200MB")
    return int(size)
