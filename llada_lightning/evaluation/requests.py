"""Requests for scoring: read from a file of pairs, encoded, and checked against the model; and their scores."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from llada_lightning.data.text_files import REFUSED_BESIDE_PROMPTS, UnreadFields, some
from llada_lightning.support.errors import UserError
from llada_lightning.support.printing import shortened
from llada_lightning.support.reading import parse_json, read_text

if TYPE_CHECKING:
    from llada_lightning.checkpoints.language_model import LanguageModel

Ids = Sequence[int]
FloatArray = npt.NDArray[np.float64]
Written = str | list[int]
"""A text, or the ids of one."""
Method = Literal["autoregressive", "one pass", "enumerated", "monte carlo", "policy", "empty"]
Truncation = Literal["left"]


@dataclass(frozen=True)
class Score:
    """The log-likelihood of a continuation given its prompt.

    Args:
        mean: The value in nats. For `arm` it is the log-likelihood itself. For `llada` it is the lower bound, Eq. 6
            with its sign changed: an unbiased estimate (nearly so where a target decided when to stop), or exact. For
            `uniform` it is an estimate of its own lower bound.
        stderr: The standard error of `mean` by Monte Carlo, in nats: 0 where `exact`, NaN of one sample.
        exact: Whether no Monte Carlo error is left. A bound may be exact and still be a bound: see `method`.
        samples: The number of masks (of `uniform`: of noisy continuations) that were drawn; all of them where
            enumerated; the steps of a policy; 1 for `arm`; 0 of an empty one.
        tokens: The number of tokens of the continuation.
        method: `autoregressive` and `one pass` (one token of `llada`) give the model's own log-likelihood; `enumerated`
            (over all masks) and `monte carlo` give the bound; `policy` gives the log-likelihood of a sampler that
            decodes by a policy; `empty`: no token, so 0.
        truncated: The number of tokens cut from the prompt's left.
        policy: The policy's label, such as `confidence@1`, where the method is `policy`.
    """

    mean: float
    stderr: float
    exact: bool
    samples: int
    tokens: int
    method: Method
    truncated: int = 0
    policy: str | None = None

    @property
    def kind(self) -> str:
        """Whether `mean` tells of the log-likelihood itself (`exact`, with its policy where it has one) or of its lower
        bound (`bound`)."""
        if self.policy is not None:
            return f"exact (policy {self.policy})"
        return "bound" if self.method in ("enumerated", "monte carlo") else "exact"


@dataclass(frozen=True)
class Request:
    """A continuation to score given its prompt, in token ids; equal requests are scored once.

    Args:
        prompt, continuation: The token ids.
        truncated: The number of tokens cut from the prompt's left.
    """

    prompt: tuple[int, ...]
    continuation: tuple[int, ...]
    truncated: int = 0

    @property
    def noise_key(self) -> int:
        """64 bits by which the noise of a request is drawn, of the prompt alone (or of the continuation without one).

        So the candidates of one question share their random numbers, and common errors leave their differences.
        """
        ids = np.array(self.prompt or self.continuation, dtype="<i8")
        return int.from_bytes(blake2b(ids.tobytes(), digest_size=8).digest(), "little")


# --- from texts to ids ------------------------------------------------------------------------------------------------


def encode_text(lm: LanguageModel, text: str, name: str) -> list[int]:
    """The ids of a text that is scored as a whole; refused where none are left, because it would count as certain."""
    ids = lm.encode(text)
    if text.strip() and not ids:
        raise UserError(f"{name}: the tokenizer has no token for '{shortened(text, 60)}'; take another tokenizer")
    return ids


def encode_pair(lm: LanguageModel, prompt: Written, continuation: Written, name: str) -> tuple[list[int], list[int]]:
    """The ids of a prompt and of its continuation, each of them texts or ids.

    Tokenizers bind a space to the word behind it, so white space at the end of a text prompt moves to a text
    continuation. Both are encoded together and parted where the prompt's own ids end, as in lm-evaluation-harness's own
    models; where the encoding of both does not begin with these ids, because a token spans the join, the continuation
    is encoded by itself. So the prompt's ids are the same for every continuation.

    Raises:
        UserError: There is no tokenizer, or the continuation is empty or has no token: its probability would be one.
            The message begins with the name.
    """
    if not continuation:
        raise UserError(f"{name}: the continuation is empty, which every prompt has; give at least one character")
    if isinstance(prompt, str) and isinstance(continuation, str):
        prompt, continuation = moved_space(prompt, continuation)
    prompt_ids = lm.encode_prompt(prompt) if isinstance(prompt, str) else prompt
    if not isinstance(continuation, str):
        return prompt_ids, continuation
    ids = lm.encode_after(prompt, continuation) if isinstance(prompt, str) else lm.encode_within(continuation)
    if not ids:
        raise UserError(
            f"{name}: the tokenizer has no token for '{shortened(continuation, 60)}' there; take another continuation"
        )
    return prompt_ids, ids


def encode_with_gap(
    lm: LanguageModel, before: str | Sequence[str], gap: str, behind: str | Sequence[str]
) -> tuple[list[int], slice]:
    """The ids of a text with [MASK]s in place of one of its parts, and where these are.

    Args:
        lm: A model with a [MASK].
        before, behind: The text before and behind the gap, or its parts, each of which is encoded by itself.
        gap: The text of which only the number of tokens is told, at least one.
    """
    assert lm.mask_token_id is not None
    left, right = ([part] if isinstance(part, str) else list(part) for part in (before, behind))
    parts = [*left, gap, *right]
    encoded = [lm.encode(parts[0]), *map(lm.encode_within, parts[1:])]
    ids = [*lm.text_prefix_ids, *chain(*encoded[: len(left)])]  # the prefix is a part of no text, so never masked
    hole = slice(len(ids), len(ids) + max(1, len(encoded[len(left)])))
    return [*ids, *[lm.mask_token_id] * (hole.stop - hole.start), *chain(*encoded[len(left) + 1 :])], hole


def moved_space(prompt: str, continuation: str) -> tuple[str, str]:
    """Prompt and continuation, the white space between them at the continuation's beginning."""
    kept = prompt.rstrip()
    return kept, prompt[len(kept) :] + continuation


