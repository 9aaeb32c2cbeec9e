"""Likelihoods agree with the authors' released Monte Carlo estimator, as far as that is unbiased.

The released l stands on a grid of (by its default) 16 points that is rounded half to even: over a continuation of 3
tokens l = 1 comes 17 times in 48 and l = 3 only 15 times, over 8 tokens even l three times as often as odd ones. So its
expected value is another one than Eq. 6. It can be computed, and the released numbers agree with it.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from llada_lightning.checkpoints.language_model import LanguageModel
from llada_lightning.evaluation.likelihood import log_likelihood
from llada_lightning.evaluation.masks import all_masks
from llada_lightning.model import Transformer
from llada_lightning.scaling.shapes import Shape

GOLDEN = Path(__file__).parents[1] / "model" / "golden_llada_mha"
CASES = json.loads((GOLDEN / "log_likelihood.json").read_text())
MASK = 319

MODEL_NAMES = {"wte": "embedding", "ln_f": "norm", "ff_out": "head"}
BLOCK_NAMES = {
    "attn_norm": "attention_norm",
    "q_proj": "attention.q_proj",
    "k_proj": "attention.k_proj",
    "v_proj": "attention.v_proj",
    "attn_out": "attention.out_proj",
    "ff_norm": "feed_forward_norm",
    "ff_proj": "feed_forward.gate_proj",
    "up_proj": "feed_forward.up_proj",
    "ff_out": "feed_forward.down_proj",
}


def name(case: dict[str, Any]) -> str:
    return f"length {len(case['answer'])}"


def our_name(released: str) -> str:
    parts = released.removeprefix("model.transformer.").split(".")
    if parts[0] == "blocks":
        return f"blocks.{parts[1]}.{BLOCK_NAMES[parts[2]]}.weight"
    return f"{MODEL_NAMES[parts[0]]}.weight"


@pytest.fixture(scope="module")
def released() -> LanguageModel:
    config = json.loads((GOLDEN / "config.json").read_text())
    names = ("n_layers", "d_model", "n_heads", "n_kv_heads", "mlp_hidden_size")
    model = Transformer(Shape(*(config[name] for name in names)), config["vocab_size"], config["rope_theta"])
    weights = load_file(GOLDEN / "model.safetensors")
    model.load_state_dict({our_name(name): weight for name, weight in weights.items()})
    return LanguageModel("llada", model.eval(), MASK, 318, 64, compat="llada")


def released_shares(length: int, batch: int = 16) -> np.ndarray:
    """How often the released grid gives each l."""
    counts = np.zeros(length)
    for start in range(1, length + 1):
        grid = np.round(start + np.arange(batch) * (length / batch)).astype(int)
        counts += np.bincount((grid - 1) % length, minlength=length)
    return counts / counts.sum()


def mean_by_count(lm: LanguageModel, prompt: list[int], answer: list[int]) -> np.ndarray:
    """(L,) the mean of Eq. 6's summand over all masks of l tokens."""
    length, masks = len(answer), all_masks(len(answer))
    tokens_NL = torch.where(torch.from_numpy(masks), MASK, torch.tensor(answer))
    tokens_NT = torch.cat([torch.tensor(prompt).expand(len(masks), -1), tokens_NL], dim=1)
    log_p_NLV = lm.logits(tokens_NT)[:, len(prompt) :].double().log_softmax(-1)
    log_p_NL = log_p_NLV[:, torch.arange(length), torch.tensor(answer)].numpy()
    counts, sums = masks.sum(axis=1), (log_p_NL * masks).sum(axis=1)
    return np.array([length / c * sums[counts == c].mean() for c in range(1, length + 1)])


@pytest.mark.parametrize("case", CASES[:3], ids=name)
def test_enumerated_and_the_released_bias_explained(released: LanguageModel, case: dict[str, Any]) -> None:
    score = log_likelihood(released, [(case["prompt"], case["answer"])], samples=255)[0]
    means_L = mean_by_count(released, case["prompt"], case["answer"])
    assert score.exact and score.mean == pytest.approx(means_L.mean(), rel=1e-6)
    expected = means_L @ released_shares(len(means_L))
    assert abs(expected - case["mean"]) < 2 * case["stderr"] + 1e-6 * abs(expected)


@pytest.mark.parametrize("case", [case for case in CASES if len(case["answer"]) != 3], ids=name)
def test_within_the_errors_of_the_released_estimator(released: LanguageModel, case: dict[str, Any]) -> None:
    score = log_likelihood(released, [(case["prompt"], case["answer"])], samples=255)[0]
    assert abs(score.mean - case["mean"]) < 4 * math.hypot(score.stderr, case["stderr"]) + 1e-6 * abs(case["mean"])
    released_error = case["stderr"] * math.sqrt(3072 / 255)  # of as many masks
    assert score.stderr < released_error / 2 or len(case["answer"]) == 1


def test_without_a_logit_of_mask_the_numbers_differ(released: LanguageModel) -> None:
    request = [(CASES[0]["prompt"], CASES[0]["answer"])]
    other = log_likelihood(replace(released, compat=None), request)[0]
    assert other.mean > CASES[0]["mean"] + 1e-4
