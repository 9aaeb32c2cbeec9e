"""How many predictions stay, and which: the paper's definitions."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from helpers.sampler_toys import random_model
from llada_lightning.commands.generate import generate_parser
from llada_lightning.generation import Sampling, generate
from llada_lightning.generation.predictor import probability
from llada_lightning.generation.reveal import (
    RULES,
    TIE,
    Rule,
    State,
    above_threshold,
    by_the_reverse_process,
    counts_to_keep,
    most_confident,
    register,
    released_counts_to_keep,
    without_rounding,
)
from llada_lightning.support.errors import UserError

counts = st.integers(0, 300)
steps = st.integers(1, 300)


def kept_after(function, n: int, N: int) -> list[int]:
    each = [int(function(torch.tensor([n]), i, torch.tensor([N]))[0]) for i in range(1, N + 1)]
    return [sum(each[:i]) for i in range(N + 1)]


@given(counts, steps)
def test_algorithm_5_keeps_floor_of_l_times_one_minus_s(n: int, N: int) -> None:
    kept = kept_after(counts_to_keep, n, N)
    assert kept == [math.floor(n * (1 - Fraction(N - i, N))) for i in range(N + 1)]
    assert kept[-1] == n


@given(counts, steps)
def test_released_counts_put_the_remainder_first(n: int, N: int) -> None:
    kept = kept_after(released_counts_to_keep, n, N)
    each = [after - before for before, after in pairwise(kept)]
    assert kept[-1] == n and each == sorted(each, reverse=True) and max(each) - min(each) <= 1


def test_the_two_counts_by_hand() -> None:
    assert kept_after(counts_to_keep, 5, 3) == [0, 1, 3, 5]
    assert kept_after(released_counts_to_keep, 5, 3) == [0, 2, 4, 5]


@given(st.lists(st.tuples(st.floats(0, 1, width=32), st.booleans()), min_size=1, max_size=12), st.integers(0, 12))
def test_the_surest_candidates_stay(row: list[tuple[float, bool]], count: int) -> None:
    confidence, candidate = (torch.tensor([column]) for column in zip(*row, strict=True))
    count = min(count, int(candidate.sum()))
    chosen = most_confident(confidence, candidate, torch.tensor([count]))
    assert int(chosen.sum()) == count and not bool((chosen & ~candidate).any())
    if 0 < count < int(candidate.sum()):
        assert confidence[chosen].min() >= confidence[candidate & ~chosen].max()


def test_of_equals_the_first() -> None:
    chosen = most_confident(torch.tensor([[0.5, 0.5, 0.5]]), torch.tensor([[False, True, True]]), torch.tensor([1]))
    assert chosen.tolist() == [[False, True, False]]


@given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=12), st.floats(0.0, 1.0))
@example([0.0, 3.9e-31], 0.0)
@example([0.9999999, 1.0], 1.0)
def test_a_threshold_always_lets_one_stay(values: list[float], threshold: float) -> None:
    confidence = torch.tensor([values])
    chosen = above_threshold(confidence, torch.ones_like(confidence, dtype=torch.bool), threshold)
    above = confidence > threshold
    extra = chosen & ~above
    assert bool(chosen[above].all()) and chosen.any() and extra.sum() <= 1
    assert (confidence[extra] >= (1 - TIE) * confidence.max() - 1e-30).all()  # the surest, or its equal


def test_rounding_does_not_decide() -> None:
    third = torch.tensor(1 / 3)
    values_RK = torch.stack([third, torch.nextafter(third, torch.tensor(1.0)), third / 2, torch.tensor(-torch.inf)])
    grid_RK = without_rounding(values_RK[None])
    assert grid_RK[0, 0] == grid_RK[0, 1] and abs(float(grid_RK[0, 2]) - 1 / 6) < 1e-5
    assert grid_RK[0, 3] == -torch.inf


def chi_square(seen: Tensor, expected: Tensor) -> float:
    return float(((seen - expected) ** 2 / expected).sum())


def test_random_remasking_keeps_s_over_t_in_expectation() -> None:
    """Algorithm 4: a token is unmasked in each of N steps with equal chance."""
    N, tokens = 8, 40_000
    generator = torch.Generator().manual_seed(0)
    masked, seen = torch.ones(1, tokens, dtype=torch.bool), []
    for step in range(1, N + 1):
        uniform = torch.rand(1, tokens, generator=generator, dtype=torch.float64)
        state = State(masked, torch.tensor([0]), step, torch.tensor([N]), lambda noise=uniform: noise)  # type: ignore[misc]
        chosen = by_the_reverse_process(state)
        t, s = (N - step + 1) / N, (N - step) / N
        left = int(masked.sum())
        assert abs(int((masked & ~chosen).sum()) - left * s / t) <= 4 * math.sqrt(left * s / t * (1 - s / t)) + 1e-9
        seen.append(int(chosen.sum()))
        masked &= ~chosen
    assert not masked.any()
    assert chi_square(torch.tensor(seen), torch.full((N,), tokens / N)) < 24.3  # 7 degrees of freedom, p = 0.001


def test_confidences_by_hand() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.2], [0.4, 0.35, 0.25]]).log()
    tokens = torch.tensor([0, 2])
    p = probability(logits, tokens)
    torch.testing.assert_close(p, torch.tensor([0.5, 0.25]))
    confidences = {name: rule.confidence(logits, p) for name, rule in RULES.items() if rule.confidence is not None}
    assert list(confidences) == ["low_confidence", "margin", "entropy"]
    torch.testing.assert_close(confidences["low_confidence"], p)
    torch.testing.assert_close(confidences["margin"], torch.tensor([0.2, 0.05]))
    entropy = -sum(x * math.log(x) for x in (0.5, 0.3, 0.2))
    assert float(confidences["entropy"][0]) == pytest.approx(-entropy, rel=1e-5)


def left_to_right(state: State) -> Tensor:
    return state.candidates_RK & (state.candidates_RK.cumsum(1) <= state.counts_R[:, None])


def test_a_rule_of_a_users_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """One function and one row: the sampler, its settings and the command line know it."""
    monkeypatch.setitem(RULES, "left_to_right", Rule(choice=left_to_right))
    lm = random_model()
    found = generate(lm, [[5, 6, 7], [8]], Sampling(length=12, steps=4, remasking="left_to_right"))
    for steps in found.step_of_token:
        assert steps == [1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4][: len(steps)]
    same = generate(lm, [[5, 6, 7], [8]], length=12, steps=4, strategy="block_diffusion", block_length=3)
    assert found.forward_passes == same.forward_passes
    assert generate_parser().parse_args(["x", "--remasking", "left_to_right"]).remasking == "left_to_right"
    with pytest.raises(UserError, match="has no such thing"):
        generate(lm, [[5]], length=4, remasking="left_to_right", compat="llada")
    with pytest.raises(UserError, match="threshold: remasking 'left_to_right' knows no confidence"):
        Sampling(remasking="left_to_right", threshold=0.9)


def test_a_name_belongs_to_one_rule() -> None:
    register("margin", RULES["margin"])  # a file that is imported twice does no harm
    with pytest.raises(UserError, match="reveal rule 'margin': there is another one of this name"):
        register("margin", Rule(choice=left_to_right))
