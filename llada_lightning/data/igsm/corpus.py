"""iGSM as a training corpus of any size: one problem of the training stream is one document."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from llada_lightning.data.igsm.problem import Problem, problems
from llada_lightning.data.igsm.text import question, solution
from llada_lightning.errors import UserError

_SOURCE = re.compile(r"igsm:(\d+)(?:@(\d+))?")
VERSION = 1
"""Of the problems that a seed gives; another one is another corpus."""


@dataclass(frozen=True)
class IgsmSource:
    """``igsm:COUNT[@SEED]``: so many problems of a seed."""

    count: int
    seed: int

    def documents(self) -> Iterator[str]:
        for problem in islice(problems(self.seed), self.count):
            yield document(problem)


def document(problem: Problem) -> str:
    """Question and solution, as the shots of the evaluation show them."""
    return f"{asked(question(problem))} {solution(problem)}"


def asked(text: str) -> str:
    """A question up to where its solution begins."""
    return f"Question: {text}\nAnswer:"


def igsm_source(source: str) -> IgsmSource:
    """Reads ``igsm:COUNT[@SEED]``.

    Raises:
        UserError: it is written in another way, or asks for no problem.
    """
    found = _SOURCE.fullmatch(source)
    if found is None or int(found[1]) < 1:
        raise UserError(f"source '{source}': write igsm:COUNT or igsm:COUNT@SEED, such as igsm:100000")
    return IgsmSource(int(found[1]), int(found[2] or 0))
