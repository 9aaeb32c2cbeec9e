"""Uniform-state diffusion: the integrand by brute force, its gradient, the bound by enumeration, and the noise."""

from __future__ import annotations

from itertools import product
from math import log

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from helpers.exact_means import exact_mean
from llada_lightning.compute.flops import MASK_EPS
from llada_lightning.model.head import RowLoss, linear_cross_entropy
from llada_lightning.objectives import uniform
from llada_lightning.objectives.batches import TrainingBatch, ValidationBatch, scored_positions
from llada_lightning.objectives.densities import Beta, Density
from llada_lightning.objectives.density_settings import density_setting
from llada_lightning.objectives.forward_process import (
    Alphabet,
    drawn_ratio,
    mask_probability,
    random_mask,
    replaced_tokens,
)
from llada_lightning.objectives.noise import Purpose
from llada_lightning.objectives.uniform import chunk_gradient, integrand, levels
from llada_lightning.support.errors import UserError
from llada_lightning.training.modules import UniformDiffusionModule

WORDS, MASK = 11, 7
Array = npt.NDArray[np.float64]


def brute_force(p_NV: Tensor, targets_N: Tensor, noisy_N: Tensor, t_N: Tensor) -> Tensor:
    """(N,) float64: the sum over y as the bound is written, without [MASK]."""
    words = p_NV.shape[1]
    a_N1, u_N1 = (1 - t_N)[:, None], (t_N / words)[:, None]
    q_NV = a_N1 * torch.nn.functional.one_hot(targets_N, words) + u_N1
    mean_NV = a_N1 * p_NV + u_N1
    r_NV, of_mean_NV = (x / x.gather(1, noisy_N[:, None]) for x in (q_NV, mean_NV))
    terms_NV = r_NV * (r_NV / of_mean_NV).log() - r_NV + of_mean_NV
    return terms_NV.sum(dim=1) / ((1 - t_N) * words)


