"""Weights to start from: what follows from them, and how they get into a model."""

from __future__ import annotations

import math
from dataclasses import asdict
from functools import lru_cache
from typing import Any

import torch
from jsonargparse import Namespace
from torch import Tensor
from torch.distributed.tensor import DTensor

from llada_lightning.checkpoints.description import Description
from llada_lightning.checkpoints.run_folder import checkpoint_hash
from llada_lightning.checkpoints.stored_model import StoredModel, open_checkpoint
from llada_lightning.compute.shapes import get_shape
from llada_lightning.data import TokenizerInfo
from llada_lightning.data.tokenizers import tokenizer_from_text
from llada_lightning.model import Transformer
from llada_lightning.model.sharding import fill
from llada_lightning.model.transformer import NORM_EPS, ROPE_THETA
from llada_lightning.objectives import Objective, get_objective
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

    Every field of ``Description`` that inference reads is taken here, or by :func:`inherited`, or refused. Any weights
    can begin a run of an objective with full attention, those of an `arm` among them; a causal one takes its own only.
    """
    arguments, data = config.model.init_args, config.data.init_args
    stored, facts = _opened(arguments.weights), get_objective(objective)
    description = stored.description
    if description.objective != objective and facts.causal:
        raise UserError(
            f"model.weights: '{arguments.weights}' is of {description.objective}, not of {objective}; give the "
            f"--model of {description.objective}"
        )
    given = arguments.shape.as_dict() if isinstance(arguments.shape, Namespace) else arguments.shape
    if given != DEFAULT_SHAPE and get_shape(given) != description.shape:
        raise UserError(f"model.shape: {given} is not that of model.weights; leave it out")
    arguments.shape = asdict(description.shape)
    same = ("vocab_size", "mask_token_id", "eos_token_id", "compat", "rope_theta", "norm_eps", "qk_norm")
    taken = {key: getattr(description, key) for key in same} | {"text_prefix_ids": _text_prefix(stored, facts)}
    not_given = {"rope_theta": ROPE_THETA, "norm_eps": NORM_EPS, "qk_norm": False}
    for key, value in taken.items():
        given = arguments[key]
        if key == "mask_token_id" and value is None and given is not None:
            continue  # an `arm` without [MASK] may be told which token it is
        if key == "vocab_size" and given == value + 1 and lacks_mask_row(description, arguments.mask_token_id):
            continue  # as the configuration of a run with a row for [MASK] has it
        if given not in (not_given.get(key), value):
            raise UserError(f"model.{key}: {given} given, but model.weights has {value}; leave it out")
        arguments[key] = value
    _take_over_shift(arguments, description, facts)
    if "tokenizer" in data:
        _take_over_tokenizer(config, stored, facts.masks)
    if data.get("context_length", 0) is None:
        data.context_length = description.context_length


def _take_over_shift(arguments: Namespace, description: Description, facts: Objective) -> None:
    """Fill in, in place, whether targets are shifted; refuse what the weights have not learned.

    A module of one's own may lack the settings.
    """
    source, shift, steps = get_objective(description.objective), "shift_targets", arguments.get("open_attention_steps")
    if description.shift_targets:
        if shift not in arguments or not _may_shift(facts):
            raise UserError(
                f"model.weights: '{arguments.weights}' predicts a token from the position before it ({shift}), which "
                f"{facts.name} does not; give other weights"
            )
        arguments[shift] = True
    elif arguments.get(shift) and not source.causal:
        raise UserError(
            f"model.{shift}: true given, but model.weights is of {source.name}, which predicts a token at its own "
            "position; leave it out"
        )
    if steps and not source.causal:
        raise UserError(
            f"model.open_attention_steps: {steps} given, but model.weights is of {source.name}, whose attention is "
            "open already; leave it out"
        )


def _may_shift(facts: Objective) -> bool:
    return facts.masks and not facts.in_blocks


def check_shift(facts: Objective) -> None:
    """Refuse shifted targets of an objective that cannot have them.

    Raises:
        UserError: It predicts the next token anyway, predicts in blocks, or has no [MASK].
    """
    if _may_shift(facts):
        return
    why = "does not predict what a [MASK] hides"
    if facts.causal:
        why = "predicts the next token already"
    elif facts.in_blocks:
        why = "would predict the first token of a block from the clean token before it, which does not see the block"
    raise UserError(f"model.shift_targets: true given, but {facts.name} {why}; leave it out")


def check_opening(steps: int, facts: Objective) -> None:
    """Refuse a number of steps over which attention is opened.

    Raises:
        UserError: It is negative, or the objective's attention stays causal.
    """
    if steps < 0:
        raise UserError(f"model.open_attention_steps: {steps} given; it must be at least 0, and 0 is full attention")
    if steps and facts.causal:
        raise UserError(
            f"model.open_attention_steps: {steps} given, but the attention of {facts.name} stays causal; leave it out"
        )


def lacks_mask_row(description: Description, mask_token_id: int | None) -> bool:
    """Whether weights without [MASK] get one more row of embedding and head for it: its id is the first behind theirs.

    Weights whose vocabulary holds the id already, as one of its tokens or as padding, keep their size.
    """
    learned = get_objective(description.objective).masks
    return not learned and mask_token_id is not None and mask_token_id == description.vocab_size


def fit_vocabulary(arguments: Namespace, tokenizer: TokenizerInfo, text: str) -> None:
    """Add, in place, a row for [MASK] where the weights of another objective have none; refuse another tokenizer.

    Args:
        arguments: The arguments of the module, with what :func:`take_over` filled in.
        tokenizer: The tokenizer of the data.
        text: Its `tokenizer.json`.

    Raises:
        UserError: The vocabulary, a special token or another token of the data's tokenizer is not that of the weights.
    """
    stored = _opened(arguments.weights)
    description, where = stored.description, f"model.weights: '{arguments.weights}'"
    fix = "prepare the data with the tokenizer of the weights"
    if lacks_mask_row(description, tokenizer.mask_id):
        arguments.vocab_size = description.vocab_size + 1
    if tokenizer.vocab_size > arguments.vocab_size:
        sizes = f"{description.vocab_size} tokens, and the data's tokenizer has {tokenizer.vocab_size}"
        raise UserError(f"{where} has {sizes}; {fix}, with --add-mask-token where it has no [MASK]")
    ids = {
        "EOS": (description.eos_token_id, tokenizer.eos_id),
        "[MASK]": (description.mask_token_id, tokenizer.mask_id),
    }
    for name, (theirs, ours) in ids.items():
        if theirs is not None and theirs != ours:
            raise UserError(f"{where} has {name} as token {theirs}, and the data's tokenizer as {ours}; {fix}")
    if stored.tokenizer is None:
        return
    known, own = stored.tokenizer.tokenizer, tokenizer_from_text(text, "the tokenizer of the data")
    for token_id in range(description.vocab_size):
        pair = known.id_to_token(token_id), own.id_to_token(token_id)
        if None not in pair and pair[0] != pair[1] and token_id != tokenizer.mask_id:
            raise UserError(f"{where} has token {token_id} as {pair[0]!r}, and the data as {pair[1]!r}; {fix}")


def _take_over_tokenizer(config: Namespace, stored: StoredModel, masks: bool) -> None:
    """Fill in what a data module that reads text takes from the weights, where the user does not say it."""
    arguments, data = config.model.init_args, config.data.init_args
    if data.tokenizer is None:
        if stored.tokenizer is None:
            raise UserError(f"data.tokenizer: '{arguments.weights}' has no tokenizer; give one")
        data.tokenizer = stored.tokenizer.name
        ids = {"eos_token": arguments.eos_token_id, "mask_token": arguments.mask_token_id}
        if masks and arguments.mask_token_id is None:
            del ids["mask_token"]  # that which the tokenizer's files name
        for key, token_id in ids.items():
            if data[key] is None:  # '': there is none
                data[key] = "" if token_id is None else stored.tokenizer.tokenizer.id_to_token(token_id)
    for key in ("vocab_size", "text_prefix_ids"):
        if data[key] is None:
            data[key] = arguments[key]


def _text_prefix(stored: StoredModel, facts: Objective) -> list[int] | None:
    """The token ids before a text in a run from these weights; None: as our own runs have it (EOS for an `arm`, or
    where targets are shifted, else nothing)."""
    description, prefix = stored.description, stored.text_prefix_ids
    start = description.start_token_id
    with_start = get_objective(description.objective).starts_with_eos or description.shift_targets
    ours = description.eos_token_id if with_start else None
    if (start, prefix) == (ours, ()) or (facts.in_blocks and facts.name != description.objective):
        return None  # the first block begins with the text
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


def source_flops(path: str) -> float | None:
    """The training FLOPs, by 6ND, that were spent on weights, and on the weights that their run started from.

    None where they are not known, as of a model of others.
    """
    flops = _opened(path).description.source.get("flops_6nd")
    if not isinstance(flops, (int, float)) or isinstance(flops, bool) or not 0 <= flops < math.inf:
        return None
    return float(flops)


def source_objective(path: str) -> str:
    """The objective of the weights that a path leads to."""
    return _opened(path).description.objective


def fill_weights(model: Transformer, path: str, mask_token_id: int | None = None) -> None:
    """Write a checkpoint's weights into a model, whole or sharded, one tensor at a time.

    No objective without masks learns anything of [MASK]. So for a model that is to learn it, its row of the embedding
    and of the output head becomes the mean of all other rows, added behind them where there is none.

    Args:
        model: The model.
        path: The path of the checkpoint.
        mask_token_id: The id of [MASK] of an objective that has masks; None of others.
    """
    stored = _opened(path)
    learned = get_objective(stored.description.objective).masks
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            value = stored.weights[name].read().to(device=parameter.device, dtype=parameter.dtype)
            if name in ("embedding.weight", "head.weight") and mask_token_id is not None and not learned:
                value = _with_mean_row(value, mask_token_id)
            if isinstance(parameter, DTensor):
                fill(parameter, value)
            else:
                parameter.copy_(value)


def _with_mean_row(rows_VD: Tensor, index: int) -> Tensor:
    """Rows of which one, in its place or behind the others, is the mean of the others."""
    others_VD = torch.cat([rows_VD[:index], rows_VD[index + 1 :]])
    return torch.cat([rows_VD[:index], others_VD.mean(dim=0, keepdim=True), rows_VD[index + 1 :]])
