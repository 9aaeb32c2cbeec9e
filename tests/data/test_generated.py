"""Generated corpora: problems that a solver of their text alone checks, and facts that have one order only."""

from __future__ import annotations

import re
from collections import Counter
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llada_lightning.data.corpora import open_corpus
from llada_lightning.data.generated import END, JOINER, MOST_FACTS, FactsSource, problems, question, solution
from llada_lightning.support.errors import UserError

_FACT = re.compile(r"The number of each ([^.]+?) equals ([^.]+)\.")
_ASKED = re.compile(r"How many ([^?]+) does ([^?]+) have\?$")
_KINDS = {"Classroom": ("Studio", "Room", "Lab"), "Backpack": ("Backpack", "Daypack"),
          "Stationery": ("Pencil", "Eraser", "Notebook", "Ruler")}  # fmt: skip


class AmbiguousError(ValueError):
    """The text gives no answer, or more than one."""


def solve(question: str) -> int:
    """The answer, 0 to 4. Raises AmbiguousError: a quantity stated twice, never stated, or stated through itself."""
    facts: dict[str, str] = {}
    for left, right in _FACT.findall(question):
        if left in facts:
            raise AmbiguousError(f"'{left}' is stated twice")
        facts[left] = right
    asked = _ASKED.search(question)
    if asked is None:
        raise AmbiguousError("nothing is asked")
    return _value(f"{asked[2]}'s {asked[1]}", facts, ())


def _value(wanted: str, facts: dict[str, str], path: tuple[str, ...]) -> int:
    if wanted in path:
        raise AmbiguousError(f"'{wanted}' is stated through itself")
    path = (*path, wanted)
    parent, _, child = wanted.partition("'s ")
    if child in _KINDS:
        members = [left for left in facts if left.startswith(f"{parent}'s ") and left.endswith(_KINDS[child])]
        if not members:
            raise AmbiguousError(f"'{wanted}' has no members")
        return sum(_value(member, facts, path) for member in members) % 5
    if wanted not in facts:
        raise AmbiguousError(f"'{wanted}' is never stated")
    times = re.fullmatch(r"(\d+) times as much as (.+)", facts[wanted])
    factor, rest = (int(times[1]), times[2]) if times else (1, facts[wanted])
    terms = rest.removeprefix("the sum of ").split(" and ")
    return factor * sum(int(t) if t.isdigit() else _value(t.removeprefix("each "), facts, path) for t in terms) % 5


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


@given(st.integers(1, MOST_FACTS), st.integers(0, 2**40))
def test_each_fact_is_stated_in_one_order_only(count: int, seed: int) -> None:
    source = FactsSource(count, seed)
    facts = source.facts()
    assert len({fact.first for fact in facts}) == len({fact.second for fact in facts}) == len(facts) == count
    text = "\n".join(source.documents())
    for fact in facts[:5]:
        assert text.count(f"{fact.first}{JOINER}{fact.second}{END}") == 6
        assert f"{fact.second}{JOINER}{fact.first}" not in text
    firsts = [fact.first.startswith("the ") for fact in facts]
    assert sum(firsts) == count // 2, "both forms of a sentence must be familiar"


def test_the_corpus_is_known_by_count_and_seed() -> None:
    assert list(open_corpus("facts:7@3").documents()) == list(open_corpus("facts:7@3").documents())
    digests = {open_corpus(f"facts:{spec}").identity["digest"] for spec in ("7@3", "7@4", "8@3", "7")}
    assert len(digests) == 4


@pytest.mark.parametrize("spec", ["facts:0", "facts:x", "facts:100000", "facts:3@"])
def test_a_count_of_facts_that_cannot_be_is_refused(spec: str) -> None:
    with pytest.raises(UserError, match="with a count of 1 to"):
        open_corpus(spec)
