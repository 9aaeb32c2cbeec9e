"""What a sampler gives, and what it shows while it works."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

Finish = Literal["eos", "stop", "length"]


@dataclass(frozen=True)
class Generation:
    """The answers to a batch of prompts. Lists run over prompts, then over the tokens of the answer.

    Args:
        prompts: ids of each prompt.
        tokens: ids of each answer, up to and with the token that ended it. Where gaps of a text were filled: of the
            whole text.
        text: of each answer, special tokens and what follows a stop string left out; None without a tokenizer.
        step_of_token: the sampling step, from 1, at which each token appeared; 0 for a token that was given; -1 for a
            [MASK] that the released sampler drew and left.
        confidence: probability that the model gave each token when it appeared (before temperature, top-k and top-p;
            after guidance); 1 for a token that was given.
        finish: what ended each answer: a token of the model, a stop string, or the length.
        steps: the most that an answer took; those of the schedule are in ``settings``.
        forward_passes: passes of the model over (what was left of) the batch. With guidance one pass holds each
            sequence twice, with and without its prompt, and so costs what two do.
        seconds: wall-clock time of the sampling.
        cache: `none` (exact), `kv` (exact, of `arm`), `prefix` or `dual` (approximate).
        settings: as they ran: what was given, and what followed from it and the model.
    """

    prompts: list[list[int]]
    tokens: list[list[int]]
    text: list[str] | None
    step_of_token: list[list[int]]
    confidence: list[list[float]]
    finish: list[Finish]
    steps: int
    forward_passes: int
    seconds: float
    cache: str = "none"
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def tokens_per_second(self) -> float:
        """Tokens that were made, not given, per second of wall-clock time."""
        return sum(step != 0 for steps in self.step_of_token for step in steps) / self.seconds


@dataclass(frozen=True)
class Snapshot:
    """The answers half-way.

    Args:
        tokens: ids so far, one list a prompt; [MASK] where ``step_of_token`` is -1.
        step_of_token: as in :class:`Generation`; -1 where the token is still masked.
        step: steps done.
        steps: of the schedule.
        first: number of the prompt that the first list belongs to, where prompts go in several batches.
    """

    tokens: list[list[int]]
    step_of_token: list[list[int]]
    step: int
    steps: int
    first: int = 0


Observer = Callable[[Snapshot], None]
