"""A dialogue as it came to be: each stretch of its text with the step at which it appeared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llada_lightning.generation.pictures.alignment import Aligner
from llada_lightning.generation.result import Generation
from llada_lightning.support.printing import visible

SPEAKERS: dict[str, str] = {"arm": "ARM", "llada": "LLaDA"}


@dataclass(frozen=True)
class Mark:
    """A stretch of text in one colour.

    Args:
        text: holds no control character but newline and tab.
        step: at which it appeared, from 1; 0 where it was given.
        note: what there is to say of it; empty where nothing is.
    """

    text: str
    step: int = 0
    note: str = ""


@dataclass(frozen=True)
class Turn:
    """What one speaker says.

    Args:
        steps: of the sampling that gave it; 0 where it was given.
    """

    speaker: str
    marks: list[Mark]
    steps: int = 0


@dataclass(frozen=True)
class Dialogue:
    """Turns that belong together, and a line about how they came to be."""

    turns: list[Turn]
    facts: str = ""

    @property
    def steps(self) -> int:
        """The most steps of a turn, each of which has the darkest colour at its own last; 0 where all was given."""
        return max((turn.steps for turn in self.turns), default=0)

    @property
    def last_step(self) -> str:
        """How the darkest colour is called."""
        return f"step {self.steps}" if len({turn.steps for turn in self.turns if turn.steps}) == 1 else "last step"


def question(text: str, speaker: str = "User") -> Turn:
    """A turn that was given; new lines at its end are not drawn."""
    text = visible(text.rstrip("\n"))
    return Turn(speaker, [Mark(text)] if text else [])


def answer(generation: Generation, index: int, aligner: Aligner, objective: str) -> Turn:
    """The answer to one prompt of a batch, with the step and the confidence of each of its tokens.

    Args:
        generation: of the batch.
        index: which of its prompts.
        aligner: of the model's tokenizer.
        objective: whose name the speaker has.
    """
    steps = generation.step_of_token[index]
    confidence = generation.confidence[index]
    last = max(steps, default=0)
    marks = []
    for piece in aligner.pieces(generation.tokens[index]):
        own = steps[piece.begin : piece.end]
        marks.append(Mark(visible(piece.text), max(own), _note(own, last, confidence[piece.begin : piece.end])))
    return Turn(SPEAKERS.get(objective, objective), marks, last)


def _note(steps: Sequence[int], last: int, confidence: Sequence[float]) -> str:
    """For a character of several tokens: the range of their steps, and each one's confidence."""
    if not any(steps):
        return "given"
    first, final = min(steps), max(steps)
    when = f"step {final}" if first == final else f"steps {first} to {final}"
    return f"{when} of {last}, confidence {', '.join(f'{value:.3f}' for value in confidence)}"
