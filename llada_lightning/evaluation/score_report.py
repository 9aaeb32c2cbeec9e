"""What ``llada score`` prints: summaries in plain values, and tables for people."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from llada_lightning.data.manifest import TOLERATED_LOSS
from llada_lightning.evaluation.pairs_file import Pair
from llada_lightning.evaluation.ranking import Ranking
from llada_lightning.evaluation.requests import Score, monte_carlo_stderr
from llada_lightning.objectives.standard_errors import ratio_and_stderr

_ROWS_SHOWN = 40
_MOST_DECIMALS = 9


def score_record(score: Score) -> dict[str, Any]:
    """A score in plain values."""
    return {**vars(score), "kind": score.kind}


def choice_record(index: int, pair: Pair, ranking: Ranking, with_confidence: bool) -> dict[str, Any]:
    """One question in plain values; ``correct`` is None where the answer is not known."""
    settled = {"settled": ranking.settled} if with_confidence else {}
    return {
        "index": index,
        "best": ranking.best,
        "answer": pair.answer,
        "correct": None if pair.answer is None else ranking.best == pair.answer,
        **settled,
        "values": ranking.values,
        "choices": [score_record(replace(score, truncated=pair.truncated)) for score in ranking.scores],
    }


def likelihood_summary(pairs: Sequence[Pair], scores: Sequence[Score]) -> dict[str, Any]:
    """Nats per token over all continuations; ``stderr`` is over requests, ``monte_carlo_stderr`` is the masks'.

    ``lost_share`` is the share of the continuations' bytes that their ids do not give back.
    """
    byte_lengths = [pair.scored_bytes[0] for pair in pairs if pair.scored_bytes]
    spread = monte_carlo_stderr([(pair.prompt, pair.continuations[0]) for pair in pairs], scores)
    nats = [-score.mean for score in scores]
    tokens = [score.tokens for score in scores]
    per_token, stderr = ratio_and_stderr(nats, tokens)
    bits = bits_stderr = None
    lost_share = sum(pair.lost_bytes for pair in pairs) / max(1, sum(byte_lengths))
    if len(byte_lengths) == len(pairs) and lost_share <= TOLERATED_LOSS:
        bits, bits_stderr = ratio_and_stderr([v / math.log(2) for v in nats], byte_lengths)
    return {
        "requests": len(scores),
        "tokens": sum(tokens),
        "truncated": sum(score.truncated > 0 for score in scores),
        "kind": _kind(scores),
        "nats_per_token": per_token,
        "stderr": stderr,
        "monte_carlo_stderr": spread / sum(tokens),
        "bits_per_byte": bits,
        "bits_per_byte_stderr": bits_stderr,
        "lost_share": lost_share,
        "samples": sum(score.samples for score in scores),
    }


def choice_summary(results: Sequence[dict[str, Any]], normalisation: str, confidence: float | None) -> dict[str, Any]:
    """Accuracy over the questions whose answer is known, with its standard error over questions."""
    correct = [float(result["correct"]) for result in results if result["correct"] is not None]
    error = float(np.std(correct, ddof=1)) / math.sqrt(len(correct)) if len(correct) > 1 else math.nan
    settled = {} if confidence is None else {"settled": sum(result["settled"] for result in results)}
    return {
        "questions": len(results),
        "answered": len(correct),
        "accuracy": float(np.mean(correct)) if correct else None,
        "accuracy_stderr": error if correct else None,
        "normalisation": normalisation,
        "confidence": confidence,
        **settled,
        "truncated": sum(any(choice["truncated"] for choice in result["choices"]) for result in results),
        "samples": sum(choice["samples"] for result in results for choice in result["choices"]),
    }


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


def _kind(scores: Sequence[Score]) -> str:
    return "exact" if all(score.kind == "exact" for score in scores) else "bound"


def _print_scores(console: Console, summary: dict[str, Any], results: Sequence[dict[str, Any]]) -> None:
    table = Table("request", "log-likelihood, nats", "tokens", "kind", "method", "samples")
    for row in results[:_ROWS_SHOWN]:
        cells = (row["index"], _with_error(row["mean"], row["stderr"]), row["tokens"], row["kind"], row["method"])
        table.add_row(*map(str, cells), f"{row['samples']:,}")
    console.print(table)
    counts = f"over {_count(summary['requests'], 'request')}, {_count(summary['tokens'], 'token')}{_cut(summary)}"
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
        console.print(f"accuracy {accuracy} over {_count(summary['answered'], 'question')}{_cut(summary)}")
    if sampled_on:
        at = f"at {summary['confidence']:g}"
        console.print(
            f"settled {at}: {summary['settled']:,} of {summary['questions']:,}; {_count(summary['samples'], 'sample')}"
        )


def _print_text(console: Console, summary: dict[str, Any]) -> None:
    context = f", each with {_count(summary['context'], 'token')} of context" if summary["context"] else ""
    one, spread = summary["documents"] == 1, summary["monte_carlo_stderr"]
    summary = _of_one(summary) if one else summary
    perplexity = _with_error(summary["perplexity"], summary["perplexity"] * summary["stderr"])  # to first order
    console.print(f"{_per_token(summary)}; perplexity {perplexity}{_masks_only(summary) if one else ''}")
    counts = ", ".join(_count(summary[f"{name}s"], name) for name in ("document", "token", "window"))
    part = "; one document has no standard error" if one else f"; of the error, {spread:.2g} is Monte Carlo"
    if not one and not spread > 0:  # arm; or one sample, which tells no error
        part = "" if spread == 0 else "; one sample tells no Monte Carlo error"
    console.print(f"{counts} of at most {_count(summary['window'], 'token')}{context}{part}")


def _of_one(summary: dict[str, Any]) -> dict[str, Any]:
    """Of one document or request, which have no error over several: that of the masks is left."""
    spread = summary["monte_carlo_stderr"]
    bits = summary["bits_per_byte"]
    bits_stderr = None if bits is None else spread * _scale(bits, summary["nats_per_token"])
    return {**summary, "stderr": spread, "bits_per_byte_stderr": bits_stderr}


def _masks_only(summary: dict[str, Any]) -> str:
    return "" if summary["monte_carlo_stderr"] == 0 else " (Monte Carlo only)"


def _scale(value: float, of: float) -> float:
    """What a number was multiplied by, and so its error."""
    return value / of if of else math.nan


def _per_token(summary: dict[str, Any]) -> str:
    said = f"{_with_error(summary['nats_per_token'], summary['stderr'])} nats/token ({summary['kind']})"
    if summary["bits_per_byte"] is None:
        return said
    return f"{said}, {_with_error(summary['bits_per_byte'], summary['bits_per_byte_stderr'])} bits/byte"


def _cut(summary: dict[str, Any]) -> str:
    return f"; {summary['truncated']:,} with a prompt cut on its left" if summary["truncated"] else ""


def _count(number: int, name: str) -> str:
    return f"{number:,} {name}" if number == 1 else f"{number:,} {name}s"


def _with_error(value: float, stderr: float) -> str:
    """A value to the second digit of its error; ``?`` is an error that is not known."""
    if stderr == 0:
        return f"{value:.4f}"
    if not math.isfinite(stderr):
        return f"{value:.4f} ± ?"
    decimals = min(max(1 - math.floor(math.log10(stderr)), 0), _MOST_DECIMALS)
    return f"{value:.{decimals}f} ± {stderr:.{decimals}f}"
