"""The losses of packed documents are those of each document alone."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from llada_lightning.data.datasets import document_numbers
from llada_lightning.objectives.batches import TrainingBatch, ValidationBatch, scored_positions
from llada_lightning.training.modules import ArmModule, LanguageModule, LladaModule

WORDS, EOS, MASK, LENGTH = 23, 0, 22, 40
SHAPE = {"n_layers": 2, "d_model": 32, "n_heads": 4, "n_kv_heads": 2, "d_ff": 48}
ENDS = (0, 8, 9, 30, LENGTH)
"""Of the documents: one is EOS alone."""


@pytest.fixture(params=[ArmModule, LladaModule])
def module(request: pytest.FixtureRequest) -> LanguageModule:
    module = request.param(shape=SHAPE, vocab_size=WORDS, mask_token_id=MASK, eos_token_id=EOS)
    module.configure_model()
    return module


def packed() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens_1L = torch.randint(1, MASK, (1, LENGTH), generator=generator)
    tokens_1L[0, torch.tensor(ENDS[1:]) - 1] = EOS
    masked_1L = torch.rand(1, LENGTH, generator=generator) < 0.5
    masked_1L[0, ENDS[1:3]] = True
    return tokens_1L, masked_1L


def batch_of(tokens_BL: Tensor, masked_BL: Tensor, documents_BL: Tensor | None = None) -> TrainingBatch:
    p_B, ordinals_B = torch.full((len(tokens_BL),), 0.5), torch.arange(len(tokens_BL))
    scored = scored_positions(masked_BL)
    return TrainingBatch(tokens_BL, None, masked_BL, p_B, ordinals_B, *scored, float(LENGTH), LENGTH, documents_BL)


def parts(tokens_1L: Tensor, masked_1L: Tensor) -> list[tuple[Tensor, Tensor]]:
    return [(tokens_1L[:, a:b], masked_1L[:, a:b]) for a, b in pairwise(ENDS)]


def test_the_training_loss_of_packed_documents_is_that_of_each_alone(module: LanguageModule) -> None:
    tokens_1L, masked_1L = packed()
    documents_1L = document_numbers(tokens_1L, EOS)
    assert documents_1L[0, [0, 7, 8, 9, 29, 30, 39]].tolist() == [0, 0, 1, 2, 2, 3, 3]
    together = module.training_loss(batch_of(tokens_1L, masked_1L, documents_1L))
    alone = torch.stack([module.training_loss(batch_of(*part)) for part in parts(tokens_1L, masked_1L)]).sum()
    across = module.training_loss(batch_of(tokens_1L, masked_1L))
    assert together.item() == pytest.approx(alone.item(), rel=1e-5)
    assert abs(across.item() - alone.item()) > 1e-3
    found, expected = (torch.autograd.grad(loss, list(module.parameters())) for loss in (together, alone))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_the_exact_likelihood_of_packed_documents_is_the_sum_of_each_alone() -> None:
    module = ArmModule(shape=SHAPE, vocab_size=WORDS, mask_token_id=MASK, eos_token_id=EOS)
    module.configure_model()
    tokens_1L, masked_1L = packed()

    def nll(tokens_BL: Tensor, documents_BL: Tensor | None = None) -> float:
        one = torch.ones(1, dtype=torch.bool)
        batch = ValidationBatch(tokens_BL, masked_1L, one, torch.zeros(1, dtype=torch.long), documents_BL)
        return float(module.sequence_nll(batch).detach())

    alone = sum(nll(tokens_BL) for tokens_BL, _ in parts(tokens_1L, masked_1L))
    assert nll(tokens_1L, document_numbers(tokens_1L, EOS)) == pytest.approx(alone, rel=1e-5)
    assert abs(nll(tokens_1L) - alone) > 1e-3
