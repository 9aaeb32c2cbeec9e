"""``llada score``: log-likelihoods of continuations, multiple choice, and perplexity of texts."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llada_lightning.commands.model_options import add_model_options, load
from llada_lightning.data.manifest import TOLERATED_LOSS, loss_note
from llada_lightning.evaluation.bound import REPLICATES, check_sampling
from llada_lightning.support.command_line import CommandParser, add_json, print_json
from llada_lightning.support.errors import UserError
from llada_lightning.support.files import expanded, require_replaceable, strict_json, written_atomically
from llada_lightning.support.printing import people_console, warn

if TYPE_CHECKING:
    from llada_lightning.checkpoints.language_model import LanguageModel
    from llada_lightning.evaluation.pairs_file import Pair
    from llada_lightning.evaluation.ranking import Normalisation

_FIXED_SAMPLES, _MOST_SAMPLES = 128, 1024


def score_parser() -> CommandParser:
    """The options of ``llada score``."""
    parser = CommandParser(
        prog="llada score",
        description="Log-likelihood in nats: exact for arm, the lower bound of Eq. 6 for llada.",
    )
    add_model_options(parser)
    what = parser.add_argument_group("what is scored", "one of the two")
    what.add_argument(
        "--pairs",
        type=str | None,
        default=None,
        metavar="FILE",
        help='JSONL: {"prompt": …, "continuation": …}, or {"prompt": …, "choices": […], "answer": 0}; texts or lists '
        "of token ids. White space at a prompt's end moves to the continuation",
    )
    what.add_argument(
        "--text",
        type=str | None,
        default=None,
        metavar="PATH",
        help="perplexity of long texts: a text file (one document), JSONL, or a folder of them, read as `llada prepare "
        "--source` reads them",
    )
    what.add_argument("--text-field", type=str | None, default=None, help="field of --text's JSONL with the text; text")
    what.add_argument("--window", type=int | None, default=None, help="tokens of a pass over --text; the context")
    what.add_argument(
        "--stride", type=int | None, default=None, help="new tokens of a window; the rest is context; the window"
    )
    what.add_argument("--truncate", choices=("left",), default=None, help="cut the left of prompts beyond the context")
    how = parser.add_argument_group("how")
    how.add_argument(
        "--samples",
        type=int | None,
        default=None,
        help=f"masks of each continuation (llada), {_FIXED_SAMPLES}; the first {REPLICATES} with --confidence; one has "
        "no standard error",
    )
    how.add_argument("--target-stderr", type=float | None, default=None, help="sample on until this error, in nats")
    how.add_argument(
        "--confidence", type=float | None, default=None, help="choices: sample on until the best is sure, as 0.99"
    )
    how.add_argument("--max-samples", type=int | None, default=None, help="where sampling on ends")
    how.add_argument(
        "--normalisation", choices=("none", "token", "byte"), default=None, help="choices: compare values per this"
    )
    how.add_argument("--cfg-scale", type=float, default=0.0, help="w of classifier-free guidance (Eq. 16), llada")
    how.add_argument("--seed", type=int, default=0, help="of the masks")
    how.add_argument("--batch-tokens", type=int | None, default=None, help="tokens of one forward pass")
    output = parser.add_argument_group("output")
    output.add_argument("--out", type=str | None, default=None, metavar="FILE", help="JSONL: a result a line")
    output.add_argument("--quiet", action="store_true", help="no progress on stderr")
    add_json(parser)
    return parser


def main(argv: list[str]) -> int:
    """Runs ``llada score`` with its arguments; returns the exit code.

    Raises:
        UserError: an option, the checkpoint or the file is not right.
    """
    options = score_parser().parse_args(argv)
    sampled = [name for name in ("samples", "target_stderr", "max_samples") if options[name] is not None]
    options.samples = _samples(options)
    _check(options)
    from llada_lightning.evaluation.score_report import print_report  # after the parser: --help answers at once

    lm = load(vars(options))
    if not lm.facts.masks and sampled:
        names = ", ".join(_option(name) for name in sampled)
        warn(f"note: {names}: without effect, the value of {lm.objective} is exact")
    sampling = {
        "cfg_scale": options.cfg_scale,
        "seed": options.seed,
        "batch_tokens": options.batch_tokens,
        "progress": False if options.quiet else None,
    }
    summary, results = _texts(lm, options, sampling) if options.text else _pairs(lm, options, sampling)
    summary = {"checkpoint": options.checkpoint, "objective": lm.objective, **summary}
    note = loss_note(summary.get("lost_share", 0.0))
    if note is not None:
        warn(note)
    if options.out:
        _write(expanded(options.out), results)
    if options.json:
        print_json({**summary, "results": results})
    else:
        print_report(people_console(), summary, results)
    return 0


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _samples(options: Any) -> int:
    default = _FIXED_SAMPLES if options.confidence is None else REPLICATES
    return default if options.samples is None else int(options.samples)


def _check(options: Any) -> None:
    """What can be said before the model is read."""
    if (options.pairs is None) == (options.text is None):
        given = "neither" if options.pairs is None else "both"
        raise UserError(f"score: --pairs and --text: {given} given; give one of them")
    check_sampling(
        options.samples,
        options.max_samples,
        options.target_stderr,
        options.confidence,
        options.cfg_scale,
        options.batch_tokens,
    )
    if options.confidence is not None and options.target_stderr is not None:
        raise UserError("score: --confidence and --target-stderr both say when to stop; give one of them")
    if options.max_samples is not None and options.confidence is None and options.target_stderr is None:
        raise UserError("score: --max-samples does nothing without --target-stderr or --confidence; give one of them")
    if options.confidence is not None and options.text:
        raise UserError("score: --confidence is of choices, and --text has none; use --target-stderr")
    given, idle = (
        ("--pairs", ("window", "stride", "text_field")) if options.pairs else ("--text", ("truncate", "normalisation"))
    )
    for name in idle:
        if options[name] is not None:
            raise UserError(f"score: {_option(name)} does nothing with {given}; leave it out")
    path = Path(options.pairs or options.text)
    if options.pairs and path.is_dir():
        raise UserError(f"score: --pairs '{path}' is a folder; give a JSONL file")
    if not (path.is_file() or path.is_dir()):
        raise UserError(f"score: {given} '{path}': no such file{' or folder' * bool(options.text)}; correct the path")
    if options.out:
        _check_out(expanded(options.out), path)


def _check_out(out: Path, source: Path) -> None:
    """Before hours of scoring: whether the results can be written."""
    require_replaceable(out)
    folder = Path(os.path.realpath(out)).parent  # a link's own folder does not matter
    if not folder.is_dir():
        raise UserError(f"score: --out {out}: there is no folder {folder}; make it, or choose another file")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"score: --out {out} cannot be written into {folder}; choose another file")
    if out.exists() and out.resolve().is_relative_to(source.resolve()):
        raise UserError(f"score: --out {out} is a file that is scored; choose another file")


def _pairs(lm: LanguageModel, options: Any, sampling: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    from llada_lightning.evaluation.pairs_file import read_pairs
    from llada_lightning.evaluation.score_report import choice_summary, likelihood_summary, score_record

    pairs = read_pairs(Path(options.pairs), lm, options.truncate)
    if pairs[0].is_choice:
        results = _choices(lm, pairs, options, sampling)
        return choice_summary(results, options.normalisation or "none", options.confidence), results
    if options.normalisation is not None:
        raise UserError(f"score: --normalisation is of choices, and {options.pairs} has continuations; leave it out")
    if options.confidence is not None:
        raise UserError(
            f"score: --confidence is of choices, and {options.pairs} has continuations; use --target-stderr"
        )
    scores = [
        replace(score, truncated=pair.truncated)
        for pair, score in zip(pairs, _scores(lm, pairs, options, sampling), strict=True)
    ]
    records = [{"index": n, **score_record(score)} for n, score in enumerate(scores)]
    return likelihood_summary(pairs, scores), records


def _scores(lm: LanguageModel, pairs: list[Pair], options: Any, sampling: dict[str, Any]) -> list[Any]:
    """The score of every continuation of every pair, one behind the other."""
    from llada_lightning.evaluation.likelihood import log_likelihood

    return log_likelihood(
        lm,
        [(pair.prompt, continuation) for pair in pairs for continuation in pair.continuations],
        options.samples,
        options.target_stderr,
        max_samples=options.max_samples,
        **sampling,
    )


def _choices(lm: LanguageModel, pairs: list[Pair], options: Any, sampling: dict[str, Any]) -> list[dict[str, Any]]:
    from llada_lightning.evaluation.ranking import candidate_sizes, rank_candidates, rank_scores
    from llada_lightning.evaluation.score_report import choice_record

    normalisation: Normalisation = options.normalisation or "none"
    bytes_each = [pair.written_bytes for pair in pairs]
    if normalisation == "byte" and None in bytes_each:
        raise UserError("score: --normalisation byte needs texts or a tokenizer; give --tokenizer")
    byte_lengths = [sizes or [] for sizes in bytes_each]
    questions = [(pair.prompt, pair.continuations) for pair in pairs]
    if options.confidence is not None:
        rankings = rank_candidates(
            lm,
            questions,
            options.confidence,
            normalisation=normalisation,
            byte_lengths=byte_lengths,
            samples=options.samples,
            max_samples=options.max_samples or max(options.samples, _MOST_SAMPLES),
            **sampling,
        )
    else:
        sizes = candidate_sizes(lm, questions, normalisation, byte_lengths)
        scores = iter(_scores(lm, pairs, options, sampling))
        rankings = [rank_scores([next(scores) for _ in each], each) for each in sizes]
    with_confidence = options.confidence is not None
    return [choice_record(n, *both, with_confidence) for n, both in enumerate(zip(pairs, rankings, strict=True))]


def _texts(lm: LanguageModel, options: Any, sampling: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    from llada_lightning.data.corpora import documents
    from llada_lightning.evaluation.rolling import rolling_log_likelihood

    texts = list(documents(options.text, text_field=options.text_field or "text"))
    if not texts:
        raise UserError(f"score: --text '{options.text}' holds no text")
    text_bytes = [len(text.encode()) for text in texts]
    lost_share = sum(map(lm.lost_bytes, texts)) / sum(text_bytes)
    score = rolling_log_likelihood(
        lm,
        [lm.encode(text) for text in texts],
        options.window,
        options.stride,
        text_bytes=text_bytes if lost_share <= TOLERATED_LOSS else None,
        samples=options.samples,
        target_stderr=options.target_stderr,
        max_samples=options.max_samples,
        **sampling,
    )
    values = {**vars(score), "lost_share": lost_share}
    return values, [values]


def _write(path: Path, results: list[dict[str, Any]]) -> None:
    try:
        with written_atomically(path) as temporary:
            lines = (json.dumps(strict_json(result), allow_nan=False) + "\n" for result in results)
            temporary.write_text("".join(lines), encoding="utf-8")
    except OSError as error:
        raise UserError(f"score: --out {path} cannot be written ({error.strerror}); choose another file") from error
