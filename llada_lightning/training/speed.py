"""How the same numbers are computed faster: compilation, the loss, recomputation, attention, 8-bit products."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from llada_lightning.errors import UserError
from llada_lightning.model import Transformer
from llada_lightning.model.transformer import Block, Recompute

_FP8_CAPABILITY = (8, 9)
"""The first GPUs that multiply 8-bit floats: Ada and Hopper."""


@dataclass
class Speed:
    """How the same numbers are computed faster. But for fp8 nothing here makes another run.

    Args:
        compile: each block by torch.compile; null: where a GPU trains. What it has compiled serves later runs too.
        loss: chunked takes the cross-entropy with the output head, so that the logits of all positions never stand in
            memory; plain makes all logits first.
        recompute: what the backward pass computes again instead of keeping it: none, selective (all but products and
            attention), or full (whole blocks).
        fp8: the blocks' products in 8-bit floats (torchao; Hopper, Ada and later). Other roundings: another run.
    """

    compile: bool | None = None
    loss: Literal["chunked", "plain"] = "chunked"
    recompute: Recompute = "none"
    fp8: bool = False


def resolve_speed(speed: Speed, device: torch.device, training: bool) -> tuple[Speed, list[str]]:
    """What of the settings this machine can do.

    Args:
        speed: as given.
        device: that computes.
        training: else nothing is compiled, unless asked for: it would take longer than it saves.

    Returns:
        The settings to apply, and a note for each that is given up.

    Raises:
        UserError: fp8 without torchao or without the hardware: it cannot be left out in silence, it is another run.
    """
    if speed.fp8:
        _check_fp8(device)
    compiled = speed.compile
    if compiled is None:
        compiled = training and device.type == "cuda"
    trouble = compiler_trouble(device) if compiled else None
    notes = [] if trouble is None else [f"note: speed.compile: {trouble}; running without it, which changes no figure"]
    return Speed(compiled and trouble is None, speed.loss, speed.recompute, speed.fp8), notes


def describe_speed(speed: Speed) -> str:
    """One line for the start of a run."""
    return "speed: " + ", ".join(
        [
            "blocks compiled" if speed.compile else "blocks not compiled",
            f"{speed.loss} loss",
            *([f"{speed.recompute} recomputation"] if speed.recompute != "none" else []),
            *(["fp8 products"] if speed.fp8 else []),
        ]
    )


def apply_speed(model: Transformer, speed: Speed) -> None:
    """Set a model, in place, to compute as resolved settings say; before it is sharded."""
    if speed.fp8:
        _convert_to_fp8(model)
    for block in model.blocks:
        assert isinstance(block, Block)
        block.recompute = speed.recompute
        if speed.compile:
            # One graph for each kind of micro-batch (padded or not, training or validation), shared by all blocks.
            block.compile(dynamic=False)
    if speed.compile:
        model.head.compiled = True


def compiler_trouble(device: torch.device) -> str | None:
    """Why torch.compile cannot work here, or None."""
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        return None if has_triton() else "Triton is missing, or does not know this GPU"
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except Exception:  # of no documented kind: InvalidCxxCompiler, CalledProcessError, ...
        return "there is no C++ compiler here (install g++, or name one in CXX)"
    return None


def _check_fp8(device: torch.device) -> None:
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < _FP8_CAPABILITY:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"the {device.type.upper()}"
        raise UserError(f"speed.fp8: true given, but {name} has no 8-bit products (Hopper, Ada and later have)")
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
