"""On data of known entropy no loss goes below it, exact ones reach it, and bounds lie above."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from helpers.markov import EOS, MASK, MarkovSource, source, trained, validation
from llada_lightning.checkpoints.language_model import LanguageModel
from llada_lightning.evaluation.any_order import any_order_log_likelihood
from llada_lightning.evaluation.policy import Policy
from llada_lightning.training.language_module import LanguageModule
from llada_lightning.training.modules import ArmModule, BlockDiffusionModule, LladaModule, UniformDiffusionModule
from llada_lightning.training.validation import policy_nll

STEPS, SEQUENCES, LENGTH = 800, 2048, 8
CASES: dict[str, tuple[type[LanguageModule], dict[str, Any]]] = {
    "arm": (ArmModule, {}),
    "llada": (LladaModule, {}),
    "block 1": (BlockDiffusionModule, {"block_length": 1}),
    "block 4": (BlockDiffusionModule, {"block_length": 4}),
    "uniform": (UniformDiffusionModule, {}),
}


def test_the_source_has_the_entropy_that_it_says() -> None:
    data = source(LENGTH)
    nll_B = data.nll(data.tokens(list(range(20_000))))
    assert abs(nll_B.mean() - data.entropy) < 4 * nll_B.std() / 20_000**0.5 < 0.02 * data.entropy
    assert torch.equal(data.tokens([5, 6]), data.tokens(list(range(10)))[5:7])


def gap(nats_B: torch.Tensor, data: MarkovSource, tokens_BL: torch.Tensor) -> tuple[float, float]:
    """How far the mean lies above what the source itself gives, per token, and its standard error."""
    more_B = (nats_B.numpy() - data.nll(tokens_BL)) / LENGTH
    return float(more_B.mean()), float(more_B.std(ddof=1)) / len(more_B) ** 0.5


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_no_loss_lies_below_the_entropy(name: str) -> None:
    kind, settings = CASES[name]
    data, unseen = source(LENGTH), source(LENGTH, seed=1)
    module = trained(kind, data, STEPS, **settings)
    batch = validation(module, unseen, SEQUENCES * (8 if module.facts.replaces else 1))  # one level of noise each
    with torch.no_grad():
        nats_B = module.sequence_nll(batch).double()
        found, stderr = gap(nats_B, unseen, batch.tokens_BL)
        flat = np.log(4) - unseen.entropy / LENGTH  # of a model that has learned nothing
        print(f"{name}: {found:.4f} +- {stderr:.4f} nats/token above the source; flat {flat:.3f}")
        assert found > -4 * stderr
        assert found < 0.5 * flat, "it has learned something"
        if name == "uniform":
            assert stderr < 0.02 and found < 0.1
        if name in ("arm", "block 1"):
            assert found < 0.02 and stderr < 0.01
        if name in ("llada", "block 4"):  # the exact value of a policy, and that over all orders of each block
            exact, error = gap(policy_nll(module, batch, Policy("left_to_right")), unseen, batch.tokens_BL)
            print(f"  left to right {exact:.4f} +- {error:.4f}")
            assert -4 * error < exact < 0.05
            lm = LanguageModel(module.objective, module.model, MASK, EOS, LENGTH, block_length=module.block_length)
            requests = [([], row) for row in batch.tokens_BL[:128].tolist()]
            scores = any_order_log_likelihood(lm, requests, orders=4)
            whole_B = -torch.tensor([np.nan if score.exact is None else score.exact for score in scores])
            over_all, error = gap(whole_B.double(), unseen, batch.tokens_BL[:128])
            print(f"  over all orders {over_all:.4f} +- {error:.4f}")
            assert -4 * error < over_all < 0.05
