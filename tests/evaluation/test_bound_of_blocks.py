"""Likelihoods by a model that predicts in blocks, against brute force on its logits."""

from __future__ import annotations

import math
from itertools import combinations, permutations

import pytest
import torch

from helpers.small_models import MASK, ids, random_model
from llada_lightning.checkpoints.language_model import LanguageModel
from llada_lightning.evaluation.any_order import any_order_log_likelihood
from llada_lightning.evaluation.likelihood import log_likelihood
from llada_lightning.evaluation.policy import Policy
from llada_lightning.evaluation.ranking import rank_candidates
from llada_lightning.support.errors import UserError


def block_model(block_length: int) -> LanguageModel:
    return random_model("block", block_length=block_length)


def brute_force(lm: LanguageModel, prompt: list[int], answer: list[int]) -> float:
    """The bound of Eq. 6 within each block, with its sign changed, over every l and every mask of it."""
    assert lm.block_length is not None
    text, total = [*prompt, *answer], 0.0
    begin = len(prompt)
    while begin < len(text):
        end = min(len(text), (begin // lm.block_length + 1) * lm.block_length)
        for count in range(1, end - begin + 1):
            sums = []
            for masked in combinations(range(begin, end), count):
                tokens = [MASK if i in masked else token for i, token in enumerate(text[:end])]
                logits_LV = lm.logits(torch.tensor([tokens]))[0].clone()
                logits_LV[:, MASK] = -math.inf
                log_p_LV = logits_LV.double().log_softmax(-1)
                sums.append(float(sum(log_p_LV[i, text[i]] for i in masked)))
            total += sum(sums) / len(sums) / count
        begin = end
    return total


@pytest.mark.parametrize(("block_length", "prompt_length", "length"), [(1, 3, 4), (2, 3, 5), (4, 0, 8), (4, 6, 9)])
def test_short_blocks_are_enumerated(block_length: int, prompt_length: int, length: int) -> None:
    lm, prompt, answer = block_model(block_length), ids(prompt_length, 1), ids(length, 2)
    [score] = log_likelihood(lm, [(prompt, answer)], samples=16)
    assert score.exact and score.stderr == 0 and score.tokens == length
    assert score.mean == pytest.approx(brute_force(lm, prompt, answer), abs=1e-4)
    assert score.kind == ("exact" if block_length == 1 else "bound")


def test_samples_of_long_blocks_hold_the_value() -> None:
    lm, prompt, answer = block_model(6), ids(2, 1), ids(16, 2)
    [exact] = log_likelihood(lm, [(prompt, answer)], samples=64)
    scores = [log_likelihood(lm, [(prompt, answer)], samples=16, exact=False, seed=seed)[0] for seed in range(40)]
    assert exact.exact and not any(score.exact for score in scores)
    means = torch.tensor([score.mean for score in scores])
    assert abs(float(means.mean()) - exact.mean) < 4 * float(means.std()) / math.sqrt(40)
    errors = torch.tensor([score.stderr for score in scores])
    assert 0.6 < float(errors.square().mean().sqrt() / means.std()) < 1.7


def test_what_is_scored_together_is_scored_as_alone() -> None:
    lm, requests = block_model(4), [(ids(n, n), ids(7 - n, 10 + n)) for n in range(6)]
    together = log_likelihood(lm, [*requests, ([1], [])], samples=64)
    assert together[-1].mean == 0 and together[-1].method == "empty"
    for request, score in zip(requests, together, strict=False):
        assert log_likelihood(lm, [request], samples=64)[0].mean == pytest.approx(score.mean, abs=1e-5)


def test_candidates_are_ranked() -> None:
    lm, candidates = block_model(4), [ids(6, seed) for seed in range(4)]
    [ranking] = rank_candidates(lm, [(ids(3, 9), candidates)])
    values = [brute_force(lm, ids(3, 9), candidate) for candidate in candidates]
    assert ranking.settled and ranking.best == max(range(4), key=values.__getitem__)


@pytest.mark.parametrize("name", ["left_to_right", "confidence", "margin"])
@pytest.mark.parametrize("tokens_per_step", [1, 2])
def test_a_policy_decodes_block_by_block(name: str, tokens_per_step: int) -> None:
    policy = Policy(name, tokens_per_step)
    lm, prompt, answer = block_model(4), ids(6, 1), ids(9, 2)
    text = [*prompt, *answer]
    parts = [(text[:6], text[6:8]), (text[:8], text[8:12]), (text[:12], text[12:])]
    whole, *each = log_likelihood(lm, [(prompt, answer), *parts], policy=policy)
    assert whole.mean == pytest.approx(sum(score.mean for score in each), abs=1e-5)
    assert (whole.kind, whole.tokens, whole.samples) == (policy.kind, 9, sum(score.samples for score in each))
    if tokens_per_step == 1:
        assert each[2].mean == pytest.approx(math.fsum(one_by_one(lm, *parts[2], name)), abs=1e-5)


def one_by_one(lm: LanguageModel, prompt: list[int], answer: list[int], name: str) -> list[float]:
    """The log-probabilities of the tokens of a block that is the last of the text, in the order of a policy."""
    masked, found = list(range(len(answer))), []
    while masked:
        tokens = [*prompt, *(MASK if i in masked else token for i, token in enumerate(answer))]
        logits_LV = lm.logits(torch.tensor([tokens]))[0].clone()
        logits_LV[:, MASK] = -math.inf
        p_LV = logits_LV.double().softmax(-1)[len(prompt) :]
        first_LK = p_LV.topk(2, dim=-1).values
        sure_L = {
            "left_to_right": -torch.arange(len(answer)),
            "confidence": first_LK[:, 0],
            "margin": first_LK[:, 0] - first_LK[:, 1],
        }[name]
        best = max(masked, key=sure_L.tolist().__getitem__)
        found.append(math.log(float(p_LV[best, answer[best]])))
        masked.remove(best)
    return found


def test_blocks_of_one_token_have_one_value() -> None:
    lm, request = block_model(1), (ids(3, 1), ids(5, 2))
    [bound] = log_likelihood(lm, [request])
    for name in ("left_to_right", "confidence"):
        [score] = log_likelihood(lm, [request], policy=Policy(name))
        assert score.mean == pytest.approx(bound.mean, abs=1e-5)
    [orders] = any_order_log_likelihood(lm, [request], orders=4)
    assert orders.exact == pytest.approx(bound.mean, abs=1e-5)


def test_the_exact_value_of_blocks_is_the_mean_over_all_orders_of_each() -> None:
    lm, prompt, answer = block_model(3), ids(2, 1), ids(7, 2)
    [score] = any_order_log_likelihood(lm, [(prompt, answer)], orders=8)
    text, expected = [*prompt, *answer], 0.0
    for begin, end in ((2, 3), (3, 6), (6, 9)):
        values = []
        for order in permutations(range(begin, end)):
            log_p = 0.0
            for step, position in enumerate(order):
                tokens = [MASK if i in order[step:] else token for i, token in enumerate(text[:end])]
                logits_LV = lm.logits(torch.tensor([tokens]))[0].clone()
                logits_LV[:, MASK] = -math.inf
                log_p += float(logits_LV.double().log_softmax(-1)[position, text[position]])
            values.append(math.exp(log_p))
        expected += math.log(sum(values) / len(values))
    assert score.exact == pytest.approx(expected, abs=1e-5)
    assert brute_force(lm, prompt, answer) < expected
    with pytest.raises(UserError, match="policy confidence: 4 tokens a step given, and the longest text has 3"):
        log_likelihood(lm, [(prompt, answer)], policy=Policy("confidence", 4))
