"""``llada score``: log-likelihoods of continuations, multiple choice, and perplexity of texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llada_lightning.commands.shared import (
    add_model_options,
    add_policy_options,
    check_out,
    chosen_policy,
    load,
    write_lines,
)
from llada_lightning.data.manifest import loss_note
from llada_lightning.evaluation.bound import REPLICATES, check_sampling
from llada_lightning.support.command_line import CommandParser, add_json, print_json
from llada_lightning.support.errors import UserError
from llada_lightning.support.files import expanded
from llada_lightning.support.printing import people_console, warn

_FIXED_SAMPLES = 128


def score_parser() -> CommandParser:
    """The options of ``llada score``."""
    parser = CommandParser(
        prog="llada score",
        description="Log-likelihood in nats: exact for arm; for llada the lower bound of Eq. 6, or with --policy the "
        "exact value of decoding by it.",
    )
    add_model_options(parser)
    add = parser.add_argument_group("what is scored", "one of the two").add_argument
    add(
        "--pairs",
        type=str | None,
        metavar="FILE",
        help='JSONL: {"prompt": …, "continuation": …}, or {"prompt": …, "choices": […], "answer": 0}; texts or lists '
        "of token ids. White space at a prompt's end moves to the continuation",
    )
    add(
        "--text",
        type=str | None,
        metavar="PATH",
        help="perplexity of long texts: a text file (one document), JSONL, or a folder of them, read as `llada prepare "
        "--source` reads them",
    )
    add("--text-field", type=str | None, help="field of --text's JSONL with the text; text")
    add("--window", type=int | None, help="tokens of a pass over --text; the context")
    add("--stride", type=int | None, help="new tokens of a window; the rest is context; the window")
    add("--truncate", choices=("left",), help="cut the left of prompts beyond the context")
    how = parser.add_argument_group("how")
    add_policy_options(how)
    add = how.add_argument
    add(
        "--samples",
        type=int | None,
        help=f"masks of each continuation (llada), or noisy copies of it (uniform), {_FIXED_SAMPLES}; the first "
        f"{REPLICATES} with --confidence; one has no standard error",
    )
    add("--target-stderr", type=float | None, help="sample on until this error, in nats")
    add("--confidence", type=float | None, help="choices: sample on until the best is sure, as 0.99")
    add("--max-samples", type=int | None, help="where sampling on ends")
    add("--normalisation", choices=("none", "token", "byte"), help="choices: compare values per this")
    add("--cfg-scale", type=float, default=0.0, help="w of classifier-free guidance (Eq. 16), llada")
    add("--seed", type=int, default=0, help="of the masks")
    add("--batch-tokens", type=int | None, help="tokens of one forward pass")
    add = parser.add_argument_group("output").add_argument
    add("--out", type=str | None, metavar="FILE", help="JSONL: a result a line")
    add("--quiet", action="store_true", help="no progress on stderr")
    add_json(parser)
    return parser


def main(argv: list[str]) -> int:
    """Runs ``llada score`` with its arguments; returns the exit code."""
    options = score_parser().parse_args(argv)
    sampled = [name for name in ("samples", "target_stderr", "max_samples") if options[name] is not None]
    if options.samples is None:
        options.samples = _FIXED_SAMPLES if options.confidence is None else REPLICATES
    _check(options)
    policy = chosen_policy("score", options)
    from llada_lightning.evaluation.scoring import print_report, score_texts  # after the parser: --help answers at once

    lm = load(vars(options))
    if sampled and (policy is not None or not lm.facts.denoises):
        without = ", ".join(map(_option, sampled))
        exact = lm.objective if policy is None else f"a policy ({policy.label})"
        warn(f"note: {without}: without effect, the value of {exact} is exact")
    how = {
        name: options[name] for name in ("samples", "target_stderr", "max_samples", "cfg_scale", "seed", "batch_tokens")
    }
    how |= {"progress": False if options.quiet else None, "policy": policy}
    if policy is not None:  # nothing is drawn
        how |= {"target_stderr": None, "max_samples": None}
    if options.text:
        summary = score_texts(lm, _texts(options), options.window, options.stride, **how)
        results = [summary]
    else:
        summary, results = _pairs(lm, options, how)
    summary = {"checkpoint": options.checkpoint, "objective": lm.objective, **summary}
    note = loss_note(summary.get("lost_share", 0.0))
    if note is not None:
        warn(note)
    if options.out:
        write_lines(expanded(options.out), results)
    if options.json:
        print_json({**summary, "results": results})
    else:
        print_report(people_console(), summary, results)
    return 0


def _texts(options: Any) -> list[str]:
    from llada_lightning.data.corpora import documents

    texts = list(documents(options.text, text_field=options.text_field or "text"))
    if not texts:
        raise UserError(f"score: --text '{options.text}' holds no text")
    return texts


def _pairs(lm: Any, options: Any, how: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    from llada_lightning.evaluation.requests import read_pairs
    from llada_lightning.evaluation.scoring import score_choices, score_continuations

    pairs = read_pairs(Path(options.pairs), lm, options.truncate)
    if pairs[0].is_choice:
        if options.confidence is not None:
            how = {name: value for name, value in how.items() if name != "policy"}
        return score_choices(lm, pairs, options.normalisation or "none", options.confidence, **how)
    if options.normalisation is not None:
        raise UserError(f"score: --normalisation is of choices, and {options.pairs} has continuations; leave it out")
    if options.confidence is not None:
        raise UserError(
            f"score: --confidence is of choices, and {options.pairs} has continuations; use --target-stderr"
        )
    return score_continuations(lm, pairs, **how)


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _check(options: Any) -> None:
    """What can be said before the model is read."""
    if (options.pairs is None) == (options.text is None):
        given = "neither" if options.pairs is None else "both"
        raise UserError(f"score: --pairs and --text: {given} given; give one of them")
    names = ("samples", "max_samples", "target_stderr", "confidence", "cfg_scale", "batch_tokens")
    check_sampling(**{name: options[name] for name in names})
    if options.confidence is not None and options.target_stderr is not None:
        raise UserError("score: --confidence and --target-stderr both say when to stop; give one of them")
    if options.max_samples is not None and options.confidence is None and options.target_stderr is None:
        raise UserError("score: --max-samples does nothing without --target-stderr or --confidence; give one of them")
    if options.confidence is not None and options.policy is not None:
        raise UserError("score: --confidence samples on, and the value of a --policy is exact; leave one of them out")
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
        out = expanded(options.out)
        check_out("score", out)
        if out.exists() and out.resolve().is_relative_to(path.resolve()):
            raise UserError(f"score: --out {out} is a file that is scored; choose another file")
