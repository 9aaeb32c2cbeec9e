"""Likelihood in random order: the exact value is the mean over all orders, and lies between the two bounds."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch

from helpers.small_models import exact_bound, ids, random_model
from llada_lightning.checkpoints.language_model import LanguageModel
from llada_lightning.evaluation.any_order import any_order_log_likelihood, drawn_order
from llada_lightning.evaluation.likelihood import log_likelihood
from llada_lightning.support.errors import UserError

TINY = random_model(vocab_size=4, scale=3.0, mask_token_id=3, eos_token_id=2)
LLADA = random_model(scale=2.0)


def step(lm: LanguageModel, prompt: list[int], answer: list[int], masked: tuple[int, ...], i: int) -> float:
    """log p of one of the masked tokens."""
    tokens = [*prompt, *(lm.mask_token_id if j in masked else token for j, token in enumerate(answer))]
    logits_V = lm.logits(torch.tensor([tokens]))[0, len(prompt) + i].double()
    logits_V[lm.mask_token_id] = -math.inf
    return float(logits_V.log_softmax(-1)[answer[i]])


def mean_over_orders(lm: LanguageModel, prompt: list[int], answer: list[int]) -> float:
    """log of the mean over all orders, each decoded step by step."""
    totals = [
        sum(step(lm, prompt, answer, tuple(sorted(order[j:])), order[j]) for j in range(len(order)))
        for order in itertools.permutations(range(len(answer)))
    ]
    return math.log(np.mean(np.exp(totals)))


@pytest.mark.parametrize("length", [1, 2, 4])
def test_the_exact_value_is_the_mean_over_all_orders(length: int) -> None:
    prompt, answer = ids(3, 10), ids(length, 11)
    [score] = any_order_log_likelihood(LLADA, [(prompt, answer)], orders=4)
    assert score.exact == pytest.approx(mean_over_orders(LLADA, prompt, answer), abs=1e-5)
    assert (score.tokens, score.orders) == (length, 4)


@pytest.mark.parametrize("length", [2, 3, 4])
def test_the_probabilities_of_all_texts_add_up_to_one(length: int) -> None:
    texts = [([2], list(text)) for text in itertools.product(range(3), repeat=length)]
    scores = any_order_log_likelihood(TINY, texts, orders=4)
    assert sum(math.exp(score.exact or 0.0) for score in scores) == pytest.approx(1.0, abs=1e-5)


def test_the_exact_value_lies_above_the_bound_of_eq_6_and_below_the_tangent() -> None:
    """Both estimates are unbiased: over many draws their means are on their sides, within four standard errors."""
    prompt, answer = ids(3, 20), ids(5, 21)
    scores = [any_order_log_likelihood(LLADA, [(prompt, answer)], orders=16, seed=seed)[0] for seed in range(40)]
    exact, bound = scores[0].exact, exact_bound(LLADA, prompt, answer)
    assert exact is not None and bound < exact - 0.1
    [enumerated] = log_likelihood(LLADA, [(prompt, answer)], samples=64)
    assert enumerated.mean == pytest.approx(bound, abs=1e-4)  # the same bound
    lowers, uppers = (np.array([getattr(score, name) for score in scores]) for name in ("lower", "upper"))
    assert abs(lowers.mean() - bound) < 4 * lowers.std(ddof=1) / math.sqrt(len(lowers))
    assert uppers.mean() > exact - 4 * uppers.std(ddof=1) / math.sqrt(len(uppers))
    assert np.mean([score.lower_stderr**2 for score in scores]) == pytest.approx(lowers.var(ddof=1), rel=0.5)


def test_more_orders_close_the_tangent_bound_and_not_the_bound_of_eq_6() -> None:
    prompt, answer = ids(3, 20), ids(5, 21)
    [score] = any_order_log_likelihood(LLADA, [(prompt, answer)], orders=2000)
    assert score.exact is not None
    assert abs(score.upper - score.exact) < 4 * score.upper_stderr + 0.02
    assert score.lower < score.exact - 0.1


def test_longer_texts_have_the_bounds_only() -> None:
    requests = [(ids(3, 30), ids(9, 31)), ([], ids(9, 31)), (ids(3, 30), ids(2, 33))]
    together = any_order_log_likelihood(LLADA, requests, orders=8)
    assert [score.exact is None for score in together] == [True, True, False]
    assert all(math.isfinite(score.upper) and score.upper_stderr > 0 for score in together)
    [alone] = any_order_log_likelihood(LLADA, requests[1:2], orders=8)
    assert alone.lower == pytest.approx(together[1].lower, abs=1e-4)


def test_orders_are_uniform() -> None:
    found = Counter(tuple(drawn_order(0, 7, k, 3).tolist()) for k in range(6000))
    assert set(found) == set(itertools.permutations(range(3)))
    assert all(abs(count - 1000) < 4 * math.sqrt(6000 * 5 / 36) for count in found.values())


def test_what_cannot_be_scored_is_one_line() -> None:
    for lm, request, orders, words in (
        (random_model("arm"), ([1], [2]), 8, r"arm has no \[MASK\] and one order only"),
        (LLADA, ([1], [2]), 3, "orders is 3; it must be at least 4"),
        (LLADA, ([1], []), 8, "request 0: the continuation is empty"),
    ):
        with pytest.raises(UserError, match=words):
            any_order_log_likelihood(lm, [request], orders)
