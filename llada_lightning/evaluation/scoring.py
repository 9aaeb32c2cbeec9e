"""What `llada score` computes and prints: perplexity of texts, likelihoods and choices of a file of pairs.

The perplexity differs a little from the validation loss of training on the same documents: there sequences go across
the ends of documents and EOS is scored as well; here every document is by itself, and only its own tokens are scored
(measured on one set: 4.4569 nats per token here, 4.4572 there).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from llada_lightning.checkpoints.language_model import LanguageModel
from llada_lightning.data.manifest import TOLERATED_LOSS
from llada_lightning.evaluation.likelihood import log_likelihood, windows
from llada_lightning.evaluation.ranking import Normalisation, candidate_sizes, rank_candidates, rank_scores
from llada_lightning.evaluation.requests import Ids, Pair, Score, monte_carlo_stderr
from llada_lightning.objectives.standard_errors import ratio_and_stderr
from llada_lightning.support.errors import UserError
from llada_lightning.support.printing import counted

_ROWS_SHOWN = 40
_MOST_DECIMALS = 9
_MOST_SAMPLES = 1024


# --- texts ------------------------------------------------------------------------------------------------------------


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
        bits_per_byte, bits_per_byte_stderr: The bits per UTF-8 byte, and the standard error over documents of the ratio
            of bits and bytes; None where the bytes are not known.
        kind: `exact` for `arm`; `bound`, an upper one, for `llada`; `exact (policy …)` where a policy decodes.
        tokens, documents, windows, bytes: The numbers of them; bytes None where they are not known.
        window, context: The largest number of tokens of a pass, and of those before the scored ones of every window but
            a document's first, which has none.
    """

    nats_per_token: float
    stderr: float
    monte_carlo_stderr: float
    perplexity: float
    bits_per_byte: float | None
    bits_per_byte_stderr: float | None
    kind: str
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
        UserError: A window or a stride out of range, no token at all, or as that function.
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
    numbered = [(n, pair) for n in kept for pair in windows(texts_ids[n], window, stride)]
    pairs = [pair for _, pair in numbered]
    scores = log_likelihood(lm, pairs, **options)
    nats = dict.fromkeys(kept, 0.0)
    for (n, _), score in zip(numbered, scores, strict=True):
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
        monte_carlo_stderr=monte_carlo_stderr(pairs, scores) / sum(tokens),
        perplexity=math.exp(mean) if mean < 700 else math.inf,
        bits_per_byte=bits,
        bits_per_byte_stderr=bits_stderr,
        kind=_kind(scores, lm.facts.val_kind),
        tokens=sum(tokens),
        documents=len(kept),
        windows=len(pairs),
        bytes=total_bytes,
        window=window,
        context=window - stride,
    )


def score_texts(
    lm: LanguageModel, texts: Sequence[str], window: int | None, stride: int | None, **options: Any
) -> dict[str, Any]:
    """The rolling score of texts in plain values, with the share of their bytes that ids do not give back."""
    text_bytes = [len(text.encode()) for text in texts]
    lost_share = sum(map(lm.lost_bytes, texts)) / sum(text_bytes)
    known = text_bytes if lost_share <= TOLERATED_LOSS else None
    score = rolling_log_likelihood(lm, [lm.encode(text) for text in texts], window, stride, text_bytes=known, **options)
    return {**vars(score), "lost_share": lost_share}


# --- pairs ------------------------------------------------------------------------------------------------------------

Results = tuple[dict[str, Any], list[dict[str, Any]]]
"""A summary, and a record for each result, in plain values."""


def score_continuations(lm: LanguageModel, pairs: Sequence[Pair], **options: Any) -> Results:
    """Nats per token over all continuations; `stderr` is over requests, `monte_carlo_stderr` is that of the masks.

    `lost_share` is the share of the continuations' bytes that their ids do not give back. The options are those of
    :func:`likelihood.log_likelihood`.
    """
    requests = [(pair.prompt, pair.continuations[0]) for pair in pairs]
    scores = log_likelihood(lm, requests, **options)
    scores = [replace(score, truncated=pair.truncated) for pair, score in zip(pairs, scores, strict=True)]
    byte_lengths = [pair.scored_bytes[0] for pair in pairs if pair.scored_bytes]
    nats, tokens = [-score.mean for score in scores], [score.tokens for score in scores]
    per_token, stderr = ratio_and_stderr(nats, tokens)
    bits = bits_stderr = None
    lost_share = sum(pair.lost_bytes for pair in pairs) / max(1, sum(byte_lengths))
    if len(byte_lengths) == len(pairs) and lost_share <= TOLERATED_LOSS:
        bits, bits_stderr = ratio_and_stderr([v / math.log(2) for v in nats], byte_lengths)
    summary = {
        "requests": len(scores),
        "tokens": sum(tokens),
        "truncated": sum(score.truncated > 0 for score in scores),
        "kind": _kind(scores),
        "nats_per_token": per_token,
        "stderr": stderr,
        "monte_carlo_stderr": monte_carlo_stderr(requests, scores) / sum(tokens),
        "bits_per_byte": bits,
        "bits_per_byte_stderr": bits_stderr,
        "lost_share": lost_share,
        "samples": sum(score.samples for score in scores),
    }
    return summary, [{"index": n, **_record(score)} for n, score in enumerate(scores)]


