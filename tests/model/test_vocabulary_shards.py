"""The cross-entropy over entries that several processes have, played by threads, against that of one process."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llada_lightning.model import head as module
from llada_lightning.model import sharding
from llada_lightning.model.head import linear_cross_entropy
from llada_lightning.model.sharding import VocabularyShards


class Group:
    """Threads that add up their tensors."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._barrier = threading.Barrier(size, timeout=20)
        self._tensors: dict[int, Tensor] = {}

    def all_reduce(self, tensor: Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None) -> None:
        self._tensors[threading.get_ident()] = tensor
        self._barrier.wait()
        stacked = torch.stack(list(self._tensors.values()))
        self._barrier.wait()
        tensor.copy_(stacked.amax(dim=0) if op == dist.ReduceOp.MAX else stacked.sum(dim=0))
        self._barrier.wait()


def inputs(positions: int, entries: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = 3 * torch.randn(positions, 6, generator=generator)
    weight = torch.randn(entries, 6, generator=generator)
    targets = torch.randint(0, entries - 1, (positions,), generator=generator)
    weights = 1 / (0.001 + torch.rand(positions, generator=generator))
    return hidden, weight, targets, weights


def result(hidden: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    total, nll = linear_cross_entropy(hidden, weight, *rest)
    (total / 7).backward()
    assert hidden.grad is not None and weight.grad is not None
    return total.detach(), nll, hidden.grad, weight.grad


def in_parts(size: int, hidden: Tensor, weight: Tensor, *rest: Any) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    group, entries = Group(size), len(weight) // size

    def rank(number: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        shards = VocabularyShards(group, number * entries, entries)
        excluded, z_loss = rest[2:]
        own = weight[shards.first : shards.first + entries]
        return result(hidden, own, *rest[:2], excluded, False, shards, z_loss)

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(size) as threads:
        patch.setattr(sharding.dist, "all_reduce", group.all_reduce)
        return list(threads.map(rank, range(size)))


@settings(max_examples=30, deadline=None)
@given(
    positions=st.integers(1, 40),
    size=st.integers(1, 4),
    entries=st.integers(1, 9),
    rows=st.integers(1, 50),
    excludes=st.booleans(),
    z_loss=st.sampled_from([0.0, 0.1]),
    seed=st.integers(0, 1000),
)
def test_every_process_has_the_values_and_its_entries_gradients(
    positions: int, size: int, entries: int, rows: int, excludes: bool, z_loss: float, seed: int
) -> None:
    everything = inputs(positions, max(size * entries, 2 * size), seed)
    count = len(everything[1]) // size
    excluded = size * count - 1 if excludes else None
    total, nll, grad_hidden, grad_weight = result(*everything, excluded, False, None, z_loss)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(module.CHUNK_BYTES, "cpu", 4 * count * rows)
        parts = in_parts(size, *everything, excluded, z_loss)
    for part in parts:
        torch.testing.assert_close(part[0], total, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(part[1], nll, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(part[2], grad_hidden, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(torch.cat([part[3] for part in parts]), grad_weight, rtol=1e-4, atol=1e-3)


def test_a_token_that_is_nearly_certain_keeps_its_gradient_in_bf16() -> None:
    """p - 1 = -1e-3 is nothing in bf16 once p is rounded to 1."""
    logits = torch.tensor([[0.0, 7.0, 0.0, 0.0]])
    [(nll, gradient), (other_nll, other)] = _chunk(logits.bfloat16(), torch.tensor([1]))
    exact = torch.softmax(logits, dim=1) - torch.tensor([[0.0, 1.0, 0.0, 0.0]])
    torch.testing.assert_close(torch.cat([gradient, other], dim=1).float(), exact, rtol=1e-2, atol=0.0)
    assert nll == other_nll == pytest.approx(-torch.log_softmax(logits, dim=1)[0, 1].item(), rel=1e-4)


def _chunk(logits: Tensor, targets: Tensor) -> list[tuple[Tensor, Tensor]]:
    group, entries = Group(2), logits.shape[1] // 2

    def rank(number: int) -> tuple[Tensor, Tensor]:
        shards = VocabularyShards(group, number * entries, entries)
        own = logits[:, shards.first : shards.first + entries].clone()
        return shards.chunk_gradient(own, targets, torch.ones(len(targets)))

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(2) as threads:
        patch.setattr(sharding.dist, "all_reduce", group.all_reduce)
        return list(threads.map(rank, range(2)))


def test_a_token_lies_with_one_process() -> None:
    shards = [VocabularyShards(None, first, 4) for first in (0, 4, 8)]
    assert [part.column(6) for part in shards] == [None, 2, None]
    assert [part.column(None) for part in shards] == [None] * 3
