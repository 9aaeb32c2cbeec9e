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

from llada_lightning.checkpoints.language_model import LanguageModel, load_model
from llada_lightning.evaluation.bound import all_masks
from llada_lightning.evaluation.likelihood import log_likelihood

GOLDEN = Path(__file__).parents[1] / "model" / "golden_llada_mha"
CASES = json.loads((GOLDEN / "log_likelihood.json").read_text())
MASK = 319


def name(case: dict[str, Any]) -> str:
    return f"length {len(case['answer'])}"


@pytest.fixture(scope="module")
def released() -> LanguageModel:
    return load_model(GOLDEN)


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