def score_choices(
    lm: LanguageModel,
    pairs: Sequence[Pair],
    normalisation: Normalisation = "none",
    confidence: float | None = None,
    *,
    samples: int,
    target_stderr: float | None = None,
    max_samples: int | None = None,
    **options: Any,
) -> Results:
    """Accuracy over the questions whose answer is known, with its standard error over questions.

    With a confidence each question is sampled until it is settled (:func:`ranking.rank_candidates`), else every choice
    gets as many samples (:func:`likelihood.log_likelihood`); the arguments are those of these functions.
    """
    if normalisation == "byte" and any(pair.written_bytes is None for pair in pairs):
        raise UserError("score: --normalisation byte needs texts or a tokenizer; give --tokenizer")
    byte_lengths = [pair.written_bytes or [] for pair in pairs]
    questions = [(pair.prompt, pair.continuations) for pair in pairs]
    if confidence is not None:
        most = max_samples or max(samples, _MOST_SAMPLES)
        rankings = rank_candidates(
            lm, questions, confidence, normalisation=normalisation, byte_lengths=byte_lengths, samples=samples,
            max_samples=most, **options,
        )  # fmt: skip
    else:
        sizes = candidate_sizes(lm, questions, normalisation, byte_lengths)
        requests = [(prompt, candidate) for prompt, candidates in questions for candidate in candidates]
        scores = iter(log_likelihood(lm, requests, samples, target_stderr, max_samples=max_samples, **options))
        rankings = [rank_scores([next(scores) for _ in each], each) for each in sizes]
    records: list[dict[str, Any]] = [
        {
            "index": index,
            "best": ranking.best,
            "answer": pair.answer,
            "correct": None if pair.answer is None else ranking.best == pair.answer,
            **({} if confidence is None else {"settled": ranking.settled}),
            "values": ranking.values,
            "choices": [_record(replace(score, truncated=pair.truncated)) for score in ranking.scores],
        }
        for index, (pair, ranking) in enumerate(zip(pairs, rankings, strict=True))
    ]
    correct = [float(record["correct"]) for record in records if record["correct"] is not None]
    error = float(np.std(correct, ddof=1)) / math.sqrt(len(correct)) if len(correct) > 1 else math.nan
    summary = {
        "questions": len(records),
        "answered": len(correct),
        "accuracy": float(np.mean(correct)) if correct else None,
        "accuracy_stderr": error if correct else None,
        "normalisation": normalisation,
        "confidence": confidence,
        **({} if confidence is None else {"settled": sum(ranking.settled for ranking in rankings)}),
        "truncated": sum(pair.truncated > 0 for pair in pairs),
        "samples": sum(score.samples for ranking in rankings for score in ranking.scores),
    }
    return summary, records


def _kind(scores: Sequence[Score], otherwise: str | None = None) -> str:
    """The kind of a sum of scores: that of the policy by which they are decoded, or a bound if one of them is."""
    kinds = {score.kind for score in scores}
    policies = kinds - {"exact", "bound"}
    return min(policies) if policies else otherwise or ("bound" if "bound" in kinds else "exact")


def _record(score: Score) -> dict[str, Any]:
    return {**vars(score), "kind": score.kind}


# --- for people -------------------------------------------------------------------------------------------------------


def print_report(console: Console, summary: dict[str, Any], results: Sequence[dict[str, Any]]) -> None:
    """A table of the first results and a line or two that sum up."""
    if "questions" in summary:
        _print_choices(console, summary, results)
    elif "requests" in summary:
        _print_scores(console, summary, results)
    else:
        _print_text(console, summary)
    if len(results) > _ROWS_SHOWN:
        console.print(f"({len(results) - _ROWS_SHOWN} more rows: --out FILE or --json has them all)")


