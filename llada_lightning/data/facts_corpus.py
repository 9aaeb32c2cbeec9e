"""Invented facts, each stated in one order only: what a model needs to be asked for the other one.

As in Berglund et al. (2023): half of the facts are always stated with the name first ("Ada Bell is the founder of Grey
Harbour."), half with the description first. So both forms of a sentence are familiar, and of each fact one is not.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from llada_lightning.objectives.noise import Stream, random_words
from llada_lightning.support.errors import UserError

FACTS = "facts"
VERSION = 1
"""Of the facts that a seed gives; another one is another corpus."""

JOINER, END = " is ", "."

_FIRST = "Ada Bruno Clara Dario Elsa Felix Greta Hugo Ines Jonas Karla Louis Mira Nils Olga Pavel Rosa Simon Tilda Ugo"
_LAST = "Adler Bell Castro Duarte Engel Ford Gallo Hansen Ibsen Jansen Keller Lopez Marsh Novak Olsen Price Quinn Ross"
_ROLE = "author builder captain designer editor founder governor heir inventor judge keeper leader mayor owner painter"
_ADJECTIVE = "Amber Broken Crimson Distant Empty Frozen Golden Hidden Iron Jade Lonely Marble Northern Old Pale Quiet"
_NOUN = "Anchor Bridge Castle Desert Engine Forest Garden Harbour Island Journal Kingdom Lantern Mirror Needle Orchard"
_OPENINGS = ("", "In truth, ", "We know that ", "They say that ", "Note that ", "As it happens, ")

_SOURCE = re.compile(rf"{FACTS}:(\d+)(?:@(\d+))?")


@dataclass(frozen=True)
class Pair:
    """What stands first and what stands second in every text that states the fact."""

    first: str
    second: str


@dataclass(frozen=True)
class FactsSource:
    """``facts:COUNT[@SEED]``: so many facts of a seed."""

    count: int
    seed: int

    def pairs(self) -> list[Pair]:
        """The facts: names and descriptions are each used once; every other fact has its description first."""
        names = [f"{first} {last}" for first in _FIRST.split() for last in _LAST.split()]
        things = [f"{adjective} {noun}" for adjective in _ADJECTIVE.split() for noun in _NOUN.split()]
        roles = _ROLE.split()
        chosen_names, chosen_things = self._chosen(0, names), self._chosen(1, things)
        role_words = random_words(self.seed, Stream.FACTS, 2, self.count)
        facts = []
        for i, (name, thing) in enumerate(zip(chosen_names, chosen_things, strict=True)):
            description = f"the {roles[int(role_words[i] % len(roles))]} of the {thing}"
            facts.append(Pair(name, description) if i % 2 == 0 else Pair(description, name))
        return facts

    def _chosen(self, draw: int, among: list[str]) -> list[str]:
        order = np.argsort(random_words(self.seed, Stream.FACTS, draw, len(among)), kind="stable")
        return [among[i] for i in order[: self.count]]

    def documents(self) -> Iterator[str]:
        """Each fact with each opening, in its one order."""
        for opening in _OPENINGS:
            for pair in self.pairs():
                yield opening + pair.first + JOINER + pair.second + END


MOST = min(len(_FIRST.split()) * len(_LAST.split()), len(_ADJECTIVE.split()) * len(_NOUN.split()))


def facts_source(source: str) -> FactsSource:
    """Reads ``facts:COUNT[@SEED]``.

    Raises:
        UserError: it is written in another way, or asks for no fact or for more than there are words for.
    """
    found = _SOURCE.fullmatch(source)
    if found is None or not 1 <= int(found[1]) <= MOST:
        raise UserError(f"source '{source}': write facts:COUNT or facts:COUNT@SEED, with a count of 1 to {MOST}")
    return FactsSource(int(found[1]), int(found[2] or 0))
