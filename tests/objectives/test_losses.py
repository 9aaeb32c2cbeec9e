"""Losses: who gets probability, what is averaged over what, and the gradients."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llada_lightning.model.head import token_nll
from llada_lightning.objectives.arm import shift_right
from llada_lightning.objectives.llada import masked_diffusion_weights, nll_bound
from llada_lightning.objectives.standard_errors import clustered_mean_and_stderr

WORDS = 11
MASK = 7


def random_logits(count: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(count, WORDS, generator=torch.Generator().manual_seed(seed)).mul(3).to(dtype)


def random_targets(count: int, seed: int = 0) -> Tensor:
    """Any word but [MASK]."""
    words = torch.tensor([word for word in range(WORDS) if word != MASK])
    return words[torch.randint(len(words), (count,), generator=torch.Generator().manual_seed(seed))]


def nll_and_gradient(logits: Tensor, targets: Tensor, excluded: int | None) -> tuple[Tensor, Tensor]:
    leaf = logits.clone().requires_grad_()
    nll = token_nll(leaf * 1, targets, excluded)  # a leaf cannot be overwritten
    (gradient,) = torch.autograd.grad(nll.sum(), leaf)
    return nll.detach(), gradient


def test_token_nll_with_every_word_is_log_softmax_with_its_gradient() -> None:
    logits, targets = random_logits(50), random_targets(50)
    nll, gradient = nll_and_gradient(logits, targets, None)
    torch.testing.assert_close(nll, -logits.log_softmax(-1)[torch.arange(50), targets])
    torch.testing.assert_close(gradient, logits.softmax(-1) - F.one_hot(targets, WORDS))
    assert (gradient[:, MASK] > 0).all()  # compat: [MASK] has its share


def test_excluded_word_gets_nothing_and_the_others_renormalise() -> None:
    logits, targets = random_logits(50), random_targets(50)
    others = [word for word in range(WORDS) if word != MASK]
    nll, gradient = nll_and_gradient(logits, targets, MASK)
    log_p = logits[:, others].log_softmax(-1)
    torch.testing.assert_close(nll, -log_p[torch.arange(50), targets - (targets > MASK).long()])
    assert (gradient[:, MASK] == 0).all()
    expected = log_p.exp() - F.one_hot(targets, WORDS)[:, others]
    torch.testing.assert_close(gradient[:, others], expected)
    total = sum(math.exp(-token_nll(random_logits(1), torch.tensor([word]), MASK).item()) for word in range(WORDS))
    assert total == pytest.approx(1, rel=1e-6)
    assert token_nll(random_logits(1), torch.tensor([MASK]), MASK).item() == math.inf


def test_excluded_logit_has_no_say_however_large() -> None:
    logits, targets = random_logits(20), random_targets(20)
    large = logits.clone()
    large[:, MASK] = 1e30
    torch.testing.assert_close(token_nll(large, targets, MASK), token_nll(logits.clone(), targets, MASK))


@pytest.mark.parametrize("excluded", [None, MASK])
def test_half_precision_logits_are_summed_in_fp32(excluded: int | None) -> None:
    logits, targets = random_logits(50, dtype=torch.bfloat16), random_targets(50)
    nll = token_nll(logits.clone(), targets, excluded)
    assert nll.dtype == torch.float32
    torch.testing.assert_close(nll, token_nll(logits.float(), targets, excluded), rtol=0, atol=0)


def test_nothing_masked_costs_nothing() -> None:
    nll = token_nll(random_logits(0), random_targets(0), MASK)
    assert (nll @ masked_diffusion_weights(torch.ones(0), 0)).item() == 0


def test_positions_that_fill_up_weigh_nothing_whatever_their_probability() -> None:
    p = torch.tensor([0.5, 0.25, float("nan"), 0.0])
    assert masked_diffusion_weights(p, 2).tolist() == [2.0, 4.0, 0.0, 0.0]


def test_shift_right_puts_eos_first_and_drops_the_last() -> None:
    tokens = torch.tensor([[3, 4, 5], [6, 0, 8]])
    assert shift_right(tokens, start_token_id=9).tolist() == [[9, 3, 4], [9, 6, 0]]
    assert shift_right(tokens[:, :1], start_token_id=9).tolist() == [[9], [9]]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.lists(st.integers(1, 6), min_size=1, max_size=5))
def test_mean_over_ragged_micro_batches_is_the_global_loss(seed: int, sizes: list[int]) -> None:
    # `denominator`: tokens of the global batch over the number of its micro-batches; then Lightning takes the mean.
    tokens = sum(sizes)
    logits, targets = random_logits(tokens, seed), random_targets(tokens, seed)
    p = torch.rand(tokens, generator=torch.Generator().manual_seed(seed)).clamp_min(1e-3)
    nll = token_nll(logits, targets)
    denominator = tokens / len(sizes)
    parts = list(zip(nll.split(sizes), p.split(sizes), strict=True))
    arm = torch.stack([nll_N.sum() / denominator for nll_N, _ in parts]).mean()
    weighted = [nll_M @ masked_diffusion_weights(p_M, len(p_M)) for nll_M, p_M in parts]
    llada = torch.stack(weighted).mean() / denominator
    torch.testing.assert_close(arm, nll.mean())
    torch.testing.assert_close(llada, (nll / p).mean())


def test_gradient_is_that_of_eq_3_written_plainly() -> None:
    batch, length = 4, 8
    generator = torch.Generator().manual_seed(1)
    logits_BLV = torch.randn(batch, length, WORDS, generator=generator, dtype=torch.float64)
    targets_BL = random_targets(batch * length).view(batch, length)
    p_B = torch.tensor([0.1, 0.4, 0.7, 1.0], dtype=torch.float64)
    masked_BL = torch.rand(batch, length, generator=generator) < p_B[:, None]

    ours = logits_BLV.clone().requires_grad_()
    nll_M = token_nll(ours[masked_BL], targets_BL[masked_BL], MASK)
    p_M = p_B[:, None].expand_as(masked_BL)[masked_BL]
    loss = nll_M.double() @ masked_diffusion_weights(p_M, len(p_M)) / (batch * length)

    plain = logits_BLV.clone().requires_grad_()
    bias_V = torch.zeros(WORDS, dtype=torch.float64)
    bias_V[MASK] = -math.inf
    log_p_BL = (plain + bias_V).log_softmax(-1).gather(-1, targets_BL[..., None])[..., 0]
    expected = -sum(log_p_BL[b, i] / p_B[b] for b in range(batch) for i in range(length) if masked_BL[b, i]) / (
        batch * length
    )

    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    (gradient,), (expected_gradient,) = torch.autograd.grad(loss, ours), torch.autograd.grad(expected, plain)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-8)
    assert (gradient[~masked_BL] == 0).all()


def test_bound_weighs_each_sequence_by_its_own_count() -> None:
    masked_BL = torch.tensor([[True, False, True, False], [False, False, False, True], [True] * 4])
    nll_M = torch.tensor([1.0, 2.0, 10.0, 3.0, 4.0, 5.0, 6.0])
    bound_B = nll_bound(nll_M, masked_BL)
    assert bound_B.dtype == torch.float64
    assert bound_B.tolist() == [4 / 2 * 3, 4 / 1 * 10, 4 / 4 * 18]


@given(st.lists(st.floats(0, 1e3), min_size=2, max_size=50))
def test_a_document_each_gives_the_usual_standard_error(values: list[float]) -> None:
    mean, stderr = clustered_mean_and_stderr(torch.tensor(values, dtype=torch.float64), torch.arange(len(values)))
    assert mean == pytest.approx(np.mean(values), rel=1e-9)
    assert stderr == pytest.approx(np.std(values, ddof=1) / math.sqrt(len(values)), rel=1e-6, abs=1e-7 * max(values))


@given(st.lists(st.floats(0, 1e3), min_size=2, max_size=20), st.integers(2, 5))
def test_copies_within_a_document_add_no_certainty(values: list[float], copies: int) -> None:
    once = torch.tensor(values, dtype=torch.float64)
    one = clustered_mean_and_stderr(once, torch.arange(len(values)))
    many = clustered_mean_and_stderr(once.repeat(copies), torch.arange(len(values)).repeat(copies))
    assert many == pytest.approx(one, rel=1e-6, abs=1e-6)


def test_the_clustered_error_covers_the_truth_where_documents_differ() -> None:
    """Documents with a mean of their own: the spread over many samples is the standard error that each claims."""
    draws = np.random.default_rng(0)
    means, errors = [], []
    for _ in range(300):
        values = np.repeat(draws.normal(5.0, 1.0, 30), 8) + draws.normal(0.0, 0.5, 240)
        mean, stderr = clustered_mean_and_stderr(torch.from_numpy(values), torch.arange(30).repeat_interleave(8))
        means.append(mean)
        errors.append(stderr)
    assert np.std(means) == pytest.approx(np.mean(errors), rel=0.12)
    assert np.mean(errors) > 2 * np.std(values) / math.sqrt(240)


def test_one_document_has_no_standard_error() -> None:
    mean, stderr = clustered_mean_and_stderr(torch.tensor([3.0, 5.0]), torch.tensor([7, 7]))
    assert mean == 4.0
    assert math.isnan(stderr)


def test_a_loss_that_is_not_a_number_stays_one() -> None:
    mean, stderr = clustered_mean_and_stderr(torch.tensor([3.0, math.nan]), torch.tensor([0, 1]))
    assert math.isnan(mean)
    assert math.isnan(stderr)
