"""What is to be scored, checked against the model, and what scoring gives."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from llada_lightning.support.errors import UserError
from llada_lightning.support.printing import shortened

if TYPE_CHECKING:
    from llada_lightning.checkpoints.language_model import LanguageModel

Ids = Sequence[int]
FloatArray = npt.NDArray[np.float64]
Written = str | list[int]
"""A text, or the ids of one."""
Method = Literal["autoregressive", "one pass", "enumerated", "monte carlo", "empty"]
Truncation = Literal["left"]


@dataclass(frozen=True)
class Score:
    """The log-likelihood of a continuation given its prompt.

    Args:
        mean: The value in nats. For `arm` it is the log-likelihood itself. For `llada` it is the lower bound, Eq. 6
            with its sign changed: an unbiased estimate (nearly so where a target decided when to stop), or the bound
            itself where `exact`.
        stderr: The standard error of `mean` by Monte Carlo, in nats: 0 where `exact`, NaN where there is only one
            sample.
        exact: Whether no Monte Carlo error is left. A bound may be exact and still be a bound: see `method`.
        samples: The number of masks that were drawn; all of them where enumerated; 1 for `arm`; 0 where there is
            nothing to score.
        tokens: The number of tokens of the continuation.
        method: The method: `autoregressive` and `one pass` (one token of `llada`) give the model's own log-likelihood;
            `enumerated` (over all masks) and `monte carlo` give the bound; `empty`: no token, so 0.
        truncated: The number of tokens cut from the prompt's left.
    """

    mean: float
    stderr: float
    exact: bool
    samples: int
    tokens: int
    method: Method
    truncated: int = 0

    @property
    def kind(self) -> Literal["exact", "bound"]:
        """Whether `mean` tells of the log-likelihood itself or of its lower bound."""
        return "bound" if self.method in ("enumerated", "monte carlo") else "exact"


@dataclass(frozen=True)
class Request:
    """A continuation to score given its prompt; equal requests are scored once.

    Args:
        prompt: The token ids of the prompt.
        continuation: The token ids of the continuation.
        truncated: The number of tokens cut from the prompt's left.
    """

    prompt: tuple[int, ...]
    continuation: tuple[int, ...]
    truncated: int = 0

    @property
    def noise_key(self) -> int:
        """64 bits by which the noise of a request is drawn: of its content alone.

        They come from the prompt, so that the candidates of one question share their random numbers: errors that they
        have in common then leave the differences between them. Without a prompt they come from the continuation.
        """
        ids = np.array(self.prompt or self.continuation, dtype="<i8")
        return int.from_bytes(blake2b(ids.tobytes(), digest_size=8).digest(), "little")


def encode_text(lm: LanguageModel, text: str, name: str) -> list[int]:
    """The ids of a text that is scored as a whole.

    Raises:
        UserError: there is no tokenizer, or it leaves nothing of the text, which would then count as certain.
    """
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

    Args:
        lm: The model.
        prompt: The prompt, which may be empty.
        continuation: The continuation, which may not be empty.
        name: The name of the pair, for the message.

    Raises:
        UserError: there is no tokenizer, or the continuation is empty or has no token: its probability would be one.
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
        before: The text before the gap, or its parts, each of which is encoded by itself.
        gap: The text of which only the number of tokens is told, at least one.
        behind: The text behind the gap, or its parts.

    Raises:
        UserError: There is no tokenizer.
    """
    assert lm.mask_token_id is not None
    left, right = ([part] if isinstance(part, str) else list(part) for part in (before, behind))
    ids = list(lm.text_prefix_ids)  # a part of no text, so it is never masked
    parts = [*left, gap, *right]
    encoded = [lm.encode(parts[0]), *(lm.encode_within(part) for part in parts[1:])]
    ids += [token for part in encoded[: len(left)] for token in part]
    hole = slice(len(ids), len(ids) + max(1, len(encoded[len(left)])))
    ids += [lm.mask_token_id] * (hole.stop - hole.start)
    return ids + [token for part in encoded[len(left) + 1 :] for token in part], hole


def moved_space(prompt: str, continuation: str) -> tuple[str, str]:
    """Prompt and continuation, the white space between them at the continuation's beginning."""
    kept = prompt.rstrip()
    return kept, prompt[len(kept) :] + continuation


def check_request(
    lm: LanguageModel, prompt: Ids, continuation: Ids, truncate: Truncation | None = None, name: str = "request"
) -> Request:
    """The request, once it is known that the model can score it.

    Args:
        lm: The model.
        prompt: The token ids of the prompt, which may be empty.
        continuation: The token ids of the continuation, which may be empty.
        truncate: The handling of a prompt that does not fit the model's context with its continuation. `left` cuts its
            left; what the tokenizer puts before a text (BOS) stays in front.
        name: The name of the request, for the message.

    Raises:
        UserError: an id outside of the vocabulary, [MASK] within the continuation, more tokens than the context.
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
    """The requests of one prompt's candidates; the prompt is cut for the longest one, so that it is the same for all.

    Args:
        lm, prompt, truncate: The same arguments as in :func:`check_request`.
        candidates: The token ids of each candidate.
        names: The names of the candidates, for the message.

    Raises:
        UserError: as there.
    """
    if not len(candidates):
        return []
    longest = max(range(len(candidates)), key=lambda k: len(candidates[k]))
    cut = check_request(lm, prompt, candidates[longest], truncate, names[longest])
    requests = [check_request(lm, cut.prompt, c, None, name) for c, name in zip(candidates, names, strict=True)]
    return [replace(request, truncated=cut.truncated) for request in requests]


def monte_carlo_stderr(requests: Sequence[tuple[Ids, Ids]], scores: Sequence[Score]) -> float:
    """The standard error of the sum of scores by Monte Carlo, nats; NaN where one has none.

    Equal requests share their estimate, so their errors add up before they are squared. Different ones count as
    independent. Those with one prompt draw by the same random numbers, but for other tokens: measured on a small model,
    the scatter over seeds of their mean was 0.93 of this error.

    Args:
        requests: The pairs (prompt, continuation), with the prompt as it was scored.
        scores: The score of each request.
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
    outside = (array < 0) | (array >= lm.model.vocab_size)  # type: ignore[operator]
    if outside.any():
        raise UserError(
            f"{name}: id {array[outside][0]} is outside of the vocabulary of {lm.model.vocab_size}; is it another "
            "model's tokenizer?"
        )
    return tuple(array.tolist())
