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
from llada_lightning.compute.shapes import get_shape
from llada_lightning.model import Transformer
from llada_lightning.model.sharding import fill
from llada_lightning.model.transformer import NORM_EPS, ROPE_THETA
from llada_lightning.objectives import get_objective
from llada_lightning.support.errors import UserError

DEFAULT_SHAPE = "443k"


@lru_cache(maxsize=1)
def _opened(path: str) -> StoredModel:
    return open_checkpoint(path)


@lru_cache(maxsize=1)
def weights_hash(path: str) -> str:
    """SHA-256 of the checkpoint that a path leads to."""
    return checkpoint_hash(_opened(path).path)


def take_over(config: Namespace, objective: str) -> None:
    """Fill in, in place, what a run takes from the checkpoint it starts from: the model, the context, the tokenizer.

    Every field of ``Description`` that inference reads is taken here, or by :func:`inherited`, or refused.
    """
    arguments, data = config.model.init_args, config.data.init_args
    stored = _opened(arguments.weights)
    description = stored.description
    if description.objective != objective:
        raise UserError(
            f"model.weights: '{arguments.weights}' is of {description.objective}, not of {objective}; give the "
            f"--model of {description.objective}"
        )
    given = arguments.shape.as_dict() if isinstance(arguments.shape, Namespace) else arguments.shape
    if given != DEFAULT_SHAPE and get_shape(given) != description.shape:
        raise UserError(f"model.shape: {given} is not that of model.weights; leave it out")
    arguments.shape = asdict(description.shape)
    same = ("vocab_size", "mask_token_id", "eos_token_id", "compat", "rope_theta", "norm_eps", "qk_norm")
    taken = {key: getattr(description, key) for key in same} | {"text_prefix_ids": _text_prefix(stored)}
    not_given = {"rope_theta": ROPE_THETA, "norm_eps": NORM_EPS, "qk_norm": False}
    for key, value in taken.items():
        given = arguments[key]
        if key == "mask_token_id" and value is None and given is not None:
            continue  # an `arm` without [MASK] may be told to give a token no probability
        if given not in (not_given.get(key), value):
            raise UserError(f"model.{key}: {given} given, but model.weights has {value}; leave it out")
        arguments[key] = value
    if "tokenizer" in data:
        _take_over_tokenizer(config, stored)
    if data.get("context_length", 0) is None:
        data.context_length = description.context_length


def _take_over_tokenizer(config: Namespace, stored: StoredModel) -> None:
    """Fill in what a data module that reads text takes from the weights, where the user does not say it."""
    arguments, data = config.model.init_args, config.data.init_args
    if data.tokenizer is None:
        if stored.tokenizer is None:
            raise UserError(f"data.tokenizer: '{arguments.weights}' has no tokenizer; give one")
        data.tokenizer = stored.tokenizer.name
        ids = {"eos_token": arguments.eos_token_id, "mask_token": arguments.mask_token_id}
        for key, token_id in ids.items():
            if data[key] is None:  # '': there is none
                data[key] = "" if token_id is None else stored.tokenizer.tokenizer.id_to_token(token_id)
    for key in ("vocab_size", "text_prefix_ids"):
        if data[key] is None:
            data[key] = arguments[key]


def _text_prefix(stored: StoredModel) -> list[int] | None:
    """The token ids before a text of these weights; None: as our own runs have it (EOS for an `arm`, else nothing)."""
    start, prefix, eos = stored.description.start_token_id, stored.text_prefix_ids, stored.description.eos_token_id
    ours = eos if get_objective(stored.description.objective).starts_with_eos else None
    if (start, prefix) == (ours, ()):
        return None
    if start is not None:
        raise UserError(
            f"model.weights: '{stored.path}' has start_token_id {start} and text_prefix_ids {list(prefix)}, and a run "
            f"puts either {ours} or the prefix before a text; correct them in its config.json"
        )
    return list(prefix)


def inherited(path: str) -> dict[str, Any]:
    """What inference reads, or other programs are told, of the weights that a run started from, whatever it trains on.

    A run's checkpoints hold it. It makes no other run: nothing of it is in an identity.
    """
    stored = _opened(path)
    told = {name: getattr(stored.description, name) for name in ("context_length", "bos_token_id", "pad_token_id")}
    return {"end_token_ids": list(stored.end_token_ids), **told}


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
