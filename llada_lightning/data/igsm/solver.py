"""Solves a problem from its text alone, without the generator's graph."""

from __future__ import annotations

import re

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
