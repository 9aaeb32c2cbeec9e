"""How the same numbers are computed faster: compilation, the loss, recomputation, attention, 8-bit products."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from lightning import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn

from llada_lightning.compute.shapes import Shape
from llada_lightning.model import Transformer
from llada_lightning.model.attention import Backend, check_backend
from llada_lightning.model.transformer import Block, Recompute
from llada_lightning.support.errors import UserError
from llada_lightning.support.torch_internals import has_cpp_compiler, has_triton

_FP8_CAPABILITY = (8, 9)
"""The first GPUs that multiply 8-bit floats: Ada and Hopper."""


@dataclass
class Speed:
    """How the same numbers are computed faster. But for fp8 nothing here makes another run.

    Args:
        attention: The back end of attention: sdpa, flash or flex (see ``model.attention``).
        compile: Whether torch.compile compiles each block; null: where a GPU trains. Later runs use what it compiled.
        loss: `chunked` takes the cross-entropy with the output head, so that the logits of all positions are never in
            memory; `plain` makes all logits first.
        recompute: What the backward pass computes again instead of keeping it: none, selective (all but products and
            attention), or full (whole blocks).
        fp8: Whether the blocks multiply in 8-bit floats (torchao; Hopper, Ada and later). It makes another run.
    """

    attention: Backend = "sdpa"
    compile: bool | None = None
    loss: Literal["chunked", "plain"] = "chunked"
    recompute: Recompute = "none"
    fp8: bool = False


def resolve_speed(speed: Speed, shape: Shape, trainer: Trainer, training: bool) -> tuple[Speed, list[str]]:
    """What of the settings this machine can do.

    Args:
        speed: The settings as they are given.
        shape: The dimensions of the model.
        trainer: The trainer, which knows device, precision and strategy.
        training: Whether the model is trained. Else nothing is compiled, unless it is asked for.

    Returns:
        The settings to apply, and lines for the start of a run: what was given up, and what is live.

    Raises:
        UserError: an attention back end, or fp8, that is not installed or does not fit: they were asked for by name.
    """
    device = trainer.strategy.root_device
    dtype = torch.bfloat16 if str(trainer.precision).startswith("bf16") else torch.float32
    grouped = shape.n_kv_heads != shape.n_heads
    attention = check_backend(speed.attention, device, training, shape.head_dim, dtype, grouped)
    if speed.fp8:
        _check_fp8(device, isinstance(trainer.strategy, ModelParallelStrategy))
    compiled = speed.compile
    if compiled is None:
        compiled = training and device.type == "cuda"
    trouble = compiler_trouble(device) if compiled else None
    resolved = replace(speed, compile=compiled and trouble is None)
    lines = [] if trouble is None else [f"note: speed.compile: {trouble}; running without it, which changes no figure"]
    return resolved, [*lines, f"speed: attention {attention}, {_describe(resolved)}"]


def _describe(speed: Speed) -> str:
    parts = ["blocks compiled" if speed.compile else "blocks not compiled", f"{speed.loss} loss"]
    if speed.recompute != "none":
        parts.append(f"{speed.recompute} recomputation")
    if speed.fp8:
        parts.append("fp8 products")
    return ", ".join(parts)


def apply_speed(model: Transformer, speed: Speed, whole_blocks: bool = True) -> None:
    """Set a model, in place, to compute as resolved settings say; before it is sharded.

    Args:
        whole_blocks: Whether whole blocks are compiled; False: tensor parallelism compiles their parts later.
    """
    model.attend_with(speed.attention)
    if speed.fp8:
        _convert_to_fp8(model)
    for block in model.blocks:
        assert isinstance(block, Block)
        block.recompute = speed.recompute
        if speed.compile and whole_blocks:
            # One graph for each kind of micro-batch (padded or not, training or validation), shared by all blocks.
            block.compile(dynamic=False)
    if speed.compile:
        model.head.compiled = True


def compiler_trouble(device: torch.device) -> str | None:
    """Why torch.compile cannot work here, or None."""
    if device.type == "cuda":
        return None if has_triton() else "Triton is missing, or does not know this GPU"
    return None if has_cpp_compiler() else "there is no C++ compiler here (install g++, or name one in CXX)"


def _check_fp8(device: torch.device, sharded: bool) -> None:
    if sharded:
        raise UserError("speed.fp8: true given, but the strategy shards the weights; use --trainer.strategy=ddp")
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < _FP8_CAPABILITY:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"the {device.type.upper()}"
        raise UserError(
            f"speed.fp8: true given, but {name} has no 8-bit products (Hopper, Ada and later have); leave it out"
        )
    if importlib.util.find_spec("torchao") is None:
        raise UserError('speed.fp8: true given, but torchao is not installed; pip install "llada-lightning[fp8]"')


def _convert_to_fp8(model: Transformer, **config: Any) -> None:
    """The blocks' linear layers by torchao, scaled tensor by tensor at each product; the head stays as it is."""
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    for block in model.blocks:
        convert_to_float8_training(block, config=Float8LinearConfig(**config), module_filter_fn=_fits_fp8)


def _fits_fp8(module: nn.Module, name: str) -> bool:
    """The hardware takes multiples of 16 only."""
    return isinstance(module, nn.Linear) and module.in_features % 16 == 0 and module.out_features % 16 == 0
