"""Block diffusion: equal to `llada` with one block, to one pass for each block, and unbiased by enumeration."""

from __future__ import annotations

from itertools import product
from math import comb

import numpy as np
import pytest
import torch
from torch import Tensor

from llada_lightning.checkpoints.language_model import LanguageModel
from llada_lightning.compute.flops import MASK_EPS
from llada_lightning.compute.shapes import Shape
from llada_lightning.evaluation.likelihood import log_likelihood
from llada_lightning.evaluation.policy import Policy
from llada_lightning.model.patterns import block_causal
from llada_lightning.objectives import block, get_objective, llada
from llada_lightning.objectives.batches import TrainingBatch, ValidationBatch, scored_positions
from llada_lightning.objectives.densities import Beta
from llada_lightning.objectives.forward_process import (
    drawn_ratio,
    mask_probability,
    random_mask,
    validation_mask,
)
from llada_lightning.objectives.llada import LossWeight
from llada_lightning.training.modules import BlockDiffusionModule, LladaModule
from llada_lightning.training.validation import policy_nll

LENGTH, VOCAB_SIZE, MASK, EOS = 12, 20, 19, 18
SHAPE = Shape(n_layers=2, d_model=16, n_heads=2, n_kv_heads=1, d_ff=32)


def module(kind: type = BlockDiffusionModule, **settings: object) -> LladaModule:
    made = kind(vars(SHAPE), VOCAB_SIZE, MASK, EOS, seed=3, **settings)
    made.configure_model()
    return made


def batches(block_length: int | None, rows: int = 3, seed: int = 5) -> tuple[TrainingBatch, ValidationBatch]:
    n_B = np.arange(40, 40 + rows)
    tokens_BL = torch.from_numpy(np.random.default_rng(seed).integers(EOS, size=(rows, LENGTH)))
    t_B, _ = drawn_ratio(seed, n_B, "weyl", None, 4, block_length, LENGTH)
    p_B = mask_probability(t_B)
    masked_BL = torch.from_numpy(random_mask(seed, n_B, p_B, LENGTH, block_length))
    scored_M, scored = scored_positions(masked_BL)
    training = TrainingBatch(
        tokens_BL=tokens_BL,
        attention_mask_BL=None,
        masked_BL=masked_BL,
        p_B=torch.from_numpy(p_B).float(),
        ordinals_B=torch.from_numpy(n_B),
        scored_M=scored_M,
        scored=scored,
        denominator=float(rows * LENGTH),
        global_tokens=rows * LENGTH,
    )
    validation = ValidationBatch(
        tokens_BL=tokens_BL,
        masked_BL=torch.from_numpy(validation_mask(seed, n_B, LENGTH, block_length)),
        counted_B=torch.ones(rows, dtype=torch.bool),
        documents_B=torch.arange(rows),
    )
    return training, validation


def gradients(made: LladaModule, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(made.parameters())))


def test_one_block_is_llada_to_the_last_bit() -> None:
    ours, theirs = module(block_length=LENGTH), module(LladaModule)
    for mine, other in zip(batches(LENGTH), batches(None), strict=True):
        assert torch.equal(mine.masked_BL, other.masked_BL)
    (training, validation), (training_of_llada, validation_of_llada) = batches(LENGTH), batches(None)
    assert training.p_B.shape == (3, 1) and torch.equal(training.p_B[:, 0], training_of_llada.p_B)
    mine, other = ours.training_loss(training), theirs.training_loss(training_of_llada)
    assert torch.equal(mine, other)
    for grad, of_llada in zip(gradients(ours, mine), gradients(theirs, other), strict=True):
        assert torch.equal(grad, of_llada)
    assert torch.equal(ours.sequence_nll(validation), theirs.sequence_nll(validation_of_llada))


