"""A problem as a graph of quantities modulo 5: which depends on which, and in what order they are solved."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass

from llada_lightning.errors import UserError

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
    """How many ``child`` each ``parent`` has; abstract: ``child`` is a category, and the count sums its items."""

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
    """Steps in the order of solution (the last is asked for), and the order in which the question states them."""

    steps: tuple[Step, ...]
    stated: tuple[int, ...]

    @property
    def answer(self) -> int:
        return self.steps[-1].value

    @property
    def held_out(self) -> bool:
        """Whether the problem is kept for testing: a hash of its structure decides, not the order of what is stated."""
        structure = sorted((s.parameter, sorted(s.terms), s.constant, s.factor) for s in self.steps)
        digest = hashlib.sha256(repr((structure, self.steps[-1].parameter)).encode()).digest()
        return int.from_bytes(digest[:8], "big") % _TEST_SHARE == 0


def problems(seed: int, *, steps: int | None = None, test: bool = False) -> Iterator[Problem]:
    """An endless stream of problems of 4 to 6 steps (or of ``steps``), the same for the same seed.

    Training and test streams share no problem, whatever their seeds. Raises UserError for another number of steps.
    """
    if steps is not None and not FEWEST_STEPS <= steps <= MOST_STEPS:
        raise UserError(f"an iGSM problem of {steps} steps: give {FEWEST_STEPS} to {MOST_STEPS}")
    draw = random.Random(f"igsm {seed}")
    while True:
        problem = _draw_problem(draw, steps or draw.randint(FEWEST_STEPS, MOST_STEPS))
        if problem.held_out == test:
            yield problem


def _draw_problem(draw: random.Random, count: int) -> Problem:
    """Quantities that nothing uses yet wait in ``unused`` (two at most), so that the last step needs every other."""
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
