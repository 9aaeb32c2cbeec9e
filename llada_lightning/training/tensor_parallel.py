"""Tensor parallelism: a group of processes computes one micro-batch together, each with its part of every matrix.

Columns, then rows (Shoeybi et al. 2019): a process has some of the heads, some of the inner width, some of the words.
Between such pairs of matrices it has some positions of each sequence, so that norms and residual stream are divided,
too (sequence parallelism; Korthikanti et al. 2022).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from llada_lightning.compute.shapes import Shape
from llada_lightning.model import Transformer
from llada_lightning.support.errors import UserError

_SEQUENCE = 1
"""The dimension of (B, L, D) along which positions are divided."""


def check_degree(degree: int, processes: int, shape: Shape, vocab_size: int, sequence_length: int) -> None:
    """Refuse a degree of tensor parallelism that does not cut everything into equal parts.

    Args:
        degree: The number of processes of a group.
        processes: The number of processes of the run.

    Raises:
        UserError: names what is not divided, and the degrees that fit.
    """
    divided = {
        "the number of processes": processes,
        "n_heads": shape.n_heads,
        "n_kv_heads": shape.n_kv_heads,
        "d_ff": shape.d_ff,
        "data.sequence_length": sequence_length,
        "model.vocab_size": vocab_size,
    }
    fitting = [d for d in range(1, processes + 1) if all(value % d == 0 for value in divided.values())]
    for name, value in divided.items():
        if degree < 1 or value % degree:
            fix = f"degrees that fit here: {', '.join(map(str, fitting))}"
            if name == "model.vocab_size":
                fix += f"; or pad it: --model.vocab_size={-(-value // degree) * degree}"
            raise UserError(f"trainer.strategy: tensor_parallel {degree} does not divide {name} {value}; {fix}")


def parallelise(model: Transformer, mesh: DeviceMesh) -> None:
    """Divide, in place, the matrices of a model, which may be on the meta device, over a group of processes.

    Tokens go in, and hidden states and logits come out, whole and the same in every process of the group.

    Args:
        model: The model. Where its head is compiled, so are the parts of its blocks.
        mesh: A device mesh of one dimension, whose size :func:`check_degree` has checked.
    """
    norm, columns, rows = (
        SequenceParallel(use_local_output=True),
        ColwiseParallel(),
        RowwiseParallel(output_layouts=Shard(_SEQUENCE)),
    )
    of_a_block: dict[str, ParallelStyle] = {
        "attention_norm": norm,
        "attention.q_proj": columns,
        "attention.k_proj": columns,
        "attention.v_proj": columns,
        "attention.out_proj": rows,
        "feed_forward_norm": norm,
        "feed_forward.gate_proj": columns,
        "feed_forward.up_proj": columns,
        "feed_forward.down_proj": rows,
    }
    plan = {f"blocks.*.{name}": style for name, style in of_a_block.items()}
    plan["embedding"] = RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(_SEQUENCE))
    plan["norm"], plan["head"] = norm, ColwiseParallel(output_layouts=Replicate())
    parallelize_module(model, mesh, plan)
    # FSDP2 warns of what the plan returns; the model writes to none of it in place.
    warnings.filterwarnings("ignore", ".*returned a view tensor")

    def gather_output(module: nn.Module, inputs: tuple[Any, ...], x_BLD: Tensor) -> Tensor:
        return _gathered(x_BLD, mesh).to_local()

    def owned_output(module: nn.Module, inputs: tuple[Any, ...], logits_NV: Tensor) -> Tensor:
        return logits_NV.clone()  # as it comes out of the plan it may not be written to

    for block in model.blocks:
        for name in ("attention", "feed_forward"):
            part = block.get_submodule(name)
            part.forward = _gathering(part.forward, mesh)
            if model.head.compiled:
                # What passes between graphs must be a plain tensor, so none may be cut, as FSDP2's hooks would a block.
                part.forward = torch.compile(part.forward, fullgraph=True, dynamic=False)
    model.norm.register_forward_hook(gather_output)
    model.head.register_forward_hook(owned_output)


def _gathering(forward: Callable[..., Tensor], mesh: DeviceMesh) -> Callable[..., Tensor]:
    def gathering(x_BLD: Tensor, *arguments: Any) -> Tensor:
        return forward(_gathered(x_BLD, mesh), *arguments)

    return gathering


def _gathered(x_BLD: Tensor, mesh: DeviceMesh) -> DTensor:
    """All positions, of which each process has some; the gradients of all processes are added up on the way back.

    Under autocast in the type in which the matrix that follows computes: half as much travels, rounded alike.
    """
    device = x_BLD.device.type
    if torch.is_autocast_enabled(device):
        x_BLD = x_BLD.to(torch.get_autocast_dtype(device))
    return DTensor.from_local(x_BLD, mesh, [Shard(_SEQUENCE)]).redistribute(placements=[Replicate()])
