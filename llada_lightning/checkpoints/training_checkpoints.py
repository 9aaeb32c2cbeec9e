"""Checkpoints of `llada fit`, files and shards, as models: no optimizer is read, and nothing in them is ever run."""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import torch

from llada_lightning.checkpoints.description import Description
from llada_lightning.checkpoints.run_folder import CONFIG, require_whole, run_folder_of, whole_neighbour
from llada_lightning.checkpoints.sharded_checkpoints import META, ShardedCheckpointReader, is_sharded
from llada_lightning.checkpoints.stored_tensors import StoredTensor, of_tensor
from llada_lightning.data import TOKENIZER_NAME, tokenizer_fingerprint
from llada_lightning.data.manifest import read_tokenizer_text
from llada_lightning.data.tokenizers import TokenizerFiles
from llada_lightning.identity import identity_hash, with_stable_names
from llada_lightning.model.transformer import NORM_EPS
from llada_lightning.objectives import OBJECTIVES
from llada_lightning.support.errors import UserError
from llada_lightning.support.files import local_path
from llada_lightning.support.printing import warn
from llada_lightning.support.reading import read_yaml

_WEIGHTS = "state_dict"


def read_training(path: Path) -> tuple[Description, dict[str, StoredTensor], str]:
    """The parts of a checkpoint of `llada fit` that belong to its model.

    Args:
        path: The path of a file, or of the folder of a sharded checkpoint.

    Returns:
        The description, the weights by their names in the file, and the fingerprint of the run's tokenizer.

    Raises:
        UserError: it is damaged (all of its bytes are checked), of another program, has a wrong value, or holds
            objects that could run code.
    """
    try:
        content = torch.load(
            path / META if is_sharded(path) else path, mmap=True, weights_only=True, map_location="cpu"
        )
        weights = _shards(path) if is_sharded(path) else {k: of_tensor(v) for k, v in content[_WEIGHTS].items()}
        require_whole(path)
        return _description(content, path), weights, content["identity"]["tokenizer"]
    except pickle.UnpicklingError as error:
        raise UserError(
            f"'{path}' is refused: it holds other things than weights, which may run code when they are read; give a "
            "checkpoint of llada fit, or a folder with safetensors"
        ) from error
    except (OSError, RuntimeError, EOFError, LookupError, TypeError, AttributeError, ValueError, BadZipFile) as error:
        whole = whole_neighbour(path)
        usual = "give a run's folder, one of its checkpoints, or a folder with config.json and safetensors"
        fix = usual if whole is None else f"give '{whole}', which is whole"
        raise UserError(f"'{path}' is not a checkpoint of llada fit, or is damaged; {fix}") from error


def _shards(folder: Path) -> dict[str, StoredTensor]:
    reader = ShardedCheckpointReader(folder)
    return {
        name: StoredTensor(shape, dtype, partial(reader.read_tensor, _WEIGHTS, name))
        for name, (shape, dtype) in reader.tensor_shapes(_WEIGHTS).items()
    }


def _description(content: Mapping[str, Any], path: Path) -> Description:
    identity = with_stable_names(content["identity"])
    model, data = identity["model"], identity["data"]
    arguments = model["init_args"]
    objective = content.get("objective", model.get("objective"))
    if objective is None:
        raise UserError(f"'{path}' is of {model['class_path']}, whose objective it does not name; train it again")
    run = run_folder_of(path)
    inherited = content.get("inherited", {})  # from the weights that it started from
    prefix = arguments.get("text_prefix_ids")  # None: prepared data holds nothing but text and EOS
    known = OBJECTIVES.get(objective)  # the description refuses an unknown one
    starts_with_eos = known is not None and known.starts_with_eos and prefix is None
    start = arguments["eos_token_id"] if starts_with_eos else None
    return Description.of(
        path,
        arguments["shape"],
        objective=objective,
        vocab_size=arguments["vocab_size"],
        eos_token_id=arguments["eos_token_id"],
        mask_token_id=arguments["mask_token_id"],
        context_length=_longest(data.get("sequence_length") or data["context_length"], inherited),
        rope_theta=arguments["rope_theta"],
        norm_eps=arguments.get("norm_eps", NORM_EPS),
        end_token_ids=tuple(inherited.get("end_token_ids", ())),
        start_token_id=start,
        text_prefix_ids=tuple(prefix or ()),
        compat=arguments["compat"],
        bos_token_id=inherited.get("bos_token_id", start),
        pad_token_id=inherited.get("pad_token_id"),
        source={
            "run": None if run is None else run.name,
            "step": content["global_step"],
            "identity": identity_hash(identity),
        },
    )


def _longest(context_length: Any, inherited: Mapping[str, Any]) -> Any:
    """The largest number of tokens that a model was trained on, in the run or before it."""
    before = inherited.get("context_length")
    return (
        max(context_length, before) if isinstance(context_length, int) and isinstance(before, int) else context_length
    )


def run_tokenizer(checkpoint: Path, description: Description, fingerprint: str) -> TokenizerFiles | None:
    """The tokenizer that a run was trained with: that beside the checkpoint, in the run's folder, or of its data.

    Args:
        checkpoint: The checkpoint of the run.
        description: The description of its model.
        fingerprint: The fingerprint of its tokenizer.

    Returns:
        None where there is none, or only others; of the others, a line on stderr names the first.
    """
    run = run_folder_of(checkpoint)
    folders = [checkpoint.parent, *([] if run is None else [run, *_data_folders(run)])]
    others = []
    for folder in map(str, folders):
        name = f"{folder}/{TOKENIZER_NAME}"
        try:
            text = read_tokenizer_text(folder)
        except (UserError, ValueError):  # not there; token ids suffice
            continue
        with contextlib.suppress(UserError):  # a damaged file is no tokenizer
            files = TokenizerFiles.of_text(text, name)
            if _is_tokenizer(files, description, fingerprint):
                return files.with_template_of(folder)
        others.append(name)
    if others:
        warn(
            f"warning: '{others[0]}' is not the tokenizer that '{checkpoint}' was trained with, and is left out; give "
            "the run's own with --tokenizer"
        )
    return None


def _is_tokenizer(files: TokenizerFiles, description: Description, fingerprint: str) -> bool:
    """Whether a fingerprint is of this tokenizer with the model's special tokens.

    An `arm` without [MASK] may have been trained on data whose tokenizer has one.
    """
    eos, mask = description.eos_token_id, description.mask_token_id
    masks = [mask] if mask is not None else [None, files.named_ids.get("mask_token")]
    text = files.tokenizer.to_str()
    return fingerprint in {tokenizer_fingerprint(text, eos, each) for each in masks}


def _data_folders(run: Path) -> list[str]:
    """The data that a run's config.yaml names; as there, relative to where the run was started.

    Only data on this machine count: reading a stranger's run must not open connections to addresses that it names.
    """
    try:
        path = read_yaml(run / CONFIG)["data"]["init_args"]["path"]
    except (UserError, KeyError, TypeError):
        return []
    paths = path if isinstance(path, dict) else [path]
    return [folder for folder in paths if isinstance(folder, str) and local_path(folder) is not None]
