"""`run_reversal`: given one half of a pair, how often a model gives the other."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from llada_lightning.checkpoints import LanguageModel
from llada_lightning.data.chat import Message
from llada_lightning.data.facts_corpus import END, JOINER, Pair
from llada_lightning.data.text_files import REFUSED_BESIDE_PROMPTS, UnreadFields
from llada_lightning.evaluation.accuracy import Accuracy
from llada_lightning.evaluation.requests import encode_pair, moved_space
from llada_lightning.generation.conversation import conversation_ids
from llada_lightning.generation.sampling import generate
from llada_lightning.support.errors import UserError
from llada_lightning.support.files import expanded
from llada_lightning.support.printing import shortened
from llada_lightning.support.reading import read_json

Form = Literal["prompt", "infill", "chat"]
FORMS: tuple[Form, ...] = get_args(Form)
Direction = Literal["forward", "backward"]
DIRECTIONS: tuple[Direction, ...] = get_args(Direction)

CHAT_PROMPTS = {
    "forward": "{line}的下一句是什么？直接输出句子即可。",
    "backward": "{line}的上一句是什么？直接输出句子即可。",
}
"""The paper's (App. B.9): what is the next, the previous line? Give the line alone."""


@dataclass(frozen=True)
class ReversalSettings:
    """How a pair is asked for.

    Args:
        form: ``prompt``: the known half and the joiner, to be continued, in both directions. ``infill``: the pair's
            text with masks where the other half stands; `llada` alone can. ``chat``: the paper's prompts through the
            chat template. Prompts and infills make room for just the tokens of the right answer.
        joiner: between a pair's halves.
        end: behind them.
        chat_prompts: by direction; ``{line}`` is the known half.
        batch_size: prompts at a time.
        sampling: keyword arguments of ``generate``.
    """

    form: Form
    joiner: str = JOINER
    end: str = END
    chat_prompts: dict[str, str] = field(default_factory=lambda: dict(CHAT_PROMPTS))
    batch_size: int = 16
    sampling: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise UserError(f"form: {self.form!r} given; choose from {', '.join(FORMS)}")
        if self.batch_size < 1:
            raise UserError(f"batch_size: {self.batch_size} given; give at least 1")


@dataclass(frozen=True)
class ReversalResult:
    """Of one direction: what was asked for and what came, and the shares that are right."""

    expected: list[str]
    given: list[str]

    @property
    def exact(self) -> Accuracy:
        """Pairs whose other half came letter by letter."""
        return Accuracy(sum(e == g for e, g in zip(self.expected, self.given, strict=True)), len(self.expected))

    @property
    def characters(self) -> float:
        """Share of the expected characters that stand in their places."""
        right = sum(a == b for e, g in zip(self.expected, self.given, strict=True) for a, b in zip(e, g, strict=False))
        return right / sum(map(len, self.expected))


def read_pairs(path: str | os.PathLike[str]) -> list[Pair]:
    """Pairs of a JSON list of objects with ``first`` and ``second``; a note names what else they hold.

    Raises:
        UserError: it cannot be read, is empty, or a pair lacks a half or has a field that would change its meaning.
    """
    rows = read_json(expanded(path))
    if not isinstance(rows, list) or not rows:
        raise UserError(f"--pairs '{path}' holds no list of pairs; give objects with 'first' and 'second'")
    pairs = []
    unread = UnreadFields()
    for number, row in enumerate(rows, 1):
        where = f"--pairs '{path}': pair {number}"
        fields = row if isinstance(row, dict) else {}
        first, second = (fields.get(half) or "" for half in ("first", "second"))
        for half in (first, second):
            if not isinstance(half, str):
                raise UserError(f"{where}: '{shortened(half, 60)}' is no text; write it in quotation marks")
            if not half.strip():
                raise UserError(f"{where} lacks 'first' or 'second'; fill it in, or remove it")
        unread.add_row(fields, ("first", "second"), where, REFUSED_BESIDE_PROMPTS)
        pairs.append(Pair(first, second))
    unread.note(f"--pairs '{path}'")
    return pairs


