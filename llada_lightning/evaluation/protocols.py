"""Two protocols of the paper as tasks of lm-evaluation-harness: iGSM (App. B.8) and the reversal curse (Sec. 3.3, B.9).

The YAML files in ``tasks/`` name the functions of this module. What ``llada evaluate --metadata KEY=VALUE`` gives
reaches the ``*_documents`` functions as keyword arguments (:data:`OPTIONS`), together with `chat`: whether the prompts
go through the chat template.

Seen with lm-evaluation-harness 0.4.13: `custom_dataset` is called with the metadata and `dataset_kwargs` of a task,
`description` may name a field of a document, and unknown keys of `generation_kwargs` reach the model.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal

from llada_lightning.data.generated import (
    END,
    JOINER,
    Fact,
    FactsSource,
    Problem,
    asked,
    problems,
    question,
    solution,
)
from llada_lightning.data.text_files import REFUSED_BESIDE_PROMPTS, UnreadFields
from llada_lightning.evaluation.requests import moved_space
from llada_lightning.support.command_line import unescaped
from llada_lightning.support.errors import UserError
from llada_lightning.support.files import expanded
from llada_lightning.support.printing import shortened
from llada_lightning.support.reading import read_json

if TYPE_CHECKING:
    from datasets import Dataset

Direction = Literal["forward", "backward"]


# --- options ----------------------------------------------------------------------------------------------------------

OPTIONS: Mapping[str, tuple[Callable[[Any], bool], str] | None] = {
    "problems": (lambda value: type(value) is int and value >= 1, "a whole number of at least 1"),
    "problem_seed": (lambda value: type(value) is int and value >= 0, "a whole number of at least 0"),
    "system": (lambda value: type(value) is bool, "true or false"),
    "pairs": None,
    "joiner": None,
    "end": None,
}
"""What `--metadata` may say to the tasks of this module, with what a value must be; None: any text.

`problems` (100) and `problem_seed` (0) of iGSM, and `system` (true), whether the paper's system prompt comes first;
`pairs` of reversal: a JSON file, or facts:COUNT[@SEED]; `joiner` between a pair's halves and `end` behind the second.
"""


def _options(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The checked options; of what is not given, none."""
    options = {}
    for key, value in metadata.items():
        if key in ("version", "config_source"):  # of the harness
            continue
        if key not in OPTIONS:
            raise UserError(f"--metadata {shortened(key, 60)}: not known; choose from {', '.join(OPTIONS)}")
        rule = OPTIONS[key]
        if rule is not None and not rule[0](value):
            raise UserError(f"--metadata {key}={shortened(str(value), 60)}: give {rule[1]}")
        options[key] = str(value) if rule is None else value
    return options


# --- iGSM -------------------------------------------------------------------------------------------------------------

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
"""The system prompt of the paper."""

_SHOT_STEPS = (4, 5, 6, 5)
_SHOT_SEED = 2025
_ANSWER = re.compile(r"####\s*([0-4])(?!\d)")


def igsm_documents(steps: int, chat: bool = False, **metadata: Any) -> dict[str, Dataset]:
    """The problems of a number of steps (`test`), and the solved problems for the prompt (`shots`).

    With `chat` the prompts go through the chat template; a base model reads "Question: ... Answer:". The metadata are
    the options `problems`, `problem_seed` and `system`.
    """
    options = _options(metadata)
    system = SYSTEM if options.get("system", True) else ""
    drawn = islice(problems(options.get("problem_seed", 0), steps=steps, test=True), options.get("problems", 100))

    def row(problem: Problem) -> dict[str, Any]:
        text = question(problem)
        return {
            "system": system if chat or not system else f"{system}\n\n",
            "question": text if chat else asked(text),
            "solution": solution(problem),
            "answer": problem.answer,
        }

    return {"test": _dataset(map(row, drawn)), "shots": _dataset(map(row, shots()))}


@cache
def shots() -> tuple[Problem, ...]:
    """Four problems of the training stream, so that none of them is ever asked."""
    return tuple(next(problems(_SHOT_SEED + i, steps=steps)) for i, steps in enumerate(_SHOT_STEPS))