def problem(count: int, words: int = WORDS, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """Logits with [MASK] excluded, true and noisy tokens, levels."""
    rng = np.random.default_rng(words)
    logits_NV = torch.from_numpy(rng.normal(size=(count, words), scale=3)).to(dtype)
    logits_NV[:, MASK % words] = -torch.inf
    alphabet = Alphabet(words, MASK % words)
    targets_N, other_N = (torch.from_numpy(alphabet.ids(rng.random(count))) for _ in range(2))
    noisy_N = torch.where(torch.from_numpy(rng.random(count) < 0.5), targets_N, other_N)
    t_N = torch.from_numpy(np.concatenate([10.0 ** rng.uniform(-6, 0, count // 2), rng.random(count - count // 2)]))
    return logits_NV, targets_N, noisy_N, t_N


def without_mask(logits_NV: Tensor, *ids: Tensor) -> tuple[Tensor, ...]:
    """Probabilities of the entries that can be drawn, and ids among them."""
    mask = MASK % logits_NV.shape[1]
    p_NV = logits_NV.double().softmax(dim=1)
    kept = [word for word in range(p_NV.shape[1]) if word != mask]
    return p_NV[:, kept], *(ids_N - (ids_N > mask).long() for ids_N in ids)


@pytest.mark.parametrize("words", [4, 11, 300])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_integrand_is_the_sum_that_the_bound_is_written_as(words: int, dtype: torch.dtype) -> None:
    logits_NV, targets_N, noisy_N, t_N = problem(400, words, dtype)
    p_NV, x_N, z_N = without_mask(logits_NV, targets_N, noisy_N)
    values_N = integrand(logits_NV, targets_N, noisy_N, *levels(t_N, words - 1))
    expected_N = brute_force(p_NV, x_N, z_N, t_N)
    precise = dtype == torch.float64
    rtol, atol = (1e-8, 1e-9) if precise else (3e-4, 1e-5)
    torch.testing.assert_close(values_N.double(), expected_N, rtol=rtol, atol=atol)


@pytest.mark.parametrize("t", [1 - 1e-3, 1 - 1e-5, 1 - 1e-7])
def test_nothing_cancels_where_all_is_noise(t: float) -> None:
    """The integrand falls with a = 1 - t, which the sum as it is written loses in float32."""
    logits_NV, targets_N, noisy_N, _ = problem(200)
    t_N = torch.full((200,), t, dtype=torch.float64)
    single_N = integrand(logits_NV.float(), targets_N, noisy_N, *levels(t_N, WORDS - 1))
    double_N = integrand(logits_NV, targets_N, noisy_N, *levels(t_N, WORDS - 1))
    torch.testing.assert_close(single_N.double(), double_N, rtol=0, atol=3e-6)


@pytest.mark.parametrize("t", [0.0, 1.0])
def test_the_ends_are_finite(t: float) -> None:
    logits_NV, targets_N, _, _ = problem(50)
    rows = targets_N, *levels(torch.full((50,), t), WORDS - 1)
    values_N, grad_NV = chunk_gradient(logits_NV.float(), targets_N, torch.ones(50), 0.0, *rows)
    assert values_N.isfinite().all() and grad_NV.isfinite().all()
    if t == 1:  # where all is noise, nothing is to be learned
        assert values_N.abs().max() < 1e-5 and grad_NV.abs().max() < 1e-5


def test_the_gradient_of_the_integrand() -> None:
    logits_NV, targets_N, noisy_N, t_N = problem(12)
    t_N = t_N.clamp(1e-2, 0.99)
    kept = [word for word in range(WORDS) if word != MASK]

    def of_others(others_NV: Tensor) -> Tensor:
        whole_NV = torch.full_like(logits_NV, -torch.inf).index_copy(1, torch.tensor(kept), others_NV)
        return integrand(whole_NV, targets_N, noisy_N, *levels(t_N, WORDS - 1))

    assert torch.autograd.gradcheck(of_others, logits_NV[:, kept].clone().requires_grad_())


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("words", [4, 11, 300])
def test_the_chunks_gradient_is_that_of_the_integrand(words: int, z_loss: float) -> None:
    logits_NV, targets_N, noisy_N, t_N = problem(300, words)
    weights_N = torch.linspace(0, 2, 300, dtype=torch.float64)
    rows = noisy_N, *levels(t_N, words - 1)
    leaf_NV = logits_NV.clone().requires_grad_()
    expected_N = integrand(leaf_NV, targets_N, *rows)
    total = (expected_N * weights_N).sum() + z_loss * (leaf_NV.logsumexp(dim=1).square() * weights_N).sum()
    values_N, grad_NV = chunk_gradient(logits_NV, targets_N, weights_N, z_loss, *rows)
    torch.testing.assert_close(values_N, expected_N.detach())
    (expected_NV,) = torch.autograd.grad(total, leaf_NV)
    torch.testing.assert_close(grad_NV, expected_NV, rtol=1e-6, atol=1e-9)
    assert (grad_NV[:, MASK % words] == 0).all()


def test_chunks_of_the_head_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    _, targets_N, noisy_N, t_N = problem(50)
    rng = np.random.default_rng(0)
    hidden_ND, weight_VD = (torch.from_numpy(rng.normal(size=(n, 6))).requires_grad_() for n in (50, WORDS))
    weights_N = torch.from_numpy(rng.random(50))
    rows = noisy_N, *levels(t_N, WORDS - 1)
    logits_NV = hidden_ND @ weight_VD.T
    excluded_NV = logits_NV.masked_fill(torch.arange(WORDS) == MASK, -torch.inf)
    expected_N = integrand(excluded_NV, targets_N, *rows)
    expected = torch.autograd.grad((expected_N * weights_N).sum(), (hidden_ND, weight_VD))
    seen: list[int] = []

    def counted(logits_CV: Tensor, *others: object) -> tuple[Tensor, Tensor]:
        seen.append(len(logits_CV))
        return chunk_gradient(logits_CV, *others)  # type: ignore[arg-type]

    monkeypatch.setattr("llada_lightning.model.head.CHUNK_BYTES", {"cpu": 8 * WORDS * 8})
    loss = RowLoss(integrand, counted)
    total, values_N = linear_cross_entropy(hidden_ND, weight_VD, targets_N, weights_N, MASK, loss=loss, rows=rows)
    assert len(seen) > 1 and sum(seen) == 50 and max(seen) <= 8
    torch.testing.assert_close(values_N, expected_N.detach().float())
    for found, wanted in zip(torch.autograd.grad(total, (hidden_ND, weight_VD)), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)


# --- by enumeration ---------------------------------------------------------------------------------------------------

SMALL = 3
NODES, NODE_WEIGHTS = (x / 2 for x in np.polynomial.legendre.leggauss(60))


def random_mean(length: int, seed: int) -> Array:
    """Logits of an arbitrary predictor: an axis of words for each noisy token, then (position, word)."""
    return np.random.default_rng(seed).normal(size=(SMALL,) * length + (length, SMALL), scale=1.5)


def expected_integrand(logits: Array, x0_L: npt.NDArray[np.int64], t: float) -> float:
    """The sum over positions of the integrand as it is written, averaged over all noisy sequences."""
    length = len(x0_L)
    z_NL = np.array(list(product(range(SMALL), repeat=length)))
    probability_N = np.prod((1 - t) * (z_NL == x0_L) + t / SMALL, axis=1)
    p_NV = torch.from_numpy(logits).softmax(dim=-1).view(-1, SMALL)
    x_N, z_N = torch.from_numpy(x0_L).repeat(len(z_NL)), torch.from_numpy(z_NL).flatten()
    values_N = brute_force(p_NV, x_N, z_N, torch.full(x_N.shape, t, dtype=torch.float64))
    return float((probability_N * values_N.view(-1, length).sum(dim=1).numpy()).sum())


def bound(logits: Array, x0_L: npt.NDArray[np.int64], first: float = 0.0) -> float:
    """The integral over t from ``first`` to 1, by quadrature in s, t = first + (1 - first) s^3: it grows as -log t."""
    s_T, ds_T = NODES + 0.5, NODE_WEIGHTS
    t_T, slope_T = first + (1 - first) * s_T**3, (1 - first) * 3 * s_T**2
    values_T = [expected_integrand(logits, x0_L, t) for t in t_T]
    return float((ds_T * slope_T * values_T).sum())


@pytest.mark.parametrize("length", [1, 2])
def test_with_the_exact_mean_the_bound_is_the_entropy(length: int) -> None:
    data = np.random.default_rng(length).dirichlet(np.ones(SMALL**length)).reshape((SMALL,) * length)
    s_T, total = NODES + 0.5, 0.0
    for s, ds in zip(s_T, NODE_WEIGHTS, strict=True):
        mean = exact_mean(data, s**3)
        values = [data[x] * expected_integrand(mean, np.array(x), s**3) for x in product(range(SMALL), repeat=length)]
        total += ds * 3 * s**2 * sum(values)
    assert total == pytest.approx(-(data * np.log(data)).sum(), rel=2e-5)


def test_with_any_mean_the_bound_lies_above_the_entropy() -> None:
    data = np.random.default_rng(0).dirichlet(np.ones(SMALL**2)).reshape(SMALL, SMALL)
    entropy = -(data * np.log(data)).sum()
    for seed in range(3):
        mean = random_mean(2, seed)
        assert sum(data[x] * bound(mean, np.array(x)) for x in product(range(SMALL), repeat=2)) > entropy


class TablePredictor:
    """An arbitrary predictor in the place of a Transformer."""

    mask_token_id = None

    def __init__(self, logits: Array) -> None:
        self.logits = torch.tensor(logits)

    def start_ids(self, batch: object) -> tuple[int, ...]:
        return ()

    def hidden_after(self, start_ids: tuple[int, ...], inputs_BL: Tensor, *others: object, causal: bool, **named: object) -> Tensor:  # fmt: skip  # noqa: E501
        assert not causal
        return self.logits[tuple(inputs_BL.T)]

    def head_nll(
        self, hidden_MD: Tensor, targets_M: Tensor, weights_M: Tensor, loss: RowLoss, rows: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor]:
        values_M = loss.values(hidden_MD, targets_M, *rows)
        return (values_M * weights_M).sum(), values_M


def sequences(x0_L: npt.NDArray[np.int64], seed: int, n_B: npt.NDArray[np.int64], density: Density | None) -> TrainingBatch:  # fmt: skip  # noqa: E501
    """A micro-batch of one sequence again and again, with the noise of a seed."""
    rows, length = len(n_B), len(x0_L)
    t_B, q_B = drawn_ratio(seed, n_B, "weyl", density, rows)
    p_B = mask_probability(t_B)
    masked_BL = torch.from_numpy(random_mask(seed, n_B, p_B, length))
    scored_M, scored = scored_positions(masked_BL)
    batch = TrainingBatch(
        tokens_BL=torch.from_numpy(x0_L).repeat(rows, 1),
        attention_mask_BL=None,
        masked_BL=masked_BL,
        p_B=torch.from_numpy(p_B).float(),
        ordinals_B=torch.from_numpy(n_B),
        scored_M=scored_M,
        scored=scored,
        denominator=float(rows),
        global_tokens=rows * length,
        density_B=None if q_B is None else torch.from_numpy(q_B).float(),
    )
    return uniform.with_training_noise(batch, seed, Alphabet(SMALL, None))


def check_unbiased(values_R: Array, expected: float, within: float) -> None:
    """Within 4 standard errors, which are small enough to tell something."""
    stderr = values_R.std(ddof=1) / len(values_R) ** 0.5
    assert abs(values_R.mean() - expected) < 4 * stderr and stderr < within * expected


X0_L = np.array([2, 0, 1])


@pytest.mark.parametrize("density", [None, Beta(1.5, 1.2)])
def test_the_training_loss_is_an_unbiased_estimate(density: Density | None) -> None:
    """Of the integral from eps on, over 1 - eps, as the mask probability is uniform there."""
    logits = random_mean(3, seed=4)
    n_B = np.arange(7000, 7000 + 64)
    values = [
        float(uniform.training_loss(TablePredictor(logits), sequences(X0_L, seed, n_B, density), SMALL))
        for seed in range(300)
    ]
    check_unbiased(np.array(values), bound(logits, X0_L, first=MASK_EPS) / (1 - MASK_EPS), within=0.03)


def test_the_validation_loss_is_an_unbiased_estimate_of_all_of_the_bound() -> None:
    logits = random_mean(3, seed=4)
    n_B = np.arange(7000, 7000 + 64)
    values = []
    for seed in range(300):
        batch = uniform.with_validation_noise(validation_batch(X0_L, seed, n_B), Alphabet(SMALL, None))
        values.append(float(uniform.sequence_nll(TablePredictor(logits), batch, SMALL).mean()))
    check_unbiased(np.array(values), bound(logits, X0_L), within=0.015)


def validation_batch(x0_L: npt.NDArray[np.int64], seed: int, n_B: npt.NDArray[np.int64]) -> ValidationBatch:
    tokens_BL = torch.from_numpy(x0_L).repeat(len(n_B), 1)
    return ValidationBatch(
        tokens_BL, torch.zeros_like(tokens_BL).bool(), torch.ones(len(n_B)).bool(), torch.zeros(len(n_B)).long(),
        ordinals_B=torch.from_numpy(n_B), noise_seed=seed,
    )  # fmt: skip


# --- the noise --------------------------------------------------------------------------------------------------------


def test_every_entry_but_mask_is_drawn_as_often() -> None:
    n_B, alphabet = np.arange(400), Alphabet(5, 2)
    tokens_BL = np.zeros((400, 50), dtype=np.int64)
    noisy_BL = replaced_tokens(1, Purpose.TOKEN, n_B, tokens_BL, np.ones((400, 50), dtype=bool), alphabet)
    counts_V = np.bincount(noisy_BL.ravel(), minlength=5)
    assert counts_V[2] == 0
    assert np.square(counts_V[[0, 1, 3, 4]] - 5000).sum() / 5000 < 16.3  # chi-square of 3 degrees, 1 in 1000
    assert Alphabet(5, None).ids(np.array([0.0, 0.999999])).tolist() == [0, 4]
    assert alphabet.size == 4 and alphabet.ids(np.array([1 - 2.0**-53])).tolist() == [4]


def test_the_noise_is_of_the_ordinal() -> None:
    whole = sequences(X0_L, 3, np.arange(8, 16), None)
    part = sequences(X0_L, 3, np.arange(12, 14), None)
    assert torch.equal(whole.noisy_BL[4:6], part.noisy_BL)
    kept_BL = whole.noisy_BL == whole.tokens_BL
    assert kept_BL[~whole.masked_BL].all() and not kept_BL.all()
    valid, some = (
        uniform.with_validation_noise(validation_batch(X0_L, 3, n_B), Alphabet(SMALL, None))
        for n_B in (np.arange(64), np.arange(10, 12))
    )
    assert torch.equal(valid.noisy_BL[10:12], some.noisy_BL) and torch.equal(valid.p_B[10:12], some.p_B)
    t_B = valid.p_B.numpy().astype(float)
    quantiles_B = (t_B + t_B**0.25) / 2
    assert np.histogram(quantiles_B, bins=8, range=(0, 1))[0].min() >= 6  # stratified: about 8 each
    np.testing.assert_allclose(valid.density_B, (1 + t_B**-0.75 / 4) / 2, rtol=1e-5)
    assert not np.allclose(valid.p_B, whole.p_B[0])


# --- the module -------------------------------------------------------------------------------------------------------

SHAPE = {"n_layers": 2, "d_model": 16, "n_heads": 2, "n_kv_heads": 1, "d_ff": 32}
EOS = 18


def module(**settings: object) -> UniformDiffusionModule:
    made = UniformDiffusionModule(SHAPE, 20, 19, EOS, seed=3, **settings)
    made.configure_model()
    return made


def random_batch(rows: int = 3, length: int = 12) -> TrainingBatch:
    n_B = np.arange(rows)
    tokens_BL = np.random.default_rng(0).integers(EOS, size=(rows, length))
    batch = sequences(tokens_BL[0], 5, n_B, None)._replace(tokens_BL=torch.from_numpy(tokens_BL))
    return uniform.with_training_noise(batch, 5, Alphabet(20, 19))


def test_chunked_and_whole_logits_give_one_loss() -> None:
    made, batch = module(), random_batch()
    gradients = {}
    for kind in ("chunked", "plain"):
        made.speed.loss = kind  # type: ignore[assignment]
        loss = made.training_loss(batch)
        gradients[kind] = [loss.detach(), *torch.autograd.grad(loss, list(made.parameters()))]
    for ours, whole in zip(*gradients.values(), strict=True):
        torch.testing.assert_close(ours, whole, rtol=1e-4, atol=1e-5)


def test_padding_is_neither_seen_nor_scored() -> None:
    made, batch = module(), random_batch()
    mask_BL = torch.ones(3, 12, dtype=torch.bool)
    mask_BL[1, 7:] = False
    padded = batch._replace(attention_mask_BL=mask_BL, masked_BL=batch.masked_BL & mask_BL)
    changed = padded._replace(
        tokens_BL=torch.where(mask_BL, batch.tokens_BL, 3), noisy_BL=torch.where(mask_BL, batch.noisy_BL, 4)
    )
    assert float(made.training_loss(changed).detach()) == pytest.approx(float(made.training_loss(padded).detach()))
    assert float(made.training_loss(padded).detach()) != pytest.approx(float(made.training_loss(batch).detach()))


def test_of_a_dialogue_the_response_alone_is_scored() -> None:
    made, batch = module(), random_batch()
    response_BL = torch.zeros(3, 12, dtype=torch.bool)
    response_BL[:, 5:9] = True
    lengths_B = torch.full((3,), 7)  # with padding EOS
    alone = batch._replace(
        response_BL=response_BL, response_lengths_B=lengths_B, denominator=3.0,
        noisy_BL=torch.where(torch.arange(12) < 5, batch.tokens_BL, batch.noisy_BL),
    )  # fmt: skip
    with torch.no_grad():
        values_BL = uniform._bound(made, alone, torch.ones(3, 12), 19)[1]
        expected = (values_BL[:, 5:].sum(dim=1) / 7).mean()
        assert float(made.training_loss(alone)) == pytest.approx(float(expected))
        valid = ValidationBatch(
            batch.tokens_BL, batch.masked_BL, torch.ones(3).bool(), torch.arange(3), response_BL=response_BL,
            attention_mask_BL=(torch.arange(12) < 9).expand(3, -1), ordinals_B=torch.arange(3),
        )  # fmt: skip
        noisy = made.with_noise(valid)
        assert torch.equal(noisy.noisy_BL[~response_BL], batch.tokens_BL[~response_BL])
        values_BL = uniform._bound(made, noisy, torch.ones(3, 12), 19)[1].double()
        torch.testing.assert_close(made.sequence_nll(noisy), (values_BL * response_BL).sum(dim=1) / noisy.density_B)


def test_the_kind_of_the_training_loss_follows_the_density() -> None:
    made = module()
    assert made.training_kind() == made.training_kind(density_setting({"name": "beta", "a": 1.5, "b": 1})) == "bound"
    assert made.training_kind(density_setting({"name": "range", "low": 0.1, "high": 1})) == "surrogate"
    with pytest.raises(UserError, match=r"beta\(a=3,b=1\) falls to 0 at t = 0 faster .* settle; take a density"):
        uniform.check_density(density_setting({"name": "beta", "a": 3, "b": 1}))
    with pytest.raises(UserError, match="compat: llada given, but uniform has no released code here; leave it out"):
        module(compat="llada")


def test_a_flat_mean_gives_the_logarithm_of_the_entries() -> None:
    made = module()
    torch.nn.init.zeros_(made.model.head.weight)
    tokens_BL = torch.from_numpy(np.random.default_rng(1).integers(EOS, size=(512, 12)))
    nothing_BL, rows_B = torch.zeros_like(tokens_BL).bool(), torch.arange(512)
    noisy = made.with_noise(ValidationBatch(tokens_BL, nothing_BL, rows_B >= 0, rows_B, ordinals_B=rows_B))
    with torch.no_grad():
        nats_B = made.sequence_nll(noisy) / 12
    assert abs(float(nats_B.mean()) - log(19)) < 4 * float(nats_B.std()) / 512**0.5 < 0.5


def test_the_values_by_level_are_those_of_the_loss() -> None:
    made, batch = module(), random_batch()
    loss = float(made.training_loss(batch).detach())
    sums, counts = torch.zeros(1), torch.zeros(1)

    class Sums:
        def add(self, levels_N: Tensor, nats_N: Tensor, counts_N: Tensor | None = None) -> None:
            assert counts_N is not None and torch.equal(levels_N, batch.p_B)
            sums.add_(nats_N.sum())
            counts.add_(counts_N.sum())

    uniform.training_loss(made, batch, 19, Sums())
    assert float(counts) == 36 and float(sums) / batch.denominator == pytest.approx(loss, rel=1e-5)