def run_reversal(
    lm: LanguageModel, pairs: Sequence[Pair], settings: ReversalSettings
) -> dict[Direction, ReversalResult]:
    """Asks a model for the second half of each pair, and for the first.

    Raises:
        UserError: there is no pair, no tokenizer or (for chat) no template, an `arm` is to fill gaps, or a pair is
            longer than the context.
    """
    if not pairs:
        raise UserError("pairs: none given; give at least one")
    if lm.tokenizer is None:
        raise UserError(f"'{lm.name}' has no tokenizer, so pairs cannot be asked for; give --tokenizer")
    if settings.form == "infill" and lm.causal:
        raise UserError(f"--form infill: '{lm.name}' is an arm, which sees nothing behind a gap; choose prompt")
    if settings.form == "chat" and lm.chat_template is None:
        raise UserError(f"'{lm.name}' has no chat template; leave --form chat out")
    return {direction: _asked(lm, pairs, settings, direction) for direction in DIRECTIONS}


def _asked(
    lm: LanguageModel, pairs: Sequence[Pair], settings: ReversalSettings, direction: Direction
) -> ReversalResult:
    halves = [(p.first, p.second) if direction == "forward" else (p.second, p.first) for p in pairs]
    ask = {"prompt": _by_prompt, "infill": _by_infill, "chat": _by_chat}[settings.form]
    return ReversalResult([wanted for _, wanted in halves], ask(lm, halves, settings, direction))


def _by_prompt(
    lm: LanguageModel, halves: Sequence[tuple[str, str]], settings: ReversalSettings, _: Direction
) -> list[str]:
    asked = [
        encode_pair(lm, known + settings.joiner, wanted + settings.end, f"pair {number}")
        for number, (known, wanted) in enumerate(halves, 1)
    ]
    texts = _fixed_length(lm, [prompt for prompt, _ in asked], [len(answer) for _, answer in asked], settings)
    return [text.partition(settings.end)[0].strip() if settings.end else text.strip() for text in texts]


def _fixed_length(
    lm: LanguageModel, prompts: Sequence[list[int]], lengths: Sequence[int], settings: ReversalSettings
) -> list[str]:
    """Answers of just the wanted numbers of tokens, those of one length together."""
    texts = [""] * len(prompts)
    for length in sorted(set(lengths)):
        rows = [i for i, own in enumerate(lengths) if own == length]
        sampling = {**settings.sampling, "length": length}
        done = generate(lm, [prompts[i] for i in rows], batch_size=settings.batch_size, **sampling)
        assert done.text is not None
        for i, text in zip(rows, done.text, strict=True):
            texts[i] = text
    return texts


def _by_infill(
    lm: LanguageModel, halves: Sequence[tuple[str, str]], settings: ReversalSettings, direction: Direction
) -> list[str]:
    assert lm.mask_token_id is not None
    rows: list[list[int]] = []
    gaps: list[slice] = []
    for known, wanted in halves:
        first, second = (known, wanted) if direction == "forward" else (wanted, known)
        parts = [first, *moved_space(settings.joiner, second), settings.end]
        # What the tokenizer puts before a text is a part of its own, which is never masked.
        ids = [list(lm.text_prefix_ids), lm.encode(parts[0]), *(lm.encode_within(part) for part in parts[1:])]
        asked = 3 if direction == "forward" else 1
        start = sum(map(len, ids[:asked]))
        masked = [[lm.mask_token_id] * len(part) if i == asked else part for i, part in enumerate(ids)]
        rows.append([token for part in masked for token in part])
        gaps.append(slice(start, start + len(ids[asked])))
    sampling = {key: value for key, value in settings.sampling.items() if key != "length"}
    texts = []
    for row, gap in zip(rows, gaps, strict=True):
        tokens = generate(lm, [row], infill=True, **sampling).tokens[0]
        texts.append(lm.decode(list(tokens)[gap]).strip())
    return texts


def _by_chat(
    lm: LanguageModel, halves: Sequence[tuple[str, str]], settings: ReversalSettings, direction: Direction
) -> list[str]:
    form = settings.chat_prompts[direction]
    prompts = [conversation_ids(lm, [Message("user", form.replace("{line}", known))]) for known, _ in halves]
    done = generate(lm, prompts, batch_size=settings.batch_size, **settings.sampling)
    assert done.text is not None
    return [text.strip().strip("“”\"'").rstrip("。.！？，") for text in done.text]
