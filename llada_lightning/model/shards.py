"""The part of a tensor that one process of several has."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


def own_part(whole: Tensor, like: DTensor) -> Tensor:
    """A view of what of a whole tensor this process has, where it is divided like another; nothing is exchanged.

    Tensor parallelism divides first and FSDP2 its parts, so the mesh's dimensions are gone through from the last. (Of a
    dimension divided by both, ``distribute_tensor`` scatters nothing, and older versions round uneven parts otherwise.)

    Args:
        whole: of the shape of ``like``; on any device.
    """
    assert whole.shape == like.shape, f"{tuple(whole.shape)} is not {tuple(like.shape)}"
    part, mesh = whole, like.device_mesh
    for axis in reversed(range(mesh.ndim)):
        placement = like.placements[axis]
        assert not placement.is_partial()
        if not placement.is_replicate():
            part = _chunk(part, placement.dim, mesh.get_local_rank(axis), mesh.size(axis))  # type: ignore[attr-defined]
    return part


def fill(sharded: DTensor, whole: Tensor) -> None:
    """Write, in place, a whole tensor's part."""
    with torch.no_grad():
        sharded.to_local().copy_(own_part(whole, sharded))


def _chunk(tensor: Tensor, dim: int, rank: int, ranks: int) -> Tensor:
    """As ``torch.chunk`` cuts: equal but for the last ones, which may be shorter or empty."""
    size = tensor.shape[dim]
    most = -(-size // ranks)
    start = min(rank * most, size)
    return tensor.narrow(dim, start, min(most, size - start))
