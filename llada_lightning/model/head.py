"""The output head: logits of positions, or their losses, such as the cross-entropy.

Losses are computed together with the head, chunk by chunk, so that the logits of all positions are never in memory at
once.

The gradient of a weighted sum of cross-entropies is known as soon as the logits are: (softmax - onehot) times the
weight. So each chunk's gradients are taken while its logits are at hand, and the chunk is let go (as Liger-Kernel and
Cut Cross-Entropy do; Hsu et al. 2024, Wijmans et al. 2024). PyTorch's own `F.linear_cross_entropy` (2.13) and Liger's
kernel weigh classes, not positions, which the 1/p of Eq. 3 needs, and cannot exclude a token.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor

from llada_lightning.model.sharding import VocabularyShards


class RowLoss(NamedTuple):
    """A loss of a position by its logits, in two forms.

    Attributes:
        values: From logits (N, V) and further tensors (N, ...) of the positions to their losses (N,), differentiable.
        chunk_gradient: From logits (C, V), targets (C,), weights (C,), the coefficient of the z-loss and the further
            tensors to the losses (C,) float32, and to the gradient of their weighted sum by the logits (C, V), in the
            type of the logits.
        buffers: By how much a chunk is smaller than one of cross-entropies, as several of its size are held at once.
    """

    values: Callable[..., Tensor]
    chunk_gradient: Callable[..., tuple[Tensor, Tensor]]
    buffers: int = 1


class OutputHead(nn.Linear):
    """A linear layer from the normalised residual stream to the vocabulary, without bias.

    Attributes:
        compiled: Whether ``torch.compile`` fuses the parts of the cross-entropy.
    """

    def __init__(self, d_model: int, vocab_size: int) -> None:
        super().__init__(d_model, vocab_size, bias=False)
        self.compiled = False

    def nll(
        self,
        hidden_MD: Tensor,
        targets_M: Tensor,
        weights_M: Tensor,
        excluded_token_id: int | None = None,
        z_loss: float = 0.0,
        loss: RowLoss | None = None,
        rows: tuple[Tensor, ...] = (),
    ) -> tuple[Tensor, Tensor]:
        """Weighted sum of the negative log-likelihoods, and each of them; the M x V logits are never all in memory.

        Args:
            hidden_MD: (M, D).
            targets_M: (M,) int64.
            weights_M: (M,) float32.
            excluded_token_id: The id of a token that gets no probability.
            z_loss: The coefficient of the z-loss, which is in the gradient alone (see :func:`linear_cross_entropy`).
            loss: Another loss than the negative log-likelihood; not with the vocabulary divided between processes.
            rows: The further tensors of the positions that it takes.

        Returns:
            () float32 with a gradient; (M,) float32, nats, without.
        """
        weight_VD: Tensor = self.weight
        shards = None
        if isinstance(weight_VD, DTensor):  # tensor parallelism: this process has a part of the vocabulary
            shards = VocabularyShards.of(weight_VD)
            weight_VD = weight_VD.to_local()
        return linear_cross_entropy(
            hidden_MD, weight_VD, targets_M, weights_M, excluded_token_id, self.compiled, shards, z_loss, loss, rows
        )


CHUNK_BYTES = {"cpu": 1 << 24, "cuda": 1 << 30}
"""Logits of a chunk: on the CPU they stay near the cache; on a GPU a chunk is long enough that adding its part of the
weight's gradient costs little."""


def token_nll(logits_NV: Tensor, targets_N: Tensor, excluded_token_id: int | None = None) -> Tensor:
    """Negative log-likelihood of each target, in nats, computed in fp32.

    Args:
        logits_NV: (N, V), any floating type; overwritten where a token is excluded.
        targets_N: (N,) int64.
        excluded_token_id: The id of a token that gets no probability: [MASK], which is never an answer. None gives
            it its share, as the authors' released code does.

    Returns:
        (N,) float32.
    """
    if excluded_token_id is not None:
        logits_NV[:, excluded_token_id] = float("-inf")
    return F.cross_entropy(logits_NV.float(), targets_N, reduction="none")


def with_z_loss(total: Tensor, logits_NV: Tensor, weights_N: Tensor, z_loss: float) -> Tensor:
    """A weighted sum of negative log-likelihoods whose gradient holds that of the z-loss, too; its value stays.

    The z-loss is the coefficient times (log Z)^2, where Z is the sum of the exponentials of a position's logits. It
    keeps the logits from drifting, which no likelihood sees (Chowdhery et al. 2022, "PaLM", Sec. 5). A position has in
    it the weight that it has in the sum, so that no division into micro-batches changes the gradient.

    Args:
        total: () the sum.
        logits_NV: (N, V), any floating type, -inf where a token is excluded.
        weights_N: (N,) float32, of the sum.
        z_loss: The coefficient.
    """
    z = z_loss * (logits_NV.float().logsumexp(dim=1).square() * weights_N).sum()
    return total + (z - z.detach())


