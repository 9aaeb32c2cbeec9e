"""With a predictor that is exact, one token a step draws from the model's distribution (paper, Sec. 2.4 and A.2)."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from helpers.sampler_toys import MASK, ExactPredictor, random_model, toy
from llada_lightning.generation import generate

DRAWS = 3000
BOUND = 54.1
"""Of chi-square with 26 degrees of freedom, p = 0.001."""


def chi_square(answers: list[list[int]], expected: dict[tuple[int, ...], float]) -> float:
    seen = Counter(map(tuple, answers))
    assert set(seen) <= set(expected)
    return sum((seen[text] - len(answers) * p) ** 2 / (len(answers) * p) for text, p in expected.items())


@pytest.mark.parametrize(
    "settings",
    [
        {"remasking": "random_count"},
        {"strategy": "autoregressive"},
        {"block_length": 1},
        {"remasking": "random", "steps": 150},
    ],
    ids=str,
)
def test_one_token_a_step_draws_from_the_models_distribution(settings: dict[str, Any]) -> None:
    """Algorithm 4 takes two tokens in one step of 150 in two answers of a hundred."""
    model = ExactPredictor()
    result = generate(toy(model), [[]] * DRAWS, length=3, temperature=1.0, **settings)
    assert chi_square(result.tokens, model.expected()) < BOUND


def test_all_tokens_in_one_step_do_not() -> None:
    """So the test above can fail: a single step draws each token from its marginal."""
    model = ExactPredictor()
    result = generate(toy(model), [[]] * DRAWS, length=3, steps=1, temperature=1.0, remasking="random_count")
    assert chi_square(result.tokens, model.expected()) > 3 * BOUND


def test_a_lower_temperature_is_less_diverse() -> None:
    model = ExactPredictor()
    settings: dict[str, Any] = {"length": 3, "remasking": "random_count"}
    kinds = [
        len(set(map(tuple, generate(toy(model), [[]] * 300, temperature=t, **settings).tokens)))
        for t in (1.0, 0.2, 0.0)
    ]
    assert kinds[0] > kinds[1] > kinds[2] >= 1


def test_steps_of_random_remasking_are_equally_likely() -> None:
    result = generate(random_model(), [[]] * 500, length=16, steps=4, remasking="random")
    seen = torch.tensor([step for row in result.step_of_token for step in row]).bincount(minlength=5)[1:]
    expected = seen.sum() / 4
    assert float(((seen - expected) ** 2 / expected).sum()) < 16.3  # 3 degrees of freedom, p = 0.001


def test_gaps_are_filled_from_the_conditional_distribution() -> None:
    model = ExactPredictor()
    draws = generate(toy(model), [[MASK, 3, MASK]] * DRAWS, infill=True, temperature=1.0, remasking="random_count")
    given = {text: p for text, p in model.expected().items() if text[1] == 3}
    share = sum(given.values())
    assert chi_square(draws.tokens, {text: p / share for text, p in given.items()}) < 26.1  # 8 degrees of freedom
