"""Small checkpoints for the tests: random weights, a tokenizer of a few words, folders to spoil."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from llada_lightning.checkpoints.convert import Target, convert
from llada_lightning.checkpoints.description import Description
from llada_lightning.checkpoints.run_folder import META
from llada_lightning.checkpoints.stored_model import StoredModel, fitted_tokenizer
from llada_lightning.checkpoints.stored_tensors import of_tensor
from llada_lightning.compute.shapes import Shape
from llada_lightning.data.tokenizers import TokenizerFiles

GOLDEN = Path(__file__).parents[1] / "model" / "golden_llada_mha"
GROUPED = Shape(n_layers=2, d_model=32, n_heads=4, n_kv_heads=2, d_ff=48)
SPECIAL = ("[EOS]", "[MASK]", "<bos>")
EOS, MASK, BOS = 256, 257, 258


def tokenizer_folder(folder: Path, bos: bool = False, special: tuple[str, ...] = SPECIAL) -> Path:
    """A byte-level tokenizer with the special tokens from id 256 on; its post-processor may put <bos> first."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def described(objective: str, shape: Shape = GROUPED, vocab_size: int = 272, **others: Any) -> Description:
    """A model as `llada fit` would describe it."""
    start = EOS if objective == "arm" else None
    values = {"start_token_id": start, "bos_token_id": start, "text_prefix_ids": (), "rope_theta": 5e5, **others}
    return Description(objective, shape, vocab_size, EOS, MASK, context_length=64, **values)


def in_memory(
    description: Description, tokenizer: Path | None = None, dtype: torch.dtype = torch.float32
) -> StoredModel:
    """A model with random weights, its norms' gains too, as if it had been opened."""
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: of_tensor(torch.randn(weight.shape, generator=generator) / weight.shape[-1] ** 0.5)
        for name, weight in description.transformer().state_dict().items()
    }
    files = None if tokenizer is None else fitted_tokenizer(TokenizerFiles.of_path(tokenizer), description, given=True)
    return StoredModel(Path("memory"), "llada", description, weights, files)


def written(folder: Path, to: Target, objective: str, tokenizer: Path | None = None, **others: Any) -> Path:
    """A small model's folder in a layout."""
    convert(in_memory(described(objective, **others), tokenizer), folder, to)
    return folder


def golden_copy(folder: Path, **changes: Any) -> Path:
    """The released layout's golden folder with changes to its config.json; a value of `...` removes the key."""
    folder.mkdir(parents=True)
    shutil.copyfile(GOLDEN / "model.safetensors", folder / "model.safetensors")
    shutil.copyfile(GOLDEN / "config.json", folder / "config.json")
    return changed_config(folder, **changes)


def changed_config(folder: Path, **changes: Any) -> Path:
    """A folder after changes to its config.json; a value of `...` removes the key."""
    path = folder / "config.json"
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))
    return folder


def training_content(description: Description, moments: bool = False, **arguments: Any) -> dict[str, Any]:
    """What `llada fit` saves, as far as a model is concerned, and the optimizer's moments."""
    values = {name: weight.read() for name, weight in in_memory(description).weights.items()}
    module = {"arm": "ArmModule", "llada": "LladaModule"}[description.objective]
    init_args = {
        "shape": asdict(description.shape),
        "vocab_size": description.vocab_size,
        "mask_token_id": description.mask_token_id,
        "eos_token_id": description.eos_token_id,
        "rope_theta": description.rope_theta,
        "compat": description.compat,
        **arguments,
    }
    identity = {
        "model": {"class_path": f"llada_lightning.training.{module}", "init_args": init_args},
        "data": {"sequence_length": description.context_length},
        "tokenizer": "0" * 64,
    }
    states = {name: {"exp_avg": w.clone(), "exp_avg_sq": w.clone()} for name, w in values.items()} if moments else {}
    return {
        "state_dict": {f"model.{name}": weight for name, weight in values.items()},
        "optimizer_states": [{"state": states, "param_groups": []}],
        "global_step": 7,
        "identity": identity,
    }


def write_shards(folder: Path, content: dict[str, Any]) -> None:
    """The same in the layout of a sharded run."""
    tensors = {"state_dict": content["state_dict"], "optimizer_0": {"state": content["optimizer_states"][0]["state"]}}
    dcp.save(tensors, checkpoint_id=folder, no_dist=True)
    others = {key: value for key, value in content.items() if key not in ("state_dict", "optimizer_states")}
    torch.save(others, folder / META)
