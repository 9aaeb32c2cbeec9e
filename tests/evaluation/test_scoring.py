"""Perplexity of long texts: every token once, errors over documents."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.small_models import EOS, ids, random_model
from llada_lightning.evaluation.likelihood import log_likelihood, windows
from llada_lightning.evaluation.scoring import rolling_log_likelihood
from llada_lightning.objectives.standard_errors import ratio_and_stderr
from llada_lightning.support.errors import UserError

LLADA, ARM = random_model(), random_model("arm")
TEXTS = [ids(100, 1), ids(20, 2), ids(48, 3)]


@given(length=st.integers(1, 200), window=st.integers(1, 50), data=st.data())
def test_windows_score_every_token_once_behind_what_stands_before_it(length: int, window: int, data: Any) -> None:
    stride = data.draw(st.integers(1, window))
    text = list(range(length))
    pairs = list(windows(text, window, stride))
    assert [token for _, scored in pairs for token in scored] == text
    for context, scored in pairs:
        assert len(context) + len(scored) <= window
        assert list(context) + list(scored) == text[scored[0] - len(context) : scored[-1] + 1]
    assert all(len(context) == window - stride for context, _ in pairs[1:])


@pytest.mark.parametrize("lm", [LLADA, ARM], ids=["llada", "arm"])
def test_the_sum_of_its_windows(lm: Any) -> None:
    found = rolling_log_likelihood(lm, TEXTS, 40, 30, text_bytes=[300, 70, 150], samples=16)
    pairs = [pair for text in TEXTS for pair in windows(text, 40, 30)]
    scores = log_likelihood(lm, pairs, samples=16)
    nats = -sum(score.mean for score in scores)
    assert found.nats_per_token == pytest.approx(nats / 168)
    assert found.perplexity == pytest.approx(math.exp(nats / 168))
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / 520)
    assert (found.tokens, found.documents, found.windows, found.window, found.context) == (168, 3, 6, 40, 10)
    assert found.kind == ("exact" if lm.objective == "arm" else "bound")
    spread = math.sqrt(sum(score.stderr**2 for score in scores)) / 168
    assert found.monte_carlo_stderr == pytest.approx(spread) and (spread == 0) == (lm.objective == "arm")


def test_equal_documents_share_their_monte_carlo_error() -> None:
    once = rolling_log_likelihood(LLADA, [TEXTS[1]], samples=16)
    assert once.monte_carlo_stderr > 0
    many = rolling_log_likelihood(LLADA, [TEXTS[1]] * 5, samples=16)
    assert many.monte_carlo_stderr == pytest.approx(once.monte_carlo_stderr)


def test_one_window_of_an_arm_is_its_whole_likelihood() -> None:
    whole = log_likelihood(ARM, [([], TEXTS[2])])[0].mean
    found = rolling_log_likelihood(ARM, TEXTS[2:])
    assert found.nats_per_token == pytest.approx(-whole / 48)
    assert math.isnan(found.stderr) and found.bits_per_byte is None


def test_context_changes_what_is_said_of_a_token() -> None:
    without = rolling_log_likelihood(ARM, TEXTS, 20)
    context = rolling_log_likelihood(ARM, TEXTS, 20, 5)
    assert without.context == 0 and context.context == 15
    assert without.nats_per_token != pytest.approx(context.nats_per_token, rel=1e-4)


def test_empty_documents_are_passed_over() -> None:
    found = rolling_log_likelihood(ARM, [[], TEXTS[0], []], text_bytes=[9, 300, 9])
    assert (found.documents, found.bytes) == (1, 300)


def test_the_error_of_a_ratio_is_that_of_repeated_draws() -> None:
    rng = np.random.default_rng(0)
    ratios, errors = [], []
    for _ in range(400):
        sizes = rng.integers(50, 200, size=40)
        ratio, error = ratio_and_stderr((sizes * rng.normal(3, 0.5, size=40)).tolist(), sizes.tolist())
        ratios.append(ratio)
        errors.append(error)
    assert np.mean(ratios) == pytest.approx(3, abs=0.02)
    assert np.sqrt(np.mean(np.square(errors))) == pytest.approx(np.std(ratios), rel=0.15)
    assert math.isnan(ratio_and_stderr([], [])[0]) and math.isnan(ratio_and_stderr([1.0], [2.0])[1])


@pytest.mark.parametrize(
    ("texts", "window", "stride", "message"),
    [
        ([[1]], 49, None, "window is 49; it must lie between 1 and the context length, 48"),
        ([[1]], 0, None, "window is 0"),
        ([[1]], 10, 11, "stride is 11"),
        ([[1]], 10, 0, "stride is 0"),
        ([[], []], None, None, "hold no token"),
    ],
)
def test_mistakes_are_told(texts: Any, window: int | None, stride: int | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        rolling_log_likelihood(LLADA, texts, window, stride)


def test_ids_of_eos_within_a_text_are_scored_as_any_other() -> None:
    assert rolling_log_likelihood(ARM, [[1, EOS, 2]]).tokens == 3
