"""`run_igsm`: how many problems a model solves."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from llada_lightning.checkpoints import LanguageModel
from llada_lightning.data.igsm import Problem
from llada_lightning.evaluation.accuracy import Accuracy
from llada_lightning.evaluation.igsm.prompts import SHOT_STEPS, chat_messages, completion_prompt
from llada_lightning.generation.conversation import conversation_ids
from llada_lightning.generation.sampling import generate
from llada_lightning.support.errors import UserError

_ANSWER = re.compile(r"####\s*([0-4])(?!\d)")
_NEXT_QUESTION = "\nQuestion:"


@dataclass(frozen=True)
class IgsmSettings:
    """How problems are asked.

    Args:
        shots: solved problems before the one asked, 0 to 4.
        system: whether the system prompt stands first.
        chat: through the checkpoint's chat template.
        batch_size: prompts at a time.
        sampling: keyword arguments of ``generate``.
    """

    shots: int = len(SHOT_STEPS)
    system: bool = True
    chat: bool = False
    batch_size: int = 16
    sampling: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 <= self.shots <= len(SHOT_STEPS):
            raise UserError(f"shots: {self.shots} given; give 0 to {len(SHOT_STEPS)}")
        if self.batch_size < 1:
            raise UserError(f"batch_size: {self.batch_size} given; give at least 1")


@dataclass(frozen=True)
class IgsmResult:
    """Lists run over the problems; ``given`` is None where an answer has no ``#### 0`` to ``#### 4``."""

    steps: list[int]
    expected: list[int]
    given: list[int | None]
    texts: list[str]

    @property
    def overall(self) -> Accuracy:
        return self._of(range(len(self.steps)))

    @property
    def by_steps(self) -> dict[int, Accuracy]:
        return {n: self._of([i for i, s in enumerate(self.steps) if s == n]) for n in sorted(set(self.steps))}

    def _of(self, places: Sequence[int]) -> Accuracy:
        return Accuracy(sum(self.given[i] == self.expected[i] for i in places), len(places))


def run_igsm(lm: LanguageModel, problems: Sequence[Problem], settings: IgsmSettings | None = None) -> IgsmResult:
    """Asks a model, of either objective, each problem, and reads its answers.

    Raises:
        UserError: no problem is given, there is no tokenizer or (for chat) no template, or a prompt does not fit.
    """
    settings = settings or IgsmSettings()
    if not problems:
        raise UserError("problems: none given; give at least one")
    if lm.tokenizer is None:
        raise UserError(f"'{lm.name}' has no tokenizer, so problems cannot be asked; give --tokenizer")
    if settings.chat and lm.chat_template is None:
        raise UserError(f"'{lm.name}' has no chat template; leave --chat out")
    sampling = dict(settings.sampling)
    if not settings.chat:
        sampling["stop"] = [*(sampling.get("stop") or ()), _NEXT_QUESTION]
    prompts = [_prompt_ids(lm, problem, settings) for problem in problems]
    generation = generate(lm, prompts, batch_size=settings.batch_size, **sampling)
    assert generation.text is not None
    return IgsmResult(
        [len(problem.steps) for problem in problems],
        [problem.answer for problem in problems],
        [answer_in(text) for text in generation.text],
        generation.text,
    )


def answer_in(text: str) -> int | None:
    """The first ``#### X`` with X from 0 to 4."""
    found = _ANSWER.search(text)
    return int(found[1]) if found else None


def _prompt_ids(lm: LanguageModel, problem: Problem, settings: IgsmSettings) -> list[int]:
    if settings.chat:
        return conversation_ids(lm, chat_messages(problem, settings.shots, settings.system))
    return lm.encode_prompt(completion_prompt(problem, settings.shots, settings.system))