def igsm_results(document: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Whether an answer is right, and whether it holds no ``#### 0`` to ``#### 4``; one document's metrics."""
    given = answer_in(results[0])
    return {"exact_match": float(given == document["answer"]), "unanswered": float(given is None)}


def answer_in(text: str) -> int | None:
    """The X of the first ``#### X`` in a text, with X from 0 to 4."""
    found = _ANSWER.search(text)
    return int(found[1]) if found else None


# --- reversal ---------------------------------------------------------------------------------------------------------

CHAT_PROMPTS: Mapping[Direction, str] = {
    "forward": "{line}的下一句是什么？直接输出句子即可。",
    "backward": "{line}的上一句是什么？直接输出句子即可。",
}
"""The paper's (App. B.9): what is the next, the previous line? Give the line alone."""


def reversal_documents(
    direction: Direction, infill: bool = False, chat: bool = False, **metadata: Any
) -> dict[str, Dataset]:
    """One half of each pair is asked for, given the other: the second with `forward`, the first with `backward`.

    Without `infill` and `chat` the known half and the joiner are continued, in both directions. With `infill` the text
    of the pair has a gap where the other half is. With `chat` the paper's question is asked. The metadata are the
    options `pairs`, `joiner` and `end`.
    """
    if infill and chat:
        raise UserError("reversal_infill fills a gap in a plain text; leave --chat out, or take the task reversal")
    options = _options(metadata)
    if "pairs" not in options:
        raise UserError("task reversal: which pairs? give --metadata pairs=FILE.json, or pairs=facts:COUNT[@SEED]")
    invented = options["pairs"].startswith(f"{FactsSource.kind}:")
    pairs = FactsSource.of(options["pairs"]).facts() if invented else read_halves(options["pairs"])
    usual = {"joiner": JOINER, "end": END} if invented else {"joiner": "，", "end": "。"}
    joiner, end = (unescaped(options.get(key, value)) for key, value in usual.items())

    def row(pair: Fact) -> dict[str, Any]:
        known, wanted = (pair.first, pair.second) if direction == "forward" else (pair.second, pair.first)
        common = {"expected": wanted, "end": "" if chat or infill else end, "chat": chat}
        if infill:
            space, second = moved_space(joiner, pair.second)
            before, gap, behind = [pair.first, space], second, [end]
            if direction == "backward":
                before, gap, behind = [], pair.first, [space, second, end]
            return common | {"text": "".join(before), "prompt": before, "canonical_solution": gap, "suffix": behind}
        if chat:
            return common | {"text": CHAT_PROMPTS[direction].replace("{line}", known), "answer": ""}
        text, answer = moved_space(known + joiner, wanted + end)
        return common | {"text": text, "answer": answer}

    return {"test": _dataset(map(row, pairs))}


def reversal_results(document: Mapping[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """Whether the other half came letter by letter, and of its characters the number in their places and all."""
    text = results[0].partition(document["end"])[0] if document["end"] else results[0]
    text = text.strip()
    if document["chat"]:
        text = text.strip("“”\"'").rstrip("。.！？，")
    expected = document["expected"]
    right = sum(given == letter for given, letter in zip(text, expected, strict=False))
    return {"exact_match": float(text == expected), "characters": (right, len(expected))}


def share(counts: Sequence[tuple[int, int]]) -> float:
    """The sum of the first numbers as a share of the sum of the second ones."""
    return sum(right for right, _ in counts) / sum(total for _, total in counts)


def read_halves(path: str | os.PathLike[str]) -> list[Fact]:
    """Pairs of a JSON list of objects with ``first`` and ``second``; a note names what else they hold."""
    rows = read_json(expanded(path))
    if not isinstance(rows, list) or not rows:
        raise UserError(f"pairs '{path}' holds no list of pairs; give objects with 'first' and 'second'")
    pairs, unread = [], UnreadFields()
    for number, row in enumerate(rows, 1):
        where = f"pairs '{path}': pair {number}"
        fields = row if isinstance(row, dict) else {}
        first, second = (fields.get(half) or "" for half in ("first", "second"))
        for half in (first, second):
            if not isinstance(half, str):
                raise UserError(f"{where}: '{shortened(half, 60)}' is no text; write it in quotation marks")
            if not half.strip():
                raise UserError(f"{where} lacks 'first' or 'second'; fill it in, or remove it")
        unread.add_row(fields, ("first", "second"), where, REFUSED_BESIDE_PROMPTS)
        pairs.append(Fact(first, second))
    unread.note(f"pairs '{path}'")
    return pairs


def _dataset(rows: Any) -> Dataset:
    from datasets import Dataset

    return Dataset.from_list(list(rows))
