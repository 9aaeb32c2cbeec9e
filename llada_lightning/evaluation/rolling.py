"""The perplexity of long texts, window by window."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from llada_lightning.checkpoints.language_model import LanguageModel
from llada_lightning.errors import UserError
from llada_lightning.evaluation.likelihood import log_likelihood
from llada_lightning.evaluation.requests import Ids
from llada_lightning.objectives.bounds import clustered_mean_and_stderr


@dataclass(frozen=True)
class RollingScore:
    """The negative log-likelihood of texts, every token scored once.

    Args:
        nats_per_token: mean over all tokens of all texts.
        stderr: its standard error over documents, nats; it holds the Monte Carlo error too. NaN with one document.
        monte_carlo_stderr: the part of it that more samples would take away; NaN with one sample, 0 where exact.
        perplexity: exp of nats_per_token.
        bits_per_byte: None where the bytes are not known.
        bits_per_byte_stderr: over documents, for the ratio of bits and bytes; None where the bytes are not known.
        kind: `exact` for `arm`; `bound`, an upper one, for `llada`.
        tokens, documents, windows: how many.
        bytes: of the texts in UTF-8, where known.
        window: most tokens of a pass, context and scored ones together.
        context: tokens before the scored ones of every window but a document's first, which has none.
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
        lm: the model.
        texts_ids: ids of each document; empty ones are passed over.
        window: at most, and by default, the context length.
        stride: 1..window.
        text_bytes: UTF-8 bytes of each document, for bits per byte.
        options: of :func:`likelihood.log_likelihood`, for the windows.

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
    scores = log_likelihood(lm, [(prompt, continuation) for _, prompt, continuation in requests], **options)
    document_W = torch.tensor([n for n, _, _ in requests])
    nats_W = -torch.tensor([score.mean for score in scores], dtype=torch.float64)
    tokens_W = torch.tensor([score.tokens for score in scores])
    # Per token: the ratio of sums over documents, whose error the cluster estimator knows.
    mean, stderr = clustered_mean_and_stderr(
        (nats_W / tokens_W).repeat_interleave(tokens_W), document_W.repeat_interleave(tokens_W)
    )
    tokens = int(tokens_W.sum())
    bits, bits_stderr, total_bytes = None, None, None
    if text_bytes is not None:
        total_bytes = sum(text_bytes[n] for n in kept)
        nats_D = torch.zeros(len(texts_ids), dtype=torch.float64).index_add_(0, document_W, nats_W)[kept]
        bits, bits_stderr = _ratio(nats_D / math.log(2), torch.tensor([text_bytes[n] for n in kept]).double())
    return RollingScore(
        nats_per_token=mean,
        stderr=stderr,
        monte_carlo_stderr=math.sqrt(sum(score.stderr**2 for score in scores)) / tokens,
        perplexity=math.exp(mean) if mean < 700 else math.inf,
        bits_per_byte=bits,
        bits_per_byte_stderr=bits_stderr,
        kind="exact" if lm.objective == "arm" else "bound",
        tokens=tokens,
        documents=len(kept),
        windows=len(requests),
        bytes=total_bytes,
        window=window,
        context=window - stride,
    )


def _windows(ids: Ids, window: int, stride: int) -> Iterator[tuple[Ids, Ids]]:
    """(context, tokens to score) of each window of a document."""
    yield ids[:0], ids[:window]
    for start in range(window, len(ids), stride):
        yield ids[start - (window - stride) : start], ids[start : start + stride]


def _ratio(numerator_D: torch.Tensor, denominator_D: torch.Tensor) -> tuple[float, float]:
    """A ratio of two sums over D documents and its linearised standard error (Cochran 1977, Sec. 6); NaN for one."""
    ratio = numerator_D.sum() / denominator_D.sum()
    documents = len(numerator_D)
    if documents < 2:
        return float(ratio), math.nan
    deviation_D = numerator_D - ratio * denominator_D
    variance = documents / (documents - 1) * (deviation_D / denominator_D.sum()).square().sum()
    return float(ratio), math.sqrt(float(variance))
