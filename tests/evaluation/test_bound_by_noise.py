"""The likelihood of a model of uniform-state diffusion: the bound of a continuation by enumeration, and its error."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
import torch

from helpers.small_models import ids, random_model
from llada_lightning.checkpoints.language_model import LanguageModel
from llada_lightning.evaluation.any_order import any_order_log_likelihood
from llada_lightning.evaluation.likelihood import log_likelihood
from llada_lightning.evaluation.policy import Policy
from llada_lightning.evaluation.ranking import rank_candidates
from llada_lightning.objectives.uniform import integrand, levels
from llada_lightning.support.errors import UserError


def small() -> LanguageModel:
    """Three words, of which 2 is EOS, and [MASK] 3."""
    return random_model("uniform", scale=1.5, vocab_size=4, mask_token_id=3, eos_token_id=2)


def exact_bound(lm: LanguageModel, prompt: list[int], answer: list[int]) -> float:
    """The bound of the log-likelihood over all noisy continuations, by quadrature over t = u^3."""
    nodes_T, weights_T = np.polynomial.legendre.leggauss(60)
    z_NL = torch.tensor(list(product(range(3), repeat=len(answer))))
    logits_NLV = lm.logits(torch.cat([torch.tensor(prompt).expand(len(z_NL), -1), z_NL], dim=1))[
        :, len(prompt) :
    ].double()
    logits_NLV[..., 3] = -torch.inf
    x_NL, total = torch.tensor(answer).expand_as(z_NL), 0.0
    for u, weight in zip((nodes_T + 1) / 2, weights_T / 2, strict=True):
        t = float(u**3)
        probability_N = ((1 - t) * (z_NL == x_NL) + t / 3).prod(dim=1)
        t_N, c_N = levels(torch.full((z_NL.numel(),), t, dtype=torch.float64), 3)
        values_N = integrand(logits_NLV.flatten(0, 1), x_NL.flatten(), z_NL.flatten(), t_N, c_N)
        total += float(weight * 3 * u**2 * (probability_N * values_N.view_as(z_NL).sum(dim=1)).sum())
    return -total


def test_the_bound_is_unbiased_and_its_error_honest() -> None:
    lm, prompt, answer = small(), [0, 1], [1, 0]
    expected = exact_bound(lm, prompt, answer)
    scores = [log_likelihood(lm, [(prompt, answer)], samples=128, seed=seed)[0] for seed in range(80)]
    means = np.array([score.mean for score in scores])
    stderr = means.std(ddof=1) / len(means) ** 0.5
    assert abs(means.mean() - expected) < 4 * stderr and stderr < 0.06
    squares = np.mean([score.stderr**2 for score in scores])
    assert means.var(ddof=1) == pytest.approx(squares, rel=0.6)
    [first, *_] = scores
    assert (first.kind, first.method, first.exact, first.samples) == ("bound", "monte carlo", False, 128)


def test_only_the_continuation_is_replaced() -> None:
    lm = random_model("uniform")
    prompt, answer = ids(5, 1), ids(4, 2)
    seen = []
    hidden = lm.model.hidden
    lm.model.hidden = lambda tokens, **named: seen.append(tokens) or hidden(tokens, **named)  # type: ignore[method-assign]
    log_likelihood(lm, [(prompt, answer)], samples=32)
    rows_BL = torch.cat(seen)
    assert (rows_BL[:, :5] == torch.tensor(prompt)).all() and (rows_BL[:, 5:] != torch.tensor(answer)).any()
    assert (rows_BL != 39).all()


def test_a_score_is_of_its_request_alone() -> None:
    lm = random_model("uniform")
    requests = [(ids(5, 1), ids(4, 2)), (ids(2, 3), ids(9, 4)), ([], ids(3, 5)), (ids(5, 1), [])]
    together = log_likelihood(lm, requests, samples=20)
    for request, score in zip(requests, together, strict=True):
        [alone] = log_likelihood(lm, [request], samples=20)
        assert alone.mean == pytest.approx(score.mean, rel=1e-5)
        assert alone.samples == score.samples
    assert (together[-1].mean, together[-1].method, together[-1].exact) == (0.0, "empty", True)
    assert math.isnan(log_likelihood(lm, requests[:1], samples=1)[0].stderr)


def test_samples_are_added_until_the_error_is_reached() -> None:
    lm, request = random_model("uniform", scale=1.0), (ids(5, 1), ids(4, 2))
    [rough] = log_likelihood(lm, [request], samples=16)
    [fine] = log_likelihood(lm, [request], samples=16, target_stderr=rough.stderr / 3)
    assert fine.stderr <= rough.stderr / 3 and fine.samples > rough.samples
    assert fine.mean == pytest.approx(rough.mean, abs=4 * rough.stderr)


def test_candidates_are_ranked() -> None:
    lm = small()
    candidates = [[0, 0, 0], [1, 1, 1], [0, 1, 0]]
    [ranking] = rank_candidates(lm, [([0, 1], candidates)], confidence=0.9, max_samples=256)
    values = [exact_bound(lm, [0, 1], candidate) for candidate in candidates]
    assert not ranking.settled or ranking.best == int(np.argmax(values))


def test_what_it_lacks_is_one_line() -> None:
    lm, request = random_model("uniform"), (ids(2, 1), ids(2, 2))
    with pytest.raises(UserError, match=r"policy left_to_right@1: uniform has no .MASK. and no order .* the bound"):
        log_likelihood(lm, [request], policy=Policy("left_to_right"))
    with pytest.raises(UserError, match=r"any order: uniform has no .MASK. and no order of its tokens; its log_lik"):
        any_order_log_likelihood(lm, [request])
    with pytest.raises(UserError, match=r"cfg_scale is 1\.0, but guidance .* needs .MASK., which uniform has not"):
        log_likelihood(lm, [request], cfg_scale=1.0)
