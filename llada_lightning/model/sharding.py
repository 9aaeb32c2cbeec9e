"""The part of a tensor that one process of several has, and the cross-entropy over a divided vocabulary.

In tensor parallelism each process of a group has the logits of some of the vocabulary entries.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor


def own_part(whole: Tensor, like: DTensor) -> Tensor:
    """A view of what of a whole tensor this process has, where it is divided like another; nothing is exchanged.

    Tensor parallelism divides first and FSDP2 its parts, so the mesh's dimensions are gone through from the last. (Of a
    dimension divided by both, ``distribute_tensor`` scatters nothing, and older versions round uneven parts otherwise.)

    Args:
        whole: A tensor of the shape of ``like``, on any device.
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


def gathered(part: DTensor) -> Tensor:
    """The whole tensor of which each process has a part: in every process, and the inverse of :func:`own_part`."""
    whole = torch.zeros(part.shape, dtype=part.dtype, device=part.device)
    with torch.no_grad():
        own_part(whole, part).copy_(part.to_local())
        for axis, placement in enumerate(part.placements):
            if not placement.is_replicate():
                dist.all_reduce(whole, group=part.device_mesh.get_group(axis))
    return whole


def _chunk(tensor: Tensor, dim: int, rank: int, ranks: int) -> Tensor:
    """As ``torch.chunk`` cuts: equal but for the last ones, which may be shorter or empty."""
    size = tensor.shape[dim]
    most = -(-size // ranks)
    start = min(rank * most, size)
    return tensor.narrow(dim, start, min(most, size - start))


@dataclass(frozen=True)
class VocabularyShards:
    """The vocabulary entries of this process, and the processes that have the others.

    Attributes:
        group: The processes, each with as many vocabulary entries, in the order of their ranks.
        first: The first vocabulary entry of this process.
        size: The number of vocabulary entries of this process.
    """

    group: Any
    first: int
    size: int

    @classmethod
    def of(cls, weight_VD: DTensor) -> VocabularyShards:
        """Of an output head's weight in shards over a mesh of one dimension."""
        mesh, size = weight_VD.device_mesh, weight_VD.to_local().shape[0]
        assert mesh.ndim == 1 and size * mesh.size() == weight_VD.shape[0]
        return cls(mesh.get_group(), mesh.get_local_rank() * size, size)

    def column(self, token_id: int | None) -> int | None:
        """The column of a vocabulary entry in this process's logits; None where another process has it."""
        return token_id - self.first if token_id is not None and 0 <= token_id - self.first < self.size else None

    def add_up(self, tensor: Tensor) -> None:
        """Replace each process's tensor by their sum."""
        dist.all_reduce(tensor, group=self.group)

    def chunk_gradient(
        self, logits_CV: Tensor, targets_C: Tensor, weights_C: Tensor, z_loss: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """Cross-entropies (C,), the same everywhere, and the gradient of their weighted sum by this process's logits.

        Three figures of each position are exchanged: the largest logit, then the sum of exponentials and the target's
        logit below it.
        """
        return self._chunk_gradient(logits_CV, targets_C, weights_C, z_loss, _sums, _gradient)

    def compiled_chunk_gradient(
        self, logits_CV: Tensor, targets_C: Tensor, weights_C: Tensor, z_loss: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """As :meth:`chunk_gradient`, with what lies between the exchanges fused by ``torch.compile``."""
        return self._chunk_gradient(logits_CV, targets_C, weights_C, z_loss, _compiled(_sums), _compiled(_gradient))

    def _chunk_gradient(
        self,
        logits_CV: Tensor,
        targets_C: Tensor,
        weights_C: Tensor,
        z_loss: float,
        sums: Callable[..., Tensor],
        gradient: Callable[..., tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, Tensor]:
        column_C1 = (targets_C - self.first)[:, None]
        own_C1 = (column_C1 >= 0) & (column_C1 < self.size)
        column_C1 = column_C1.clamp(0, self.size - 1)
        top_C1 = logits_CV.amax(dim=1, keepdim=True).float()
        dist.all_reduce(top_C1, dist.ReduceOp.MAX, group=self.group)
        sums_2C1 = sums(logits_CV, top_C1, column_C1, own_C1)
        self.add_up(sums_2C1)
        return gradient(logits_CV, top_C1, column_C1, own_C1, sums_2C1, weights_C[:, None], z_loss)


def _sums(logits_CV: Tensor, top_C1: Tensor, column_C1: Tensor, own_C1: Tensor) -> Tensor:
    """Sum of exponentials, and the target's logit or 0, both relative to the largest logit: (2, C, 1) float32."""
    target_C1 = torch.where(own_C1, logits_CV.gather(1, column_C1).float() - top_C1, 0.0)
    return torch.stack([(logits_CV.float() - top_C1).exp().sum(dim=1, keepdim=True), target_C1])


def _gradient(
    logits_CV: Tensor,
    top_C1: Tensor,
    column_C1: Tensor,
    own_C1: Tensor,
    sums_2C1: Tensor,
    weights_C1: Tensor,
    z_loss: float,
) -> tuple[Tensor, Tensor]:
    log_p_C1 = sums_2C1[1] - sums_2C1[0].log()
    target_C1 = torch.expm1(log_p_C1) * weights_C1
    if z_loss:  # as in ``head``
        drift_C1 = 2 * z_loss * (top_C1 + sums_2C1[0].log())
        target_C1 = target_C1 + log_p_C1.exp() * drift_C1 * weights_C1
        weights_C1 = weights_C1 * (1 + drift_C1)
    grad_CV = ((logits_CV.float() - top_C1).exp() * (weights_C1 / sums_2C1[0])).to(logits_CV.dtype)
    # p - 1 is taken before it is rounded (see ``linear_cross_entropy``); where the target is elsewhere, p stays.
    target_C1 = torch.where(own_C1, target_C1.to(grad_CV.dtype), grad_CV.gather(1, column_C1))
    return -log_p_C1[:, 0], grad_CV.scatter(1, column_C1, target_C1)


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=True)
