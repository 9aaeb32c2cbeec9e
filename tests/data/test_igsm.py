"""iGSM: every problem is checked from its text by a solver that never sees the generator's graph."""

from __future__ import annotations

from collections import Counter
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llada_lightning.data.igsm import AmbiguousError, problems, question, solution, solve
from llada_lightning.support.errors import UserError


def test_a_thousand_problems_are_solved_and_their_answers_spread() -> None:
    drawn = list(islice(problems(1), 1000))
    assert all(solve(question(p)) == p.answer for p in drawn)
    assert {len(p.steps) for p in drawn} == {4, 5, 6}
    counts = Counter(p.answer for p in drawn)
    assert set(counts) == {0, 1, 2, 3, 4}
    assert max(counts.values()) <= 300


@given(st.integers(0, 2**32), st.sampled_from([4, 5, 6]), st.booleans())
def test_solver_against_generator(seed: int, steps: int, test: bool) -> None:
    problem = next(problems(seed, steps=steps, test=test))
    assert len(problem.steps) == steps
    assert solve(question(problem)) == problem.answer
    assert solution(problem).endswith(f"\n#### {problem.answer}")


def test_every_step_is_needed() -> None:
    for problem in islice(problems(2), 300):
        used = {term for step in problem.steps for term in step.terms}
        assert {step.parameter for step in problem.steps[:-1]} <= used


def test_the_same_seed_gives_the_same_problems_and_no_test_problem_is_trained_on() -> None:
    train = [question(p) for p in islice(problems(3), 500)]
    assert train == [question(p) for p in islice(problems(3), 500)]
    assert train != [question(p) for p in islice(problems(4), 500)]
    test = {question(p) for p in islice(problems(3, test=True), 500)}
    assert not test & set(train)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("The number of each A's B equals 1. The number of each A's B equals 2. How many B does A have?", "twice"),
        ("The number of each A's B equals each A's C. How many B does A have?", "never stated"),
        ("The number of each A's B equals each A's B. How many B does A have?", "through itself"),
        ("The number of each A's B equals 1.", "nothing is asked"),
    ],
)
def test_an_ambiguous_text_is_refused(text: str, fault: str) -> None:
    with pytest.raises(AmbiguousError, match=fault):
        solve(text)


def test_another_number_of_steps_is_refused() -> None:
    with pytest.raises(UserError, match="give 4 to 6"):
        next(problems(0, steps=7))
