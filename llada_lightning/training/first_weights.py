"""Weights to start from: what follows from them, and how they get into a model."""

from __future__ import annotations

from dataclasses import asdict
from functools import lru_cache
from typing import Any

import torch
from jsonargparse import Namespace
from torch.distributed.tensor import DTensor

from llada_lightning.checkpoints.run_folder import checkpoint_hash
from llada_lightning.checkpoints.stored_model import StoredModel, open_checkpoint
from llada_lightning.errors import UserError
from llada_lightning.model import Transformer
from llada_lightning.model.shards import fill
from llada_lightning.scaling.flops import Objective
from llada_lightning.scaling.shapes import get_shape

DEFAULT_SHAPE = "443k"


@lru_cache(maxsize=1)
def _opened(path: str) -> StoredModel:
    return open_checkpoint(path)


@lru_cache(maxsize=1)
def weights_hash(path: str) -> str:
    """SHA-256 of the checkpoint that a path leads to."""
    return checkpoint_hash(_opened(path).path)


def take_over(config: Namespace, objective: Objective) -> None:
    """Fill in, in place, what a run takes from the checkpoint it starts from: the model, the context, the tokenizer.

    Args:
        objective: of the model that is configured.

    Raises:
        UserError: it is no checkpoint, is of the other objective, or a setting contradicts it.
    """
    arguments, data = config.model.init_args, config.data.init_args
    stored = _opened(arguments.weights)
    description = stored.description
    if description.objective != objective:
        raise UserError(
            f"model.weights: '{arguments.weights}' is of {description.objective}, not of {objective}; "
            "give --model of it"
        )
    given = arguments.shape.as_dict() if isinstance(arguments.shape, Namespace) else arguments.shape
    if given != DEFAULT_SHAPE and get_shape(given) != description.shape:
        raise UserError(f"model.shape: {given} is not that of model.weights; leave it out")
    arguments.shape = asdict(description.shape)
    taken: dict[str, Any] = {
        "vocab_size": description.vocab_size,
        "mask_token_id": description.mask_token_id,
        "eos_token_id": description.eos_token_id,
    }
    for key, value in taken.items():
        if arguments[key] not in (None, value):
            raise UserError(f"model.{key}: {arguments[key]} given, but model.weights has {value}; leave it out")
        arguments[key] = value
    arguments.rope_theta, arguments.compat = description.rope_theta, description.compat
    if "tokenizer" in data and data.tokenizer is None:
        if stored.tokenizer is None:
            raise UserError(f"data.tokenizer: '{arguments.weights}' has no tokenizer; give one")
        data.tokenizer = stored.tokenizer.name
    if data.get("context_length", 0) is None:
        data.context_length = description.context_length


def fill_weights(model: Transformer, path: str) -> None:
    """Write a checkpoint's weights into a model, whole or sharded, one tensor at a time."""
    weights = _opened(path).weights
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            value = weights[name].read().to(device=parameter.device, dtype=parameter.dtype)
            if isinstance(parameter, DTensor):
                fill(parameter, value)
            else:
                parameter.copy_(value)