def _print_scores(console: Console, summary: dict[str, Any], results: Sequence[dict[str, Any]]) -> None:
    table = Table("request", "log-likelihood, nats", "tokens", "kind", "method", "samples")
    for row in results[:_ROWS_SHOWN]:
        cells = (row["index"], _with_error(row["mean"], row["stderr"]), row["tokens"], row["kind"], row["method"])
        table.add_row(*map(str, cells), f"{row['samples']:,}")
    console.print(table)
    counts = f"over {counted(summary['requests'], 'request')}, {counted(summary['tokens'], 'token')}{_cut(summary)}"
    if summary["requests"] == 1:
        shown = _of_one(summary)
        console.print(f"{_per_token(shown)}{_masks_only(shown)} {counts}; one request has no standard error")
    else:
        console.print(f"{_per_token(summary)} {counts}")


def _print_choices(console: Console, summary: dict[str, Any], results: Sequence[dict[str, Any]]) -> None:
    per = "" if summary["normalisation"] == "none" else f" per {summary['normalisation']}"
    sampled_on = summary["confidence"] is not None
    table = Table(
        "question", "best", "answer", f"nats{per} of each choice", "kind", "samples", *["settled"] * sampled_on
    )
    for row in results[:_ROWS_SHOWN]:
        choices = row["choices"]
        values = [
            _with_error(value, choice["stderr"] * _scale(value, choice["mean"]))
            for value, choice in zip(row["values"], choices, strict=True)
        ]
        each = (values, [choice["kind"] for choice in choices], [f"{choice['samples']:,}" for choice in choices])
        answer = "" if row["answer"] is None else str(row["answer"])
        settled = ["yes" if row["settled"] else "no"] if sampled_on else []
        table.add_row(str(row["index"]), str(row["best"]), answer, *map("\n".join, each), *settled)
    console.print(table)
    if summary["accuracy"] is not None:
        accuracy = _with_error(summary["accuracy"], summary["accuracy_stderr"])
        console.print(f"accuracy {accuracy} over {counted(summary['answered'], 'question')}{_cut(summary)}")
    if sampled_on:
        at = f"at {summary['confidence']:g}"
        console.print(
            f"settled {at}: {summary['settled']:,} of {summary['questions']:,}; {counted(summary['samples'], 'sample')}"
        )


def _print_text(console: Console, summary: dict[str, Any]) -> None:
    context = f", each with {counted(summary['context'], 'token')} of context" if summary["context"] else ""
    one, spread = summary["documents"] == 1, summary["monte_carlo_stderr"]
    summary = _of_one(summary) if one else summary
    perplexity = _with_error(summary["perplexity"], summary["perplexity"] * summary["stderr"])  # to first order
    console.print(f"{_per_token(summary)}; perplexity {perplexity}{_masks_only(summary) if one else ''}")
    counts = ", ".join(counted(summary[f"{name}s"], name) for name in ("document", "token", "window"))
    part = "; one document has no standard error" if one else f"; of the error, {spread:.2g} is Monte Carlo"
    if not one and not spread > 0:  # arm; or one sample, which tells no error
        part = "" if spread == 0 else "; one sample tells no Monte Carlo error"
    console.print(f"{counts} of at most {counted(summary['window'], 'token')}{context}{part}")


def _of_one(summary: dict[str, Any]) -> dict[str, Any]:
    """The summary of one document or request, which has no error over several: its error is that of the masks."""
    spread = summary["monte_carlo_stderr"]
    bits = summary["bits_per_byte"]
    bits_stderr = None if bits is None else spread * _scale(bits, summary["nats_per_token"])
    return {**summary, "stderr": spread, "bits_per_byte_stderr": bits_stderr}


def _masks_only(summary: dict[str, Any]) -> str:
    return "" if summary["monte_carlo_stderr"] == 0 else " (Monte Carlo only)"


def _scale(value: float, of: float) -> float:
    """The factor by which a number, and so its error, was multiplied."""
    return value / of if of else math.nan


def _per_token(summary: dict[str, Any]) -> str:
    said = f"{_with_error(summary['nats_per_token'], summary['stderr'])} nats/token ({summary['kind']})"
    if summary["bits_per_byte"] is None:
        return said
    return f"{said}, {_with_error(summary['bits_per_byte'], summary['bits_per_byte_stderr'])} bits/byte"


def _cut(summary: dict[str, Any]) -> str:
    return f"; {summary['truncated']:,} with a prompt cut on its left" if summary["truncated"] else ""


def _with_error(value: float, stderr: float) -> str:
    """A value to the second digit of its error; ``?`` is an error that is not known."""
    if stderr == 0:
        return f"{value:.4f}"
    if not math.isfinite(stderr):
        return f"{value:.4f} ± ?"
    decimals = min(max(1 - math.floor(math.log10(stderr)), 0), _MOST_DECIMALS)
    return f"{value:.{decimals}f} ± {stderr:.{decimals}f}"
