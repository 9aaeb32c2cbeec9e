"""``llada score``: log-likelihoods of continuations, multiple choice, and perplexity of texts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llada_lightning.command_line import CommandParser, add_json, people_console, print_json
from llada_lightning.errors import UserError
from llada_lightning.files import strict_json, written_atomically

if TYPE_CHECKING:
    from llada_lightning.checkpoints.language_model import LanguageModel
    from llada_lightning.evaluation.pairs_file import Pair

_FIXED_SAMPLES, _FIRST_SAMPLES, _MOST_SAMPLES = 128, 32, 1024


def score_parser() -> CommandParser:
    """The options of ``llada score``."""
    parser = CommandParser(
        prog="llada score",
        description="Log-likelihood in nats: exact for arm, the lower bound of Eq. 6 for llada.",
    )
    parser.add_argument(
        "checkpoint",
        type=str,
        metavar="CKPT",
        help="run folder, .ckpt, folder of `llada convert`, or Hugging Face folder of LLaDA or Llama",
    )
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
        metavar="FILE",
        help="perplexity of long texts: a text file (one document) or JSONL, as `llada prepare --source` takes them",
    )
    what.add_argument("--text-field", type=str, default="text", help="field of JSONL with the text")
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
        help=f"masks of each continuation (llada), {_FIXED_SAMPLES}; the first {_FIRST_SAMPLES} with --confidence",
    )
    how.add_argument("--target-stderr", type=float | None, default=None, help="sample on until this error, in nats")
    how.add_argument(
        "--confidence", type=float | None, default=None, help="choices: sample on until the best is sure, as 0.99"
    )
    how.add_argument("--max-samples", type=int | None, default=None, help="where sampling on ends")
    how.add_argument(
        "--normalisation", choices=("none", "token", "byte"), default="none", help="choices: compare values per this"
    )
    how.add_argument("--cfg-scale", type=float, default=0.0, help="w of classifier-free guidance (Eq. 16), llada")
    how.add_argument("--seed", type=int, default=0, help="of the masks")
    model = parser.add_argument_group("model")
    model.add_argument("--tokenizer", type=str | None, default=None, help="instead of the checkpoint's")
    model.add_argument("--device", type=str | None, default=None, help="cpu, cuda, cuda:1 …; a GPU where there is one")
    model.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default=None, help="as stored")
    model.add_argument("--batch-tokens", type=int | None, default=None, help="tokens of one forward pass")
    output = parser.add_argument_group("output")
    output.add_argument("--out", type=str | None, default=None, metavar="FILE", help="JSONL: a result a line")
    output.add_argument("--quiet", action="store_true", help="no progress on stderr")
    add_json(parser)
    return parser


def score_command(argv: list[str]) -> int:
    """Runs ``llada score`` with its arguments; returns the exit code.

    Raises:
        UserError: an option, the checkpoint or the file is not right.
    """
    options = score_parser().parse_args(argv)
    _check(options)
    from llada_lightning.checkpoints.load import load_model  # after the parser, so that --help answers at once
    from llada_lightning.evaluation.score_report import print_report

    lm = load_model(options.checkpoint, tokenizer=options.tokenizer, device=options.device, dtype=options.dtype)
    sampling = {
        "cfg_scale": options.cfg_scale,
        "seed": options.seed,
        "batch_tokens": options.batch_tokens,
        "progress": False if options.quiet else None,
    }
    summary, results = _texts(lm, options, sampling) if options.text else _pairs(lm, options, sampling)
    summary = {"checkpoint": options.checkpoint, "objective": lm.objective, **summary}
    if options.out:
        _write(Path(options.out), results)
    if options.json:
        print_json({**summary, "results": results})
    else:
        print_report(people_console(), summary, results)
    return 0


def _check(options: Any) -> None:
    """What can be said before the model is read."""
    if (options.pairs is None) == (options.text is None):
        given = "neither" if options.pairs is None else "both"
        raise UserError(f"score: --pairs and --text: {given} given; give one of them")
    least = 2 if options.confidence is not None else 1
    if options.samples is not None and options.samples < least:
        raise UserError(f"score: --samples is {options.samples}; it must be at least {least}")
    if options.target_stderr is not None and not options.target_stderr > 0:
        raise UserError(f"score: --target-stderr is {options.target_stderr}; it must be above 0 (nats)")
    if options.confidence is not None and not 0 < options.confidence < 1:
        raise UserError(f"score: --confidence is {options.confidence}; it must lie between 0 and 1, as 0.99")
    if options.confidence is not None and options.target_stderr is not None:
        raise UserError("score: --confidence and --target-stderr both say when to stop; give one of them")
    if options.confidence is not None and options.text:
        raise UserError("score: --confidence is of choices, and --text has none; use --target-stderr")
    path = options.pairs or options.text
    if not Path(path).is_file():
        raise UserError(f"score: {'--pairs' if options.pairs else '--text'} '{path}': no such file")


def _pairs(lm: LanguageModel, options: Any, sampling: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    from llada_lightning.evaluation.pairs_file import read_pairs
    from llada_lightning.evaluation.score_report import choice_summary, likelihood_summary, score_record

    pairs = read_pairs(Path(options.pairs), lm, options.truncate)
    sampling = {**sampling, "truncate": options.truncate}
    if pairs[0].is_choice:
        results = _choices(lm, pairs, options, sampling)
        return choice_summary(results, options.normalisation, options.confidence), results
    if options.confidence is not None:
        raise UserError(
            f"score: --confidence is of choices, and {options.pairs} has continuations; use --target-stderr"
        )
    scores = _scores(lm, pairs, options, sampling)
    records = [{"index": n, **score_record(score)} for n, score in enumerate(scores)]
    return likelihood_summary(scores, [pair.bytes[0] if pair.bytes else None for pair in pairs]), records


def _scores(lm: LanguageModel, pairs: list[Pair], options: Any, sampling: dict[str, Any]) -> list[Any]:
    """The score of every continuation of every pair, one behind the other."""
    from llada_lightning.evaluation.likelihood import log_likelihood

    return log_likelihood(
        lm,
        [(pair.prompt, continuation) for pair in pairs for continuation in pair.continuations],
        options.samples or _FIXED_SAMPLES,
        options.target_stderr,
        max_samples=options.max_samples,
        **sampling,
    )


def _choices(lm: LanguageModel, pairs: list[Pair], options: Any, sampling: dict[str, Any]) -> list[dict[str, Any]]:
    from llada_lightning.evaluation.ranking import candidate_sizes, rank_candidates, rank_scores
    from llada_lightning.evaluation.score_report import choice_record

    bytes_each = [pair.bytes for pair in pairs]
    if options.normalisation == "byte" and None in bytes_each:
        raise UserError("score: --normalisation byte needs texts or a tokenizer; give --tokenizer")
    byte_lengths = [sizes or [] for sizes in bytes_each]
    questions = [(pair.prompt, pair.continuations) for pair in pairs]
    if options.confidence is not None:
        samples = options.samples or _FIRST_SAMPLES
        rankings = rank_candidates(
            lm,
            questions,
            options.confidence,
            normalisation=options.normalisation,
            byte_lengths=byte_lengths,
            samples=samples,
            max_samples=options.max_samples or max(samples, _MOST_SAMPLES),
            **sampling,
        )
    else:
        sizes = candidate_sizes(lm, questions, options.normalisation, byte_lengths)
        scores = iter(_scores(lm, pairs, options, sampling))
        rankings = [rank_scores([next(scores) for _ in each], each) for each in sizes]
    return [choice_record(n, *both) for n, both in enumerate(zip(pairs, rankings, strict=True))]


def _texts(lm: LanguageModel, options: Any, sampling: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    from llada_lightning.data.corpora import documents
    from llada_lightning.evaluation.rolling import rolling_log_likelihood

    texts = list(documents(options.text, text_field=options.text_field))
    if not texts:
        raise UserError(f"score: --text '{options.text}' holds no text")
    score = rolling_log_likelihood(
        lm,
        [lm.encode(text) for text in texts],
        options.window,
        options.stride,
        text_bytes=[len(text.encode()) for text in texts],
        samples=options.samples or _FIXED_SAMPLES,
        target_stderr=options.target_stderr,
        max_samples=options.max_samples,
        **sampling,
    )
    return vars(score), [vars(score)]


def _write(path: Path, results: list[dict[str, Any]]) -> None:
    try:
        with written_atomically(path) as temporary:
            lines = (json.dumps(strict_json(result), allow_nan=False) + "\n" for result in results)
            temporary.write_text("".join(lines), encoding="utf-8")
    except OSError as error:
        raise UserError(f"score: --out {path} cannot be written ({error.strerror}); choose another file") from error