# --- checked against the model ----------------------------------------------------------------------------------------


def check_request(
    lm: LanguageModel, prompt: Ids, continuation: Ids, truncate: Truncation | None = None, name: str = "request"
) -> Request:
    """The request, once it is known that the model can score it.

    Args:
        lm: The model.
        prompt, continuation: The token ids, which may be empty.
        truncate: `left` cuts the left of a prompt that does not fit the model's context with its continuation; what the
            tokenizer puts before a text (BOS) stays in front.
        name: The name of the request, for the message.

    Raises:
        UserError: An id outside of the vocabulary, [MASK] within the continuation, more tokens than the context.
    """
    prompt, continuation = _ids(prompt, lm, f"{name}: prompt"), _ids(continuation, lm, f"{name}: continuation")
    if lm.mask_token_id is not None and lm.mask_token_id in continuation:
        raise UserError(
            f"{name}: continuation: token {continuation.index(lm.mask_token_id)} is [MASK] ({lm.mask_token_id}), which "
            "is no text; give the token that it hides"
        )
    excess = len(prompt) + len(continuation) - lm.context_length
    if excess <= 0:
        return Request(prompt, continuation)
    prefix = lm.text_prefix_ids if prompt[: len(lm.text_prefix_ids)] == lm.text_prefix_ids else ()
    fits = excess <= len(prompt) - len(prefix)
    if truncate is None or not fits:
        fix = "shorten the prompt, or cut it with truncate 'left'" if fits else "shorten it"
        raise UserError(
            f"{name}: a prompt of {len(prompt)} and a continuation of {len(continuation)} tokens exceed the context of "
            f"{lm.context_length}; {fix}"
        )
    return Request(prefix + prompt[len(prefix) + excess :], continuation, truncated=excess)


