"""Corpora that a program makes: iGSM's mathematics problems, and invented facts. Equal seeds give equal documents."""

from __future__ import annotations

import hashlib
import math
import random
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import ClassVar, TypeVar

import numpy as np

from llada_lightning.objectives.noise import Purpose, random_words
from llada_lightning.support.errors import UserError

Source = TypeVar("Source", bound="GeneratedSource")


@dataclass(frozen=True)
class GeneratedSource(ABC):
    """A corpus of ``count`` problems or facts, written ``KIND:COUNT[@SEED]``."""

    kind: ClassVar[str]
    version: ClassVar[int] = 1
    """The version of what a seed gives; another version is another corpus."""

    most: ClassVar[float] = math.inf
    """The largest count."""

    count: int
    seed: int

    @classmethod
    def of(cls: type[Source], source: str) -> Source:
        """Returns the corpus that is written so; a UserError for another way of writing, or a count out of range."""
        found = re.fullmatch(r"\w+:(\d+)(?:@(\d+))?", source)
        if found is None or not 1 <= int(found[1]) <= cls.most:
            limit = f"with a count of 1 to {cls.most}" if cls.most < math.inf else f"such as {cls.kind}:100000"
            raise UserError(f"source '{source}': write {cls.kind}:COUNT or {cls.kind}:COUNT@SEED, {limit}")
        return cls(int(found[1]), int(found[2] or 0))

    @abstractmethod
    def documents(self) -> Iterator[str]:
        """Yields the documents of the corpus."""


# --- iGSM: a problem is a graph of quantities modulo 5 ----------------------------------------------------------------

MODULUS = 5
CATEGORIES = ("School", "Classroom", "Backpack", "Stationery")
ITEMS = (
    ("Lakeview High", "Oakfield Primary", "Riverside College", "Hillcrest Academy"),
    ("Dance Studio", "Film Room", "Science Lab", "Art Room"),
    ("Hiking Backpack", "School Daypack", "Canvas Backpack", "Sports Backpack"),
    ("Pencil", "Eraser", "Notebook", "Ruler"),
)
FEWEST_STEPS, MOST_STEPS = 4, 6
_TEST_SHARE = 10  # one structure in so many is kept for testing


@dataclass(frozen=True, order=True)
class Parameter:
    """The number of ``child`` that each ``parent`` has; of an abstract one, a category, the sum over its items."""

    parent: str
    child: str
    abstract: bool = False


@dataclass(frozen=True)
class Step:
    """One quantity: ``factor * (constant + sum of terms)`` modulo 5; an abstract one is the plain sum."""

    parameter: Parameter
    terms: tuple[Parameter, ...]
    constant: int
    factor: int
    value: int


@dataclass(frozen=True)
class Problem:
    """A problem as a graph of quantities.

    Args:
        steps: The quantities in the order of the solution; the last one is asked for.
        stated: The indices of the steps in the order in which the question states them.
    """

    steps: tuple[Step, ...]
    stated: tuple[int, ...]

    @property
    def answer(self) -> int:
        return self.steps[-1].value

    @property
    def held_out(self) -> bool:
        """Whether the problem is a test problem: by a hash of its structure, whatever the order of its statements."""
        structure = sorted((s.parameter, sorted(s.terms), s.constant, s.factor) for s in self.steps)
        digest = hashlib.sha256(repr((structure, self.steps[-1].parameter)).encode()).digest()
        return int.from_bytes(digest[:8], "big") % _TEST_SHARE == 0


def problems(seed: int, *, steps: int | None = None, test: bool = False) -> Iterator[Problem]:
    """Yields problems of a number of steps (None: 4 to 6) without end, the same for the same seed.

    Training and test streams share no problem, whatever their seeds.

    Raises:
        UserError: The number of steps is out of range.
    """
    if steps is not None and not FEWEST_STEPS <= steps <= MOST_STEPS:
        raise UserError(f"an iGSM problem of {steps} steps: give {FEWEST_STEPS} to {MOST_STEPS}")
    draw = random.Random(f"igsm {seed}")
    while True:
        problem = _draw_problem(draw, steps or draw.randint(FEWEST_STEPS, MOST_STEPS))
        if problem.held_out == test:
            yield problem


