"""What a model is asked: system prompt, four solved problems, and the problem (LLaDA, Appendix B.8)."""

from __future__ import annotations

from functools import cache

from llada_lightning.data.chat import Message
from llada_lightning.data.igsm import Problem, asked, document, problems, question, solution

SYSTEM = (
    "You're an expert at solving elementary math problems involving addition, subtraction, and multiplication. "
    "You solve all the problems in a uniform format. All calculations are done modulo 5. For example, 4 + 4 "
    "equals 3, 2 + 4 equals 1, 3 + 3 + 3 equals 4, 3 * 3 equals 4, and 2 * 2 equals 4. When providing your "
    "solution, please end with '#### X.' where X is your final answer, an integer between 0 and 4. You must "
    "solve all the problems using the same solution format. Our scenarios involve up to four categories of "
    "objects: schools, classrooms, backpacks and stationeries. Each school may contain classrooms, each "
    "classroom may contain backpacks, and each backpack may contain stationeries. We can specify quantities, "
    'such as "the number of dance studios at each Lakeshore High." Assume that every entity with the same name '
    "has an identical configuration; for example, each Lakeshore High contains the same number of dance "
    "studios. Another guiding principle is that what is not mentioned does not exist: when we refer to "
    "classrooms at Lakeshore High, we are only discussing the classrooms explicitly mentioned in our scenario. "
    "Furthermore, if Lakeshore High is not even mentioned, any classroom within it is automatically considered "
    "to be non-existent (i.e. 0)."
)
"""The paper's words."""

SHOT_STEPS = (4, 5, 6, 5)
_SHOT_SEED = 2025


@cache
def shots() -> tuple[Problem, ...]:
    """Four problems of the training stream, so that none of them is ever asked."""
    return tuple(next(problems(_SHOT_SEED + i, steps=steps)) for i, steps in enumerate(SHOT_STEPS))


def completion_prompt(problem: Problem, count: int, system: bool) -> str:
    """For a base model: one text that ends where the solution begins."""
    shown = [document(shot) for shot in shots()[:count]]
    return "\n\n".join([*([SYSTEM] if system else []), *shown, asked(question(problem))])


def chat_messages(problem: Problem, count: int, system: bool) -> list[Message]:
    """For a chat model: the shots are earlier turns."""
    messages = [Message("system", SYSTEM)] if system else []
    for shot in shots()[:count]:
        messages += [Message("user", question(shot)), Message("assistant", solution(shot))]
    return [*messages, Message("user", question(problem))]
