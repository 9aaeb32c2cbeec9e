"""The chunked cross-entropy against the plain one: values and gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llada_lightning.model import head as module
from llada_lightning.model.head import OutputHead, linear_cross_entropy


def plain(hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor, excluded: int | None) -> Tensor:
    logits = F.linear(hidden, weight)
    if excluded is not None:
        keep = torch.arange(len(weight)) != excluded
        logits = logits.masked_fill(~keep, float("-inf"))
    with torch.autocast("cpu", enabled=False):
        return F.cross_entropy(logits.float(), targets, reduction="none") @ weights


def inputs(positions: int, words: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(positions, width, generator=generator).requires_grad_()
    weight = torch.randn(words, width, generator=generator).requires_grad_()
    targets = torch.randint(0, words - 1, (positions,), generator=generator)
    weights = 1 / (0.001 + torch.rand(positions, generator=generator))
    weights[::5] = 0.0
    return hidden, weight, targets, weights


def gradients(total: Tensor, *of: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(total / 7, of)


@settings(max_examples=40, deadline=None)
@given(
    positions=st.integers(1, 70),
    words=st.integers(3, 40),
    width=st.integers(1, 12),
    rows=st.integers(1, 80),
    excludes=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_values_and_gradients_are_those_of_the_plain_loss(
    positions: int, words: int, width: int, rows: int, excludes: bool, seed: int
) -> None:
    hidden, weight, targets, weights = inputs(positions, words, width, seed)
    excluded = words - 1 if excludes else None
    expected = plain(hidden, weight, targets, weights, excluded)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(module.CHUNK_BYTES, "cpu", 4 * words * rows)
        total, nll = linear_cross_entropy(hidden, weight, targets, weights, excluded)
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(nll @ weights, expected, rtol=1e-5, atol=1e-4)
    assert not nll.requires_grad
    scale = max(1.0, float(weights.max()) / 7)
    for ours, theirs in zip(gradients(total, hidden, weight), gradients(expected, hidden, weight), strict=True):
        torch.testing.assert_close(ours / scale, theirs / scale, rtol=1e-5, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(
    positions=st.integers(1, 40),
    words=st.integers(3, 40),
    rows=st.integers(1, 50),
    excludes=st.booleans(),
    z_loss=st.sampled_from([1e-4, 0.1, 1.0]),
    seed=st.integers(0, 1000),
)
def test_the_z_loss_is_in_the_gradient_and_not_in_the_value(
    positions: int, words: int, rows: int, excludes: bool, z_loss: float, seed: int
) -> None:
    """Chunked, and by the plain way, against the gradient of the sum that is written out."""
    hidden, weight, targets, weights = inputs(positions, words, 6, seed)
    excluded = words - 1 if excludes else None
    likelihood = plain(hidden, weight, targets, weights, excluded)

    def logits() -> Tensor:
        hidden_by_words = F.linear(hidden, weight)
        return hidden_by_words.masked_fill(torch.arange(words) == (words if excluded is None else excluded), -torch.inf)

    written_out = likelihood + z_loss * (logits().exp().sum(dim=1).log().square() * weights).sum()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(module.CHUNK_BYTES, "cpu", 4 * words * rows)
        total, nll = linear_cross_entropy(hidden, weight, targets, weights, excluded, z_loss=z_loss)
    again = plain(hidden, weight, targets, weights, excluded)
    by_the_plain_way = module.with_z_loss(again, logits(), weights, z_loss)
    torch.testing.assert_close(total, likelihood, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(by_the_plain_way, likelihood, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(nll @ weights, likelihood, rtol=1e-5, atol=1e-4)
    scale = max(1.0, float(weights.max()) / 7)
    expected = gradients(written_out, hidden, weight)
    for found in (gradients(total, hidden, weight), gradients(by_the_plain_way, hidden, weight)):
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours / scale, theirs / scale, rtol=1e-4, atol=2e-5)


def test_a_weight_of_a_position_is_the_weight_of_its_gradient() -> None:
    """The fault of fused kernels that sum first: a gradient as if all weights were alike."""
    hidden, weight, targets, _ = inputs(8, 11, 5)
    weights = torch.tensor([0.0, 1.0, 2.0, 1000.0, 0.5, 0.0, 3.0, 1.0])
    total, _ = linear_cross_entropy(hidden, weight, targets, weights)
    (grad,) = torch.autograd.grad(total, hidden)
    for row, factor in enumerate(weights.tolist()):
        alone, _ = linear_cross_entropy(hidden[row : row + 1], weight, targets[row : row + 1], torch.ones(1))
        torch.testing.assert_close(grad[row], factor * torch.autograd.grad(alone, hidden)[0][row])


def test_autocast_rounds_as_the_plain_loss_does() -> None:
    hidden, weight, targets, weights = inputs(300, 50, 16)
    with torch.autocast("cpu", torch.bfloat16):
        expected = plain(hidden, weight, targets, weights, 49)
        total, _ = linear_cross_entropy(hidden, weight, targets, weights, 49)
    torch.testing.assert_close(total, expected, rtol=1e-6, atol=0)
    for ours, theirs in zip(gradients(total, hidden, weight), gradients(expected, hidden, weight), strict=True):
        assert ours.dtype == torch.float32
        assert float((ours - theirs).norm() / theirs.norm()) < 4e-3  # two roundings to bf16, differently placed


def test_certain_and_impossible_targets_keep_their_precision() -> None:
    """p near 1 leaves a small gradient, which a rounded p would lose; p of 0 in fp32 has a finite loss."""
    weight = torch.tensor([[1.0], [0.0]], requires_grad=True)
    for hidden in (9.0, 150.0):
        x = torch.tensor([[hidden]], requires_grad=True)
        for target, nll in ((0, torch.tensor(-hidden).exp().log1p()), (1, torch.tensor(hidden))):
            total, _ = linear_cross_entropy(x, weight, torch.tensor([target]), torch.ones(1))
            expected = F.cross_entropy(F.linear(x, weight), torch.tensor([target]))
            torch.testing.assert_close(total, nll, rtol=1e-3, atol=1e-6)
            torch.testing.assert_close(*(torch.autograd.grad(y, x)[0] for y in (total, expected)), rtol=1e-3, atol=0)


def test_memory_of_all_logits_is_never_taken() -> None:
    """What is allocated at the largest stays below the M x V logits, which the plain loss holds three times."""
    head, positions, words = OutputHead(8, 30_000), 3000, 30_000
    hidden, targets = torch.randn(positions, 8, requires_grad=True), torch.zeros(positions, dtype=torch.int64)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        head.nll(hidden, targets, torch.ones(positions))[0].backward()
    held = peak = 0
    for event in profiler.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    assert 0 < peak < 4 * positions * words / 2


def test_without_gradients_only_the_values_are_computed() -> None:
    hidden, weight, targets, weights = inputs(30, 9, 4)
    with torch.no_grad():
        total, nll = linear_cross_entropy(hidden, weight, targets, weights)
    torch.testing.assert_close(total, plain(hidden, weight, targets, weights, None))
    assert not total.requires_grad and nll.shape == (30,)


def test_no_position_at_all() -> None:
    hidden, weight, targets, weights = inputs(3, 9, 4)
    total, nll = linear_cross_entropy(hidden[:0], weight, targets[:0], weights[:0])
    assert total.item() == 0 and nll.shape == (0,)
    assert float(torch.autograd.grad(total, weight)[0].abs().sum()) == 0


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_compiled_is_the_same(z_loss: float) -> None:
    hidden, weight, targets, weights = inputs(40, 9, 4)
    results = [
        linear_cross_entropy(hidden, weight, targets, weights, 8, compiled=flag, z_loss=z_loss)
        for flag in (False, True)
    ]
    (total, nll), (compiled_total, compiled_nll) = results
    torch.testing.assert_close(compiled_nll, nll, rtol=1e-6, atol=1e-6)
    for ours, theirs in zip(gradients(compiled_total, hidden, weight), gradients(total, hidden, weight), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