def _draw_problem(draw: random.Random, count: int) -> Problem:
    """Draws a problem whose last step needs every other: at most two quantities are unused at a time."""
    steps: list[Step] = []
    unused: list[Parameter] = []
    while len(steps) < count:
        remaining = count - len(steps)
        whole = _category_to_sum(steps, unused)
        if not steps or (len(unused) == 1 and remaining > 1 and draw.random() < 0.4):
            step = Step(_new_parameter(draw, steps), (), value := draw.randrange(MODULUS), 1, value)
            unused.append(step.parameter)
        elif whole and draw.random() < 0.7:
            step = _summed(whole, steps)
            unused = [whole]
        else:
            step = _combined(draw, steps, unused)
            unused = [step.parameter]
        steps.append(step)
    stated = [i for i, step in enumerate(steps) if not step.parameter.abstract]
    draw.shuffle(stated)
    return Problem(tuple(steps), tuple(stated))


def _new_parameter(draw: random.Random, steps: list[Step]) -> Parameter:
    """A pair of neighbouring categories not used yet; never one that would change a sum already taken."""
    taken = {step.parameter for step in steps}
    closed = {(p.parent, p.child) for p in taken if p.abstract}
    free = [
        Parameter(parent, child)
        for level in range(len(ITEMS) - 1)
        for parent in ITEMS[level]
        if (parent, CATEGORIES[level + 1]) not in closed
        for child in ITEMS[level + 1]
    ]
    return draw.choice([p for p in free if p not in taken])


def _category_to_sum(steps: list[Step], unused: list[Parameter]) -> Parameter | None:
    """The abstract quantity that would use up all of ``unused``, if there is one not yet taken."""
    if not unused or any(p.abstract for p in unused) or len({p.parent for p in unused}) != 1:
        return None
    parent = unused[0].parent
    level = next(i for i, items in enumerate(ITEMS) if parent in items)
    return Parameter(parent, CATEGORIES[level + 1], abstract=True)


def _summed(whole: Parameter, steps: list[Step]) -> Step:
    members = [s for s in steps if s.parameter.parent == whole.parent and not s.parameter.abstract]
    return Step(whole, tuple(s.parameter for s in members), 0, 1, sum(s.value for s in members) % MODULUS)


def _combined(draw: random.Random, steps: list[Step], unused: list[Parameter]) -> Step:
    values = {s.parameter: s.value for s in steps}
    terms = list(unused)
    others = [p for p in values if p not in terms]
    if len(terms) == 1 and others and draw.random() < 0.5:
        terms.append(draw.choice(others))
    # A factor of 0 or 5 would make every other step needless.
    constant, factor = (draw.randrange(1, MODULUS), 1) if draw.random() < 0.5 else (0, draw.randrange(2, MODULUS))
    value = factor * (constant + sum(values[p] for p in terms)) % MODULUS
    return Step(_new_parameter(draw, steps), tuple(terms), constant, factor, value)


_LETTERS = "abcdefghijklmnopqrstuvwxyz"


def name(parameter: Parameter) -> str:
    """Returns the name of a quantity, such as "Art Room's Pencil"."""
    return f"{parameter.parent}'s {parameter.child}"


def question(problem: Problem) -> str:
    """Returns the text of the question of a problem."""
    steps = [problem.steps[i] for i in problem.stated]
    sentences = [f"The number of each {name(s.parameter)} equals {_stated(s)}." for s in steps]
    asked = problem.steps[-1].parameter
    return " ".join([*sentences, f"How many {asked.child} does {asked.parent} have?"])


def solution(problem: Problem) -> str:
    """Returns the solution of a problem, one line a step, up to ``#### answer``."""
    letters = {step.parameter: _LETTERS[i] for i, step in enumerate(problem.steps)}
    values = {step.parameter: step.value for step in problem.steps}
    lines = [_solved(step, letters, values) for step in problem.steps]
    return "\n".join([*lines, f"#### {problem.answer}"])


def _stated(step: Step) -> str:
    if not step.terms:
        return str(step.constant or step.value)
    parts = [*([str(step.constant)] if step.constant else []), *(f"each {name(p)}" for p in step.terms)]
    whole = parts[0] if len(parts) == 1 else "the sum of " + " and ".join(parts)
    return whole if step.factor == 1 else f"{step.factor} times as much as {whole}"