def linear_cross_entropy(
    hidden_MD: Tensor,
    weight_VD: Tensor,
    targets_M: Tensor,
    weights_M: Tensor,
    excluded_token_id: int | None = None,
    compiled: bool = False,
    shards: VocabularyShards | None = None,
    z_loss: float = 0.0,
    loss: RowLoss | None = None,
    rows: tuple[Tensor, ...] = (),
) -> tuple[Tensor, Tensor]:
    """Cross-entropies of a linear layer's output, or other losses, and their weighted sum.

    Products are taken in the type of autocast, where it is on; everything between them in fp32.

    Args:
        hidden_MD: (M, D).
        weight_VD: (V, D) of the layer.
        targets_M: (M,) int64.
        weights_M: (M,) float32, of the sum; 0 for positions that only fill up a shape.
        excluded_token_id: The id of a token that gets no probability (see :func:`token_nll`).
        compiled: Whether ``torch.compile`` fuses what lies between the two products.
        shards: The place of this process where the weight holds some vocabulary entries only. Other processes hold the
            others, with the same positions.
        z_loss: The coefficient of the z-loss (see :func:`with_z_loss`).
        loss: Another loss than the cross-entropy, which needs whole logits.
        rows: The further tensors (M, ...) of the positions that it takes.

    Returns:
        () float32, the sum, differentiable once by hidden and weight; (M,) float32, nats, without gradient.
    """
    device = hidden_MD.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_MD.dtype
    gradients = torch.is_grad_enabled()
    assert loss is None or shards is None
    of_chunk = _chunk_gradient if loss is None else loss.chunk_gradient
    if shards is not None:
        of_chunk = shards.compiled_chunk_gradient if compiled else shards.chunk_gradient
    elif compiled:
        of_chunk = _compiled(of_chunk)
    return _LinearCrossEntropy.apply(
        hidden_MD, weight_VD, targets_M, weights_M, excluded_token_id, dtype, gradients, of_chunk, shards, z_loss,
        1 if loss is None else loss.buffers, *rows,
    )  # fmt: skip


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_MD: Tensor,
        weight_VD: Tensor,
        targets_M: Tensor,
        weights_M: Tensor,
        excluded_token_id: int | None,
        dtype: torch.dtype,
        gradients: bool,
        chunk_gradient: Callable[..., tuple[Tensor, Tensor]],
        shards: VocabularyShards | None,
        z_loss: float,
        buffers: int,
        *further: Tensor,
    ) -> tuple[Tensor, Tensor]:
        column = excluded_token_id if shards is None else shards.column(excluded_token_id)
        with torch.autocast(hidden_MD.device.type, enabled=False):
            chunks = _chunks(len(hidden_MD), buffers * len(weight_VD), dtype, hidden_MD.device.type)
            matrix_VD = weight_VD.to(dtype)
            grad_hidden_MD = torch.empty_like(hidden_MD) if gradients else None
            grad_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if gradients else None
            nll_M = torch.empty(len(hidden_MD), dtype=torch.float32, device=hidden_MD.device)
            for rows in chunks:
                hidden_CD = hidden_MD[rows].to(dtype)
                logits_CV = hidden_CD @ matrix_VD.T
                if column is not None:
                    logits_CV[:, column] = float("-inf")
                of_chunk = (x[rows] for x in further)
                nll_M[rows], grad_CV = chunk_gradient(logits_CV, targets_M[rows], weights_M[rows], z_loss, *of_chunk)
                if grad_hidden_MD is not None and grad_weight_VD is not None:
                    grad_hidden_MD[rows] = grad_CV @ matrix_VD
                    _add_product(grad_weight_VD, grad_CV.T, hidden_CD)
            if shards is not None and grad_hidden_MD is not None:
                shards.add_up(grad_hidden_MD)
        ctx.gradients = None if grad_weight_VD is None else (grad_hidden_MD, grad_weight_VD.to(weight_VD.dtype))
        ctx.mark_non_differentiable(nll_M)
        return (nll_M * weights_M).sum(), nll_M

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        hidden_MD, weight_VD = ctx.gradients
        ctx.gradients = None  # used up: they are scaled in place
        return hidden_MD.mul_(grad), weight_VD.mul_(grad), *[None] * (len(ctx.needs_input_grad) - 2)


def _chunk_gradient(logits_CV: Tensor, targets_C: Tensor, weights_C: Tensor, z_loss: float) -> tuple[Tensor, Tensor]:
    """Cross-entropies (C,), and the gradient of their weighted sum by the logits (C, V), in the logits' type.

    The gradient of the z-loss is p times 2 z_loss log Z.
    """
    targets_C1, weights_C1 = targets_C[:, None], weights_C[:, None]
    p_CV = torch.softmax(logits_CV, dim=1, dtype=torch.float32)
    # By way of the likeliest token, whose probability is at least 1 / V: the target's may be 0 in fp32.
    top_C1, top_token_C1 = logits_CV.max(dim=1, keepdim=True)
    top_log_p_C1 = p_CV.gather(1, top_token_C1).log()
    log_p_C1 = logits_CV.gather(1, targets_C1).float() - top_C1.float() + top_log_p_C1
    # p - 1 is taken before it is rounded: where p is nearly 1, a rounded p would leave nothing of the difference.
    target_C1 = torch.expm1(log_p_C1) * weights_C1
    if z_loss:
        drift_C1 = 2 * z_loss * (top_C1.float() - top_log_p_C1)
        target_C1 = target_C1 + log_p_C1.exp() * drift_C1 * weights_C1
        weights_C1 = weights_C1 * (1 + drift_C1)
    grad_CV = p_CV.mul_(weights_C1).to(logits_CV.dtype)
    grad_CV.scatter_(1, targets_C1, target_C1.to(logits_CV.dtype))
    return -log_p_C1[:, 0], grad_CV


@functools.cache
def _compiled(chunk_gradient: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    return torch.compile(chunk_gradient, dynamic=True)


def _chunks(positions: int, vocab_size: int, dtype: torch.dtype, device: str) -> list[slice]:
    """Equal parts of the positions, each with at most ``CHUNK_BYTES`` of logits."""
    rows = max(1, CHUNK_BYTES.get(device, 1 << 30) // (vocab_size * dtype.itemsize))
    parts = max(1, -(-positions // rows))
    rows = -(-positions // parts)
    return [slice(start, min(start + rows, positions)) for start in range(0, positions, max(1, rows))]


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, in fp32 where the factors are, else with the product rounded to their type."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total.add_(left @ right)
