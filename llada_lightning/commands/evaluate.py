"""``llada evaluate``: benchmarks through lm-evaluation-harness."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llada_lightning.commands import shared
from llada_lightning.data.manifest import loss_note
from llada_lightning.evaluation import suites
from llada_lightning.support.command_line import CommandParser, add_json, print_json
from llada_lightning.support.errors import UserError
from llada_lightning.support.files import expanded, write_json
from llada_lightning.support.printing import people_console, shortened, warn

if TYPE_CHECKING:
    from llada_lightning.evaluation.harness import HarnessModel

_ANSWERS = tuple(name for name in shared.SAMPLING if name not in ("cfg_scale", "seed"))
"""The settings of the sampler that only answers have; guidance and the seed are also those of likelihoods."""


def evaluate_parser() -> CommandParser:
    """The options of ``llada evaluate``."""
    parser = CommandParser(
        prog="llada evaluate",
        description="Benchmarks of a checkpoint, through lm-evaluation-harness. Tasks of our own: igsm (igsm_4, "
        "igsm_5, igsm_6), reversal and reversal_infill (each with _forward and _backward).",
    )
    shared.add_model_options(parser)
    what = parser.add_argument_group("what is measured", "a suite, tasks, or tasks under each row of an ablate- suite")
    add = what.add_argument
    tables = ", ".join(f"{name} (Table {each.table})" for name, each in suites.ABLATIONS.items())
    add("--suite", type=str | None, help=f"of the paper: {', '.join(suites.SUITES)}, {tables}")
    add("--tasks", type=str | None, help="names of lm-evaluation-harness, or ours: a,b,c")
    values = "instead of the scales, block lengths or lengths of an ablate- suite"
    add("--values", type=float, nargs="+", default=[], help=values)
    add(
        "--metadata",
        type=str,
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="for the tasks: pairs=FILE.json or pairs=facts:COUNT[@SEED], joiner and end of reversal; problems, "
        "problem_seed and system=false of igsm; of other tasks what they read",
    )
    add("--include-path", type=str | None, metavar="DIR", help="folder with task YAML files of yours")
    add("--shots", type=int | None, help="examples in the prompt; as the suite or task says")
    add("--limit", type=int | None, help="the first documents of each task only, for a try")
    add("--chat", action="store_true", help="prompts through the checkpoint's chat template")
    add("--unsafe-code", action="store_true", help="let tasks run what the model writes, in a sandbox")
    add("--each-result", action="store_true", help="of a run's folder, the checkpoint of each milestone and budget")
    add("--skip-missing", action="store_true", help="continue without tasks that cannot be loaded")
    likelihoods = parser.add_argument_group("likelihoods")
    shared.add_policy_options(likelihoods)
    add = likelihoods.add_argument
    add(
        "--monte-carlo",
        type=int,
        default=suites.MONTE_CARLO,
        help="masks of a continuation of several tokens (llada); one token is exact by one pass",
    )
    add("--batch-tokens", type=int | None, help="tokens of one forward pass")
    answers = parser.add_argument_group("answers", "instead of what the suite or task says")
    shared.add_sampling_options(answers, _ANSWERS, unset=True)
    answers.add_argument("--batch-size", type=int, default=8, help="prompts sampled together")
    both = parser.add_argument_group("both")
    shared.add_sampling_options(both, ["cfg_scale"], unset=True)
    both.add_argument("--seed", type=int, default=0, help="of masks and samples")
    add = parser.add_argument_group("output").add_argument
    add("--out", type=str | None, metavar="FILE", help="JSON with every metric")
    add("--quiet", action="store_true", help="no progress on stderr")
    add_json(parser)
    return parser


def main(argv: list[str]) -> int:
    """Runs ``llada evaluate`` with its arguments; returns the exit code.

    A checkpoint in a run's folder has its scores joined to that run's: `llada collect` gives them to the table.
    """
    options = evaluate_parser().parse_args(argv)
    sampling = _said(options)
    suite = suites.chosen_suite(options.suite, options.tasks, options.shots, options["values"], sampling)
    chat = suite.chat or options.chat
    _check(options)
    policy = shared.chosen_policy("evaluate", options)
    for name in ("TQDM_DISABLE", "HF_DATASETS_DISABLE_PROGRESS_BARS"):  # their bars would stand between ours
        os.environ.setdefault(name, "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("LMEVAL_LOG_LEVEL", "ERROR")
    try:  # here, since --help should not wait for them
        from llada_lightning.evaluation.benchmarks import check_varied, load_benchmarks, measure, unmeasured_results
        from llada_lightning.evaluation.harness import HarnessModel, join_processes
    except ModuleNotFoundError as error:
        raise UserError(f"evaluate: {error.name} is missing; pip install 'llada-lightning[eval]'") from error

    loaded = load_benchmarks(
        suite.benchmarks,
        Path(options.include_path) if options.include_path else None,
        {**_metadata(options), "chat": chat},
        options.unsafe_code,
        left_out=(lambda why: warn(f"note: left out: {why}")) if options.skip_missing else None,
    )
    options.device = join_processes(options.device)
    how = {"limit": options.limit, "chat": chat, "sampling": sampling, "unsafe_code": options.unsafe_code}
    groups = {each.row: each.group for each in suite.benchmarks if each.row and each.group}
    records: list[dict[str, Any]] = []
    checkpoints = [options.checkpoint]
    if options.each_result:
        names = {each.name for each in suite.benchmarks}
        settings = _settings(options, chat) | {"suite": options.suite}
        checkpoints = unmeasured_results(expanded(options.checkpoint), names, settings)
    for checkpoint in checkpoints:
        model = HarnessModel(
            shared.load(vars(options) | {"checkpoint": checkpoint}),
            monte_carlo=options.monte_carlo,
            cfg_scale=options.cfg_scale or 0.0,
            policy=policy,
            seed=options.seed,
            batch_size=options.batch_size,
            batch_tokens=options.batch_tokens,
            progress=False if options.quiet else None,
        )
        if options.suite in suites.ABLATIONS:
            check_varied(suites.ABLATIONS[options.suite], model.lm, loaded)
        outcomes = [outcome for each in loaded for outcome in measure(model, each, **how)]
        if model.rank == 0:
            _report(options, checkpoint, model, [*outcomes, *suites.best_rows(outcomes, groups)], chat, records)
            note = loss_note(model.lost_share, "byte_perplexity, bits_per_byte and word_perplexity are too low")
            if note is not None:
                warn(note)
    if options.json and records:
        print_json({"results": records} if options.each_result else records[0])
    return 0


def _check(options: Any) -> None:
    """What can be said before anything is read."""
    for name in ("limit", "monte_carlo", "batch_size", "batch_tokens", "length", "steps", "block_length", "top_k"):
        if options[name] is not None and options[name] < 1:
            raise UserError(f"--{name.replace('_', '-')} is {options[name]}; it must be at least 1")
    if options.shots is not None and options.shots < 0:
        raise UserError(f"--shots is {options.shots}; it must be at least 0")
    if options.out:
        shared.check_out("evaluate", expanded(options.out))


def _metadata(options: Any) -> dict[str, Any]:
    """What `--metadata` says: values are JSON, or else texts."""
    found: dict[str, Any] = {}
    for text in options.metadata:
        key, equals, value = text.partition("=")
        if not (key and equals):
            raise UserError(f"--metadata '{shortened(text, 60)}': write KEY=VALUE, such as pairs=pairs.json")
        try:
            found[key] = json.loads(value)
        except (ValueError, RecursionError):
            found[key] = value
    return found


def _report(
    options: Any,
    checkpoint: str,
    model: HarnessModel,
    outcomes: list[suites.Outcome],
    chat: bool,
    records: list[dict[str, Any]],
) -> None:
    """Print what came out, join it to the run, and add it to ``records``, which are written to `--out`."""
    from llada_lightning.evaluation.benchmarks import join_run

    settings = _settings(options, chat)
    record = {
        "checkpoint": checkpoint,
        "objective": model.lm.objective,
        "suite": options.suite,
        "settings": settings,
        "results": [vars(outcome) for outcome in outcomes],
    }
    records.append(record)
    if options.out:
        write_json(expanded(options.out), {"results": records} if options.each_result else record)
    joined = None
    if options.limit is None:  # a try is no result of a run
        joined = join_run(checkpoint, outcomes, settings | {"suite": options.suite})
    if options.json:
        return
    console = people_console()
    if options.each_result:
        console.print(checkpoint, soft_wrap=True, markup=False, highlight=False)
    ablation = suites.ABLATIONS.get(options.suite)
    console.print(suites.outcome_table(outcomes) if ablation is None else suites.row_table(ablation.title, outcomes))
    if any(outcome.best_of for outcome in outcomes):
        console.print("The best row is chosen by these very scores, so it is optimistic.", soft_wrap=True)
    for path in filter(None, (options.out, joined)):
        console.print(f"-> {path!s}", soft_wrap=True)


def _settings(options: Any, chat: bool) -> dict[str, Any]:
    """How it was measured, as far as the command says."""
    settings = {"monte_carlo": options.monte_carlo, "seed": options.seed, "limit": options.limit, "chat": chat}
    policy = shared.chosen_policy("evaluate", options)
    if policy is not None:
        settings["policy"] = policy.label
    if options.shots is not None:
        settings["shots"] = options.shots
    if options.metadata:
        settings["metadata"] = _metadata(options)
    if options.unsafe_code:
        from llada_lightning.evaluation.sandbox import is_isolated

        settings["sandbox"] = "namespaces" if is_isolated() else "limits only"
    return settings | _said(options)


def _said(options: Any) -> dict[str, Any]:
    """The settings of sampling that the options say."""
    return shared.given_settings(options, (*_ANSWERS, "cfg_scale"))
