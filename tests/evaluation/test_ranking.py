"""Rankings: right, with no more samples than it takes, and wrong no more often than said."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from test_bound import exact_value, table
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from helpers.small_models import ids, random_model
from llada_lightning.evaluation import ranking
from llada_lightning.evaluation.likelihood import log_likelihood
from llada_lightning.evaluation.ranking import Ranking, rank_candidates
from llada_lightning.support.errors import UserError

LLADA, ARM = random_model(), random_model("arm")


def rank(lm: Any, prompt: list[int], candidates: list[list[int]], confidence: float = 0.99, **options: Any) -> Ranking:
    return rank_candidates(lm, [(prompt, candidates)], confidence, **options)[0]


def questions(number: int, length: int = 10, candidates: int = 4) -> list[tuple[list[int], list[list[int]]]]:
    return [(ids(6, n), [ids(length, 50 * n + c) for c in range(candidates)]) for n in range(number)]


def test_finds_the_best_with_fewer_samples_than_a_fixed_number() -> None:
    asked = questions(8)
    rankings = rank_candidates(LLADA, asked, 0.99, samples=32, max_samples=1024)
    for (prompt, candidates), found in zip(asked, rankings, strict=True):
        exact = log_likelihood(LLADA, [(prompt, c) for c in candidates], samples=1023)  # 2^10 - 1
        assert all(score.exact for score in exact)
        values = [score.mean for score in exact]
        assert not found.settled or found.best == int(np.argmax(values))
        assert all(abs(score.mean - v) < 6 * score.stderr + 1e-4 for score, v in zip(found.scores, values, strict=True))
    assert sum(found.settled for found in rankings) >= 7
    drawn = [score.samples for found in rankings for score in found.scores]
    assert min(drawn) == 32 and np.mean(drawn) < 1024 / 2


def test_one_token_candidates_are_settled_by_one_pass_each() -> None:
    found = rank(LLADA, ids(5, 1), [[1], [2], [3]])
    exact = [score.mean for score in log_likelihood(LLADA, [(ids(5, 1), [token]) for token in (1, 2, 3)])]
    assert found.settled and found.best == int(np.argmax(exact))
    assert [score.samples for score in found.scores] == [1, 1, 1]


@pytest.mark.parametrize("lm", [LLADA, ARM], ids=["llada", "arm"])
def test_questions_together_equal_one_at_a_time(lm: Any) -> None:
    asked = questions(3, length=7)
    together = rank_candidates(lm, asked, samples=16, max_samples=64)
    for (prompt, candidates), found in zip(asked, together, strict=True):
        alone = rank(lm, prompt, candidates, samples=16, max_samples=64)
        assert (alone.best, alone.settled) == (found.best, found.settled)
        assert alone.values == pytest.approx(found.values, rel=1e-5)


def test_a_candidate_given_twice_is_no_endless_question() -> None:
    answer = ids(12, 3)
    found = rank(LLADA, ids(5, 1), [answer, ids(12, 4), answer], samples=16, max_samples=4096)
    assert found.settled and found.best in (0, 1)
    assert found.scores[0] == found.scores[2]
    assert max(score.samples for score in found.scores) <= 512


def test_normalisations_change_what_is_compared() -> None:
    prompt, candidates = ids(6, 1), [ids(2, 1), ids(6, 2)]
    none, token = (rank(LLADA, prompt, candidates, normalisation=n) for n in ("none", "token"))  # type: ignore[arg-type]
    assert [v / n for v, n in zip(none.values, (2, 6), strict=True)] == pytest.approx(token.values)
    byte = rank_candidates(LLADA, [(prompt, candidates)], normalisation="byte", byte_lengths=[[4, 3]])[0]
    assert [v / n for v, n in zip(none.values, (4, 3), strict=True)] == pytest.approx(byte.values)


def test_an_arm_is_settled_at_once() -> None:
    prompt, candidates = ids(6, 1), [ids(n, n) for n in (2, 5, 9)]
    found = rank(ARM, prompt, candidates, normalisation="token")
    assert found.settled and found.best == int(np.argmax(found.values))
    assert all(score.method == "autoregressive" for score in found.scores)


@pytest.mark.parametrize(("candidates", "first"), [(([5], ids(20, 3)), 0), ((ids(20, 3), [5]), 1)])
def test_an_exact_candidate_beside_a_sampled_one_is_not_settled_at_once(candidates: Any, first: int) -> None:
    """Sizes make their values nearly equal, so one look cannot part them."""
    means = [score.mean for score in log_likelihood(LLADA, [([1], c) for c in candidates], samples=2048)]
    sizes = [[round(-1e6 * mean) for mean in means]]
    found = rank_candidates(
        LLADA, [([1], candidates)], normalisation="byte", byte_lengths=sizes, samples=16, max_samples=16
    )[0]
    assert found.scores[first].exact and not found.scores[1 - first].exact
    assert not found.settled


def test_replicates_that_coincide_put_nobody_out() -> None:
    same, varied = np.full(16, 3.0), np.full(16, 2.0) + np.arange(16) / 100
    assert not ranking._exceeds(same - np.full(16, 2.0), 0.01)
    assert ranking._exceeds(same - varied, 0.01)
    assert ranking._exceeds(np.array([0.1]), 0.01)  # both exact


@pytest.mark.parametrize(("length", "max_samples"), [(3, 16), (4, 16), (5, 16), (6, 64), (7, 128)])
def test_short_candidates_are_settled_rightly_however_close_they_are(
    monkeypatch: pytest.MonkeyPatch, length: int, max_samples: int
) -> None:
    """On tables of random numbers with nearly equal exact values, through the ranking itself."""
    for pair in range(4):
        tables = [table(length, 10 * pair + n) for n in (0, 1)]
        gap = (exact_value(tables[0]) - exact_value(tables[1]) - 0.01) / length
        tables[1] += gap * (tables[1] != 0)  # the second is worse by 0.01
        by_first = dict(enumerate(tables))

        def tabled(scorer: Any, bounds: Any, samples: int, by_first: Any = by_first) -> None:
            for bound in bounds:
                masks = bound.plan(samples)
                bound.add(masks, by_first[bound.request.continuation[0]][masks @ (1 << np.arange(length))])

        monkeypatch.setattr(ranking, "draw", tabled)
        for seed in range(10):
            candidates = [[n, *range(length - 1)] for n in (0, 1)]
            found = rank(LLADA, [pair], candidates, max_samples=max_samples, seed=seed)
            assert found.settled and found.best == 0
            assert found.scores[0].mean - found.scores[1].mean == pytest.approx(0.01)


def test_the_chance_of_a_wrong_winner_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Candidates that are nearly alike, looked at five times: the sequential test, on simulated replicates."""
    rng = np.random.default_rng(0)
    truth = np.array([0.0, -0.05, -0.05, -0.1])

    class Simulated:
        exact = False

        def __init__(self, mean: float) -> None:
            self.mean, self.values = mean, np.empty(0)

        def draw(self, total: int, common: np.ndarray) -> None:
            own = rng.normal(self.mean, 1.0, size=total - len(self.values))
            self.values = np.concatenate([self.values, own + common[len(self.values) : total]])

    wrong = settled = 0
    trials, looks, confidence = 500, 5, 0.9
    for _ in range(trials):
        bounds = [Simulated(mean) for mean in truth]
        question = ranking._Question(bounds, np.ones(4), [0, 1, 2, 3])  # type: ignore[arg-type]
        common = rng.normal(size=16 * 2**looks)
        for look in range(looks):
            for c in question.contenders:
                bounds[c].draw(16 << look, common)
            question.look((1 - confidence) / (looks * 3))
        wrong += 0 not in question.contenders
        settled += len(question.contenders) == 1
    assert wrong / trials < (1 - confidence) + 3 * math.sqrt(0.09 / trials)
    # A test of each look by itself at the same confidence is wrong more often: the correction is needed.
    naive = 0
    for _ in range(trials):
        bounds = [Simulated(mean) for mean in truth]
        question = ranking._Question(bounds, np.ones(4), [0, 1, 2, 3])  # type: ignore[arg-type]
        for look in range(looks):
            for c in question.contenders:
                bounds[c].draw(16 << look, np.zeros(16 * 2**looks))
            question.look(1 - confidence)
        naive += 0 not in question.contenders
    assert naive / trials > 0.2


