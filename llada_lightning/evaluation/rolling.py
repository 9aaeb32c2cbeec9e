"""The perplexity of long texts, window by window.

It differs a little from the validation loss of training on the same documents: there sequences go across the ends of
documents and EOS is scored as well; here every document is by itself, and only its own tokens are scored (measured on
one set: 4.4569 nats per token here, 4.4572 there).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from llada_lightning.checkpoints.language_model import LanguageModel
from llada_lightning.evaluation.likelihood import log_likelihood
from llada_lightning.evaluation.requests import Ids, monte_carlo_stderr
from llada_lightning.objectives.standard_errors import ratio_and_stderr
from llada_lightning.support.errors import UserError


@dataclass(frozen=True)
class RollingScore:
    """The negative log-likelihood of texts, every token scored once.

    Args:
        nats_per_token: The mean over all tokens of all texts, in nats per token.
        stderr: The standard error of that mean over documents, in nats; it includes the Monte Carlo error. NaN with one
            document.
        monte_carlo_stderr: The part of the standard error that more samples would take away; NaN with one sample, 0
            where exact.
        perplexity: The exponential of ``nats_per_token``.
        bits_per_byte: The bits per UTF-8 byte; None where the bytes are not known.
        bits_per_byte_stderr: The standard error over documents of the ratio of bits and bytes; None where the bytes are
            not known.
        kind: The kind of the value: `exact` for `arm`; `bound`, an upper one, for `llada`.
        tokens, documents, windows: The numbers of tokens, documents and windows.
        bytes: The number of bytes of the texts in UTF-8; None where it is not known.
        window: The largest number of tokens of a pass, context and scored ones together.
        context: The number of tokens before the scored ones of every window but a document's first, which has none.
    """

    nats_per_token: float
    stderr: float
    monte_carlo_stderr: float
    perplexity: float
    bits_per_byte: float | None
    bits_per_byte_stderr: float | None
    kind: Literal["exact", "bound"]
    tokens: int
    documents: int
    windows: int
    bytes: int | None
    window: int
    context: int


def rolling_log_likelihood(
    lm: LanguageModel,
    texts_ids: Sequence[Ids],
    window: int | None = None,
    stride: int | None = None,
    *,
    text_bytes: Sequence[int] | None = None,
    **options: Any,
) -> RollingScore:
    """Scores texts of any length: a first window of each, then windows of ``stride`` new tokens.

    The tokens of a window are scored together, given the ``window - stride`` tokens before it, so that every token is
    scored once. With stride = window (the default) windows are disjoint and know nothing of each other.

    Args:
        lm: The model.
        texts_ids: The token ids of each document; empty documents are skipped.
        window: The largest number of tokens of a pass, at most the context length; None: the context length.
        stride: The number of tokens from one window to the next, 1..window; None: the window.
        text_bytes: The number of UTF-8 bytes of each document, for bits per byte.
        options: The options of :func:`likelihood.log_likelihood`, for the windows.

    Raises:
        UserError: a window or a stride out of range, no token at all, or as that function.
    """
    window = lm.context_length if window is None else window
    stride = window if stride is None else stride
    if not 1 <= window <= lm.context_length:
        raise UserError(f"window is {window}; it must lie between 1 and the context length, {lm.context_length}")
    if not 1 <= stride <= window:
        raise UserError(f"stride is {stride}; it must lie between 1 and the window, {window}")
    kept = [n for n, ids in enumerate(texts_ids) if len(ids)]
    if not kept:
        raise UserError("texts: they hold no token; give at least one document")
    requests = [(n, *pair) for n in kept for pair in _windows(texts_ids[n], window, stride)]
    windows = [(prompt, continuation) for _, prompt, continuation in requests]
    scores = log_likelihood(lm, windows, **options)
    nats = dict.fromkeys(kept, 0.0)
    for (n, _, _), score in zip(requests, scores, strict=True):
        nats[n] -= score.mean
    tokens = [len(texts_ids[n]) for n in kept]
    mean, stderr = ratio_and_stderr(list(nats.values()), tokens)
    bits, bits_stderr, total_bytes = None, None, None
    if text_bytes is not None:
        bytes_each = [text_bytes[n] for n in kept]
        bits, bits_stderr = ratio_and_stderr([value / math.log(2) for value in nats.values()], bytes_each)
        total_bytes = sum(bytes_each)
    return RollingScore(
        nats_per_token=mean,
        stderr=stderr,
        monte_carlo_stderr=monte_carlo_stderr(windows, scores) / sum(tokens),
        perplexity=math.exp(mean) if mean < 700 else math.inf,
        bits_per_byte=bits,
        bits_per_byte_stderr=bits_stderr,
        kind=lm.facts.val_kind,
        tokens=sum(tokens),
        documents=len(kept),
        windows=len(windows),
        bytes=total_bytes,
        window=window,
        context=window - stride,
    )


def document_log_likelihoods(lm: LanguageModel, texts_ids: Sequence[Ids], **options: Any) -> list[float]:
    """The log-likelihood of each text, nats, in disjoint windows of the context length; 0 of an empty one.

    Args:
        lm: The model.
        texts_ids: The token ids of each document.
        options: The options of :func:`likelihood.log_likelihood`, for the windows.

    Raises:
        UserError: as that function.
    """
    length = lm.context_length
    windows = [(n, *pair) for n, ids in enumerate(texts_ids) for pair in _windows(ids, length, length)]
    scores = log_likelihood(lm, [(prompt, continuation) for _, prompt, continuation in windows], **options)
    totals = [0.0] * len(texts_ids)
    for (n, _, _), score in zip(windows, scores, strict=True):
        totals[n] += score.mean
    return totals


def _windows(ids: Ids, window: int, stride: int) -> Iterator[tuple[Ids, Ids]]:
    """(context, tokens to score) of each window of a document."""
    yield ids[:0], ids[:window]
    for start in range(window, len(ids), stride):
        yield ids[start - (window - stride) : start], ids[start : start + stride]