def check_question(
    lm: LanguageModel, prompt: Ids, candidates: Sequence[Ids], truncate: Truncation | None, names: Sequence[str]
) -> list[Request]:
    """The requests of one prompt's candidates, as by :func:`check_request`.

    The prompt is cut for the longest one, so that it is the same for all. The names of the candidates are for messages.
    """
    if not len(candidates):
        return []
    longest = max(range(len(candidates)), key=lambda k: len(candidates[k]))
    cut = check_request(lm, prompt, candidates[longest], truncate, names[longest])
    requests = [check_request(lm, cut.prompt, c, None, name) for c, name in zip(candidates, names, strict=True)]
    return [replace(request, truncated=cut.truncated) for request in requests]


def monte_carlo_stderr(requests: Sequence[tuple[Ids, Ids]], scores: Sequence[Score]) -> float:
    """The standard error of the sum of scores by Monte Carlo, nats; NaN where one has none.

    Equal requests (prompt, continuation) share their estimate, so their errors add up before they are squared.
    Different ones count as independent. Those with one prompt draw by the same random numbers, but for other tokens:
    measured on a small model, the scatter over seeds of their mean was 0.93 of this error.
    """
    shared: dict[tuple[tuple[int, ...], tuple[int, ...]], float] = {}
    for (prompt, continuation), score in zip(requests, scores, strict=True):
        key = tuple(prompt), tuple(continuation)
        shared[key] = shared.get(key, 0.0) + score.stderr
    return math.sqrt(sum(error**2 for error in shared.values()))


def _ids(ids: Ids, lm: LanguageModel, name: str) -> tuple[int, ...]:
    array: npt.NDArray[np.generic] = np.asarray(ids)
    if array.size == 0:
        return ()
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise UserError(f"{name}: {str(ids)[:40]!r} is no list of token ids; encode text first (lm.encode)")
    _check_vocabulary(lm, (int(array.min()), int(array.max())), name)
    return tuple(array.tolist())


def _check_vocabulary(lm: LanguageModel, ids: Iterable[int], name: str) -> None:
    outside = next((token for token in ids if not 0 <= token < lm.model.vocab_size), None)
    if outside is not None:
        raise UserError(
            f"{name}: id {shortened(outside, 40)} is outside of the vocabulary of {lm.model.vocab_size}; is it another "
            "model's tokenizer?"
        )


# --- the file of `llada score --pairs`: a JSON object a line, a continuation or a choice of them ----------------------


@dataclass(frozen=True)
class Pair:
    """A prompt and what may follow it.

    Args:
        prompt: The token ids of the prompt, cut where it was too long.
        continuations: The token ids of the one continuation, or of each of the choices.
        written_bytes: The UTF-8 bytes of each continuation as it was written, by which lm-evaluation-harness compares
            choices; None where it was written as ids and there is no tokenizer.
        scored_bytes: The UTF-8 bytes of its ids, with the white space that moved to it; None likewise.
        is_choice: Whether the line had choices.
        answer: The index of the right choice, where the line has it.
        truncated: The number of tokens cut from the prompt's left.
        lost_bytes: The number of ``scored_bytes``, of all continuations together, that the ids do not give back.
    """

    prompt: list[int]
    continuations: list[list[int]]
    written_bytes: list[int] | None
    scored_bytes: list[int] | None
    is_choice: bool
    answer: int | None
    truncated: int = 0
    lost_bytes: int = 0