@pytest.mark.parametrize("block_length", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("packed", [False, True])
def test_one_pass_is_a_pass_for_each_block_behind_the_clean_ones(block_length: int, packed: bool) -> None:
    made, (training, _) = module(block_length=block_length), batches(block_length)
    if packed:
        documents_BL = torch.tensor([0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 2, 2]).expand(3, -1)
        training = training._replace(documents_BL=documents_BL)
    with torch.no_grad():
        hidden_BLD = block._hidden(made, training, block_length).view(3, LENGTH, -1)
        for begin in range(0, LENGTH, block_length):
            end = begin + block_length
            noisy_BK = training.tokens_BL.masked_fill(training.masked_BL, MASK)[:, begin:end]
            alone_BLD = made.model.hidden(
                torch.cat([training.tokens_BL[:, :begin], noisy_BK], dim=1),
                causal=False,
                pattern=block_causal(block_length),
                documents_BL=None if training.documents_BL is None else training.documents_BL[:, :end],
            )
            torch.testing.assert_close(hidden_BLD[:, begin:end], alone_BLD[:, begin:], rtol=1e-5, atol=1e-5)


def test_padding_is_seen_by_none() -> None:
    made, (training, _) = module(block_length=4), batches(4)
    mask_BL = torch.ones(3, LENGTH, dtype=torch.bool)
    mask_BL[1, 7:] = False
    padded = training._replace(attention_mask_BL=mask_BL, masked_BL=training.masked_BL & mask_BL)
    changed_BL = torch.where(mask_BL, padded.tokens_BL, 3)
    with torch.no_grad():
        before, after = (block._hidden(made, own, 4) for own in (padded, padded._replace(tokens_BL=changed_BL)))
    torch.testing.assert_close(before.view(3, LENGTH, -1)[mask_BL], after.view(3, LENGTH, -1)[mask_BL])


# --- by enumeration ---------------------------------------------------------------------------------------------------

WORDS, X0_L = 3, np.array([2, 0, 1, 1])


def nll_table(seed: int) -> np.ndarray:
    """(2^L, L): nll of each token of X0 where a set of tokens is masked, each block given the clean ones before it.

    An arbitrary predictor: what is masked in other blocks changes nothing, so the table is filled block by block.
    """
    return -np.log(np.random.default_rng(seed).dirichlet(np.ones(WORDS), size=(2**4, 4)).max(axis=-1))


def within(nll_SL: np.ndarray, masked_L: np.ndarray, block_length: int) -> np.ndarray:
    """(L,) the nll of each token: by the set of masked tokens of its own block."""
    found_L = np.empty(4)
    for begin in range(0, 4, block_length):
        own = masked_L.copy()
        own[:begin] = own[begin + block_length :] = False
        found_L[begin : begin + block_length] = nll_SL[int((own << np.arange(4)).sum())][begin : begin + block_length]
    return found_L


def exact_bound(nll_SL: np.ndarray, block_length: int) -> float:
    """Eq. 14 within each block, over every l and every set of l of its tokens."""
    total = 0.0
    for begin in range(0, 4, block_length):
        for bits in product([False, True], repeat=block_length):
            if any(bits):
                masked_L = np.zeros(4, dtype=bool)
                masked_L[begin : begin + block_length] = bits
                count = sum(bits)
                own = within(nll_SL, masked_L, block_length)[masked_L].sum()
                total += block_length / count * own / block_length / comb(block_length, count)
    return total


@pytest.mark.parametrize("block_length", [1, 2, 4])
@pytest.mark.parametrize("density", [None, Beta(1.5, 1.0)])
def test_the_training_loss_and_the_validation_loss_are_unbiased(
    block_length: int, density: Beta | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    nll_SL, runs, window = nll_table(1), 200, 32
    training_R, validation_R = [], []

    class Table:
        """A model whose hidden states hold the nll of each token."""

        def head_nll(self, hidden_M1: Tensor, targets_M: Tensor, weights_M: Tensor) -> tuple[Tensor, Tensor]:
            return (hidden_M1[:, 0] * weights_M).sum(), hidden_M1[:, 0]

    def hidden(
        model: object, batch: TrainingBatch | ValidationBatch, block_length: int, rows_M: Tensor | None = None
    ) -> Tensor:
        rows = [within(nll_SL, masked_L, block_length) for masked_L in batch.masked_BL.numpy()]
        hidden_N1 = torch.from_numpy(np.stack(rows)).reshape(-1, 1)
        return hidden_N1 if rows_M is None else hidden_N1[rows_M]

    monkeypatch.setattr(block, "_hidden", hidden)
    n_B = np.arange(700, 700 + window)
    tokens_BL = torch.from_numpy(X0_L).expand(window, -1)
    for seed in range(runs):
        t_B, q_B = drawn_ratio(seed, n_B, "weyl", density, 16, block_length, 4)
        masked_BL = torch.from_numpy(random_mask(seed, n_B, mask_probability(t_B), 4, block_length))
        scored_M, scored = scored_positions(masked_BL)
        training = TrainingBatch(
            tokens_BL, None, masked_BL, torch.from_numpy(mask_probability(t_B)), torch.from_numpy(n_B), scored_M,
            scored, float(window), 4 * window, density_B=None if q_B is None else torch.from_numpy(q_B),
        )  # fmt: skip
        training_R.append(float(block.training_loss(Table(), training, block_length, LossWeight())))  # type: ignore[arg-type]
        validation = ValidationBatch(
            tokens_BL,
            torch.from_numpy(validation_mask(seed, n_B, 4, block_length)),
            torch.ones(window, dtype=torch.bool),
            torch.zeros(window, dtype=torch.long),
        )
        validation_R.append(float(block.sequence_nll(Table(), validation, block_length).mean()))  # type: ignore[arg-type]
    expected = exact_bound(nll_SL, block_length)
    for values, bias in ((training_R, MASK_EPS * nll_SL.sum()), (validation_R, 0.0)):
        error = np.std(values, ddof=1) / np.sqrt(runs)
        assert abs(np.mean(values) - expected) < 4 * error + bias + 1e-12
    if block_length == 1:  # one order, one mask: the bound is the value itself
        assert np.std(validation_R) < 1e-12
        assert expected == pytest.approx(sum(nll_SL[1 << i, i] for i in range(4)))


def test_each_block_has_a_ratio_of_its_own_and_blocks_are_stratified() -> None:
    t_BK, _ = drawn_ratio(0, np.arange(64), "weyl", None, 64, 4, 16)
    assert t_BK.shape == (64, 4) and len(np.unique(t_BK)) == 256
    counts = np.histogram(t_BK, bins=16, range=(0, 1))[0]
    assert counts.min() >= 15 and counts.max() <= 17
    each = np.corrcoef(t_BK.T)[np.triu_indices(4, 1)]
    assert np.abs(each).max() < 0.75  # one ratio for all blocks would give 1


def test_flops_lie_between_those_of_llada_and_those_of_two_copies() -> None:
    ours, theirs = get_objective("block"), get_objective("llada")
    whole = ours.flops_per_token(SHAPE, VOCAB_SIZE, 64, MASK_EPS, block_length=64)
    assert whole == theirs.flops_per_token(SHAPE, VOCAB_SIZE, 64, MASK_EPS)
    for block_length in (1, 4, 16):
        found = ours.flops_per_token(SHAPE, VOCAB_SIZE, 64, MASK_EPS, block_length=block_length)
        keys_of_noisy = np.mean([(q // block_length + 1) * block_length for q in range(64)])
        keys_of_clean = np.mean([(q // block_length + 1) * block_length for q in range(64 - block_length)])
        copied = (64 - block_length) / 64
        assert found.flops_attention == pytest.approx(
            12 * SHAPE.n_layers * SHAPE.d_model * (keys_of_noisy + copied * keys_of_clean)
        )
        assert found.flops_copy == pytest.approx(copied * found.flops_6nd)
        assert found.flops_head == whole.flops_head


@pytest.mark.parametrize("weight", ["ce", "clipped", "per_masked_token"])
def test_with_another_weight_it_is_a_surrogate(weight: str) -> None:
    limit = {"loss_weight_limit": 5.0} if weight == "clipped" else {}
    made, (training, _) = module(block_length=4, loss_weight=weight, **limit), batches(4)
    assert made.training_kind() == "surrogate"
    assert torch.isfinite(made.training_loss(training))


def test_llada_weighs_as_before() -> None:
    training, _ = batches(None)
    assert torch.equal(LossWeight().divisors(training), training.p_B)
    assert llada.training_loss(module(LladaModule), training).ndim == 0


@pytest.mark.parametrize("name", ["left_to_right", "confidence"])
def test_a_validation_under_a_policy_decodes_all_blocks_at_once(name: str) -> None:
    made, (_, validation) = module(block_length=4), batches(4)
    lm = LanguageModel("block", made.model, MASK, EOS, context_length=LENGTH, block_length=4)
    with torch.no_grad():
        nll_B = policy_nll(made, validation, Policy(name))
    scores = log_likelihood(lm, [([], row) for row in validation.tokens_BL.tolist()], policy=Policy(name))
    assert nll_B.tolist() == pytest.approx([-score.mean for score in scores], abs=1e-4)
    short = validation._replace(tokens_BL=validation.tokens_BL[:, :10], masked_BL=validation.masked_BL[:, :10])
    with torch.no_grad():
        nll_B = policy_nll(made, short, Policy(name))
    scores = log_likelihood(lm, [([], row) for row in short.tokens_BL.tolist()], policy=Policy(name))
    # The sampler knows where a text ends: its last block is as long as what is left.
    assert nll_B.tolist() == pytest.approx([-score.mean for score in scores], abs=1e-4)