def test_a_winner_of_a_model_is_wrong_no_more_often_than_said() -> None:
    """Two candidates of nearly equal value, many seeds."""
    prompt = ids(4, 1)
    pool = [ids(8, seed) for seed in range(60)]
    values = [score.mean for score in log_likelihood(LLADA, [(prompt, c) for c in pool], samples=255)]
    order = np.argsort(values)
    gaps = np.diff(np.array(values)[order])
    low = int(np.argmin(np.where(gaps > 0.02, gaps, np.inf)))
    close = [pool[order[low]], pool[order[low + 1]]]
    found = [rank(LLADA, prompt, close, 0.9, samples=16, max_samples=128, seed=seed) for seed in range(150)]
    wrong = sum(f.settled and f.best == 0 for f in found)
    assert wrong / len(found) < 0.1 + 3 * math.sqrt(0.09 / len(found))


@pytest.mark.parametrize(
    ("asked", "options", "message"),
    [
        ([([1], [])], {}, "question 0 has no candidates"),
        ([([1], [[2], []])], {"normalisation": "token"}, "question 0, candidate 1 is empty"),
        ([([1], [[2], []])], {}, "question 0, candidate 1 is empty and would be the best always"),
        ([([1], [[2], [3]])], {"normalisation": "word"}, "normalisation is 'word'"),
        ([([1], [[2], [3]])], {"confidence": 1.0}, "confidence is 1.0"),
        ([([1], [[2], [3]])], {"samples": 15}, "samples is 15; a ranking needs at least 16"),
        ([([1], [[2], [39]])], {}, r"question 0, candidate 1: continuation: token 0 is \[MASK\]"),
    ],
)
def test_mistakes_are_told(asked: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        rank_candidates(LLADA, asked, **options)


def test_a_candidate_of_a_special_token_has_no_text() -> None:
    tokenizer = Tokenizer(WordLevel({f"word{i}": i for i in range(40)}, unk_token="word0"))
    tokenizer.add_special_tokens(["word38"])
    lm = replace(LLADA, tokenizer=tokenizer)
    with pytest.raises(UserError, match="question 0, candidate 1 has no text"):
        rank(lm, [1], [[2], [38]], normalisation="byte")


def test_a_prompt_too_long_is_cut_when_asked() -> None:
    found = rank(replace(LLADA, context_length=12), ids(20, 1), [ids(4, 1), ids(6, 2)], truncate="left")
    assert [score.truncated for score in found.scores] == [14, 14]
    rest = ids(20, 1)[14:]  # the same for both, though the first would have left two more
    alone = rank(LLADA, rest, [ids(4, 1), ids(6, 2)])
    assert found.values == pytest.approx(alone.values, rel=1e-5)