def read_pairs(path: Path, lm: LanguageModel, truncate: Truncation | None = None) -> list[Pair]:
    """Reads and encodes every line; mistakes name it by its number, and a note names what else the lines hold.

    A line is ``{"prompt": P, "continuation": C}`` or ``{"prompt": P, "choices": [C, …], "answer": i}`` (the answer may
    be left out), where P and C are texts or lists of token ids, encoded by :func:`encode_pair`.
    """
    pairs: list[Pair] = []
    unread = UnreadFields()
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        record = parse_json(line, where, number)
        pair = _pair(record, lm, where)
        unread.add_row(record, ("prompt", "continuation", "choices", "answer"), where, REFUSED_BESIDE_PROMPTS)
        if pairs and pair.is_choice != pairs[0].is_choice:
            raise UserError(f"{where}: choices and continuations in one file; give a file of each")
        cut = check_question(lm, pair.prompt, pair.continuations, truncate, [where] * len(pair.continuations))[0]
        pairs.append(replace(pair, prompt=list(cut.prompt), truncated=cut.truncated))
    if not pairs:
        raise UserError(f"{path}: holds no line; write one JSON object a line")
    unread.note(str(path))
    return pairs


def _pair(record: Any, lm: LanguageModel, where: str) -> Pair:
    if not isinstance(record, dict):
        raise UserError(f"{where}: holds {type(record).__name__}, not a JSON object; write one object a line")
    if "prompt" not in record or ("continuation" in record) == ("choices" in record):
        keys = some(f"'{shortened(name, 60)}'" for name in record) or "nothing"
        raise UserError(f"{where}: has {keys}; a line has 'prompt' and either 'continuation' or 'choices'")
    is_choice = "choices" in record
    written = record["choices"] if is_choice else [record["continuation"]]
    if not isinstance(written, list) or not written:
        raise UserError(f"{where}: 'choices' is {str(written)[:40]!r}; give a list of at least one")
    prompt = _written(record["prompt"], lm, f"{where}: 'prompt'")
    values = [_written(value, lm, where) for value in written]
    answer = record.get("answer")
    if not is_choice and answer is not None:
        raise UserError(f"{where}: has 'answer' beside 'continuation'; it is of 'choices' alone, remove it")
    if answer is not None and not (type(answer) is int and 0 <= answer < len(written)):
        raise UserError(
            f"{where}: 'answer' is {shortened(repr(answer), 40)}; give the index of a choice, 0 to {len(written) - 1}"
        )
    of_choice = [f"{where}, choice {k}" if is_choice else where for k in range(len(values))]
    encoded = [encode_pair(lm, prompt, value, name) for value, name in zip(values, of_choice, strict=True)]
    if any(ids != encoded[0][0] for ids, _ in encoded):
        raise UserError(
            f"{where}: choices of both texts and ids behind a prompt that ends in white space; write all alike"
        )
    scored = [moved_space(prompt, v)[1] if isinstance(prompt, str) and isinstance(v, str) else v for v in values]
    return Pair(
        prompt=encoded[0][0],
        continuations=[ids for _, ids in encoded],
        written_bytes=_sizes(lm, values),
        scored_bytes=_sizes(lm, scored),
        is_choice=is_choice,
        answer=answer,
        lost_bytes=sum(lm.lost_bytes(value) for value in scored if isinstance(value, str)),
    )


def _sizes(lm: LanguageModel, values: list[Written]) -> list[int] | None:
    """UTF-8 bytes of each; None where ids cannot be decoded."""
    if lm.tokenizer is None and not all(isinstance(value, str) for value in values):
        return None
    return [len((value if isinstance(value, str) else lm.decode(value)).encode()) for value in values]


def _written(value: Any, lm: LanguageModel, where: str) -> Written:
    """A text or a list of ids of the vocabulary."""
    ids = isinstance(value, list) and all(type(token) is int for token in value)
    if not ids and not isinstance(value, str):
        raise UserError(f"{where}: {str(value)[:40]!r} is neither a text nor a list of token ids; give one of them")
    if ids:
        _check_vocabulary(lm, value, where)
    if isinstance(value, str) and any("\ud800" <= letter <= "\udfff" for letter in value):
        raise UserError(
            f"{where}: {value[:40]!r} holds half of a surrogate pair, which is no character; write both halves"
        )
    return value