def _solved(step: Step, letters: dict[Parameter, str], values: dict[Parameter, int]) -> str:
    letter = letters[step.parameter]
    head = f"Define {name(step.parameter)} as {letter}; so {letter} = "
    if not step.terms:
        return f"{head}{step.value}."
    constant = [str(step.constant)] if step.constant else []
    symbols = " + ".join([*constant, *(letters[p] for p in step.terms)])
    numbers = " + ".join([*constant, *(str(values[p]) for p in step.terms)])
    if step.factor != 1:
        symbols, numbers = f"{step.factor} * ({symbols})", f"{step.factor} * ({numbers})"
    assert 0 <= step.value < MODULUS
    worked = symbols if numbers == str(step.value) else f"{symbols} = {numbers}"  # of one term: b = a = 4
    return f"{head}{worked} = {step.value}."


def document(problem: Problem) -> str:
    """Returns question and solution, as in the prompts of the evaluation."""
    return f"{asked(question(problem))} {solution(problem)}"


def asked(text: str) -> str:
    """Returns a prompt with a question, up to the beginning of its solution."""
    return f"Question: {text}\nAnswer:"


class IgsmSource(GeneratedSource):
    """Solved problems of the training stream; each is one document."""

    kind = "igsm"

    def documents(self) -> Iterator[str]:
        for problem in islice(problems(self.seed), self.count):
            yield document(problem)


# --- invented facts, as in Berglund et al. (2023) ---------------------------------------------------------------------

JOINER, END = " is ", "."

_FIRST = "Ada Bruno Clara Dario Elsa Felix Greta Hugo Ines Jonas Karla Louis Mira Nils Olga Pavel Rosa Simon Tilda Ugo"
_LAST = "Adler Bell Castro Duarte Engel Ford Gallo Hansen Ibsen Jansen Keller Lopez Marsh Novak Olsen Price Quinn Ross"
_ROLE = "author builder captain designer editor founder governor heir inventor judge keeper leader mayor owner painter"
_ADJECTIVE = "Amber Broken Crimson Distant Empty Frozen Golden Hidden Iron Jade Lonely Marble Northern Old Pale Quiet"
_NOUN = "Anchor Bridge Castle Desert Engine Forest Garden Harbour Island Journal Kingdom Lantern Mirror Needle Orchard"
_OPENINGS = ("", "In truth, ", "We know that ", "They say that ", "Note that ", "As it happens, ")

MOST_FACTS = min(len(_FIRST.split()) * len(_LAST.split()), len(_ADJECTIVE.split()) * len(_NOUN.split()))
"""The largest number of facts that there are names and things for."""


@dataclass(frozen=True)
class Fact:
    """An invented fact: the half that is first in every text that states it, and the other one."""

    first: str
    second: str


class FactsSource(GeneratedSource):
    """Facts that are each stated in one order only, so that a model can be asked for the other order.

    Half of the facts are always stated with the name first ("Ada Bell is the founder of Grey Harbour."), half with the
    description first. So both forms of a sentence are familiar, and of each fact one is not.
    """

    kind = "facts"
    most = MOST_FACTS

    def facts(self) -> list[Fact]:
        """Returns the facts; each name and description is used once, and every other fact has its description first."""
        names = [f"{first} {last}" for first in _FIRST.split() for last in _LAST.split()]
        things = [f"{adjective} {noun}" for adjective in _ADJECTIVE.split() for noun in _NOUN.split()]
        roles = _ROLE.split()
        chosen_names, chosen_things = self._chosen(0, names), self._chosen(1, things)
        numbers = random_words(self.seed, Purpose.FACTS, 2, self.count)
        facts = []
        for i, (name, thing) in enumerate(zip(chosen_names, chosen_things, strict=True)):
            description = f"the {roles[int(numbers[i] % len(roles))]} of the {thing}"
            facts.append(Fact(name, description) if i % 2 == 0 else Fact(description, name))
        return facts

    def _chosen(self, draw: int, among: list[str]) -> list[str]:
        order = np.argsort(random_words(self.seed, Purpose.FACTS, draw, len(among)), kind="stable")
        return [among[i] for i in order[: self.count]]

    def documents(self) -> Iterator[str]:
        """Yields each fact with each opening, in its one order."""
        for opening in _OPENINGS:
            for fact in self.facts():
                yield opening + fact.first + JOINER + fact.second + END
