"""``llada evaluate``: benchmarks through lm-evaluation-harness."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llada_lightning.commands.model_options import (
    SAMPLING,
    add_model_options,
    add_sampling_options,
    given_settings,
    load,
)
from llada_lightning.data.manifest import loss_note
from llada_lightning.evaluation.outcomes import Outcome, best_rows, outcome_table, row_table
from llada_lightning.evaluation.suites import ABLATIONS, SUITES, Ablation, Benchmark, Suite, suite_named
from llada_lightning.generation.sampling import only_left_to_right
from llada_lightning.support.cluster import launched
from llada_lightning.support.command_line import CommandParser, add_json, print_json
from llada_lightning.support.errors import UserError
from llada_lightning.support.files import expanded, require_replaceable, write_json
from llada_lightning.support.printing import people_console, shortened, warn

if TYPE_CHECKING:
    from llada_lightning.evaluation.benchmarks import Loaded
    from llada_lightning.evaluation.harness import HarnessModel

_ANSWERS = tuple(name for name in SAMPLING if name not in ("cfg_scale", "seed"))
"""The settings of the sampler that only answers have; guidance and the seed are also those of likelihoods."""

_MONTE_CARLO = 128


def evaluate_parser() -> CommandParser:
    """The options of ``llada evaluate``."""
    parser = CommandParser(
        prog="llada evaluate",
        description="Benchmarks of a checkpoint, through lm-evaluation-harness. Tasks of our own: igsm (igsm_4, "
        "igsm_5, igsm_6), reversal and reversal_infill (each with _forward and _backward).",
    )
    add_model_options(parser)
    add = parser.add_argument_group(
        "what is measured", "a suite, tasks, or tasks under each row of an ablate- suite"
    ).add_argument
    tables = ", ".join(f"{name} (Table {each.table})" for name, each in ABLATIONS.items())
    add("--suite", type=str | None, help=f"of the paper: {', '.join(SUITES)}, {tables}")
    add("--tasks", type=str | None, help="names of lm-evaluation-harness, or ours: a,b,c")
    add(
        "--values",
        type=float,
        nargs="+",
        default=[],
        help="instead of the scales, block lengths or lengths of an ablate- suite",
    )
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
    add("--skip-missing", action="store_true", help="continue without tasks that cannot be loaded")
    add = parser.add_argument_group("likelihoods").add_argument
    add(
        "--monte-carlo",
        type=int,
        default=_MONTE_CARLO,
        help="masks of a continuation of several tokens (llada); one token is exact by one pass",
    )
    add("--batch-tokens", type=int | None, help="tokens of one forward pass")
    answers = parser.add_argument_group("answers", "instead of what the suite or task says")
    add_sampling_options(answers, _ANSWERS, unset=True)
    answers.add_argument("--batch-size", type=int, default=8, help="prompts sampled together")
    both = parser.add_argument_group("both")
    add_sampling_options(both, ["cfg_scale"], unset=True)
    both.add_argument("--seed", type=int, default=0, help="of masks and samples")
    add = parser.add_argument_group("output").add_argument
    add("--out", type=str | None, metavar="FILE", help="JSON with every metric")
    add("--quiet", action="store_true", help="no progress on stderr")
    add_json(parser)
    return parser


def main(argv: list[str]) -> int:
    """Runs ``llada evaluate`` with its arguments; returns the exit code.

    A checkpoint in a run's folder has its scores joined to that run's: `llada collect` gives them to the table.

    Raises:
        UserError: an option, the checkpoint, a task or its data is not right.
    """
    options = evaluate_parser().parse_args(argv)
    ablation = ABLATIONS.get(options.suite)
    suite = _suite(options)
    chat = suite.chat or options.chat
    _check(options)
    sampling = _said(options)
    model, loaded = _prepared(options, suite, chat)
    if ablation is not None:
        _check_varied(ablation, model, loaded)
    from llada_lightning.evaluation.benchmarks import measure

    outcomes = [
        outcome
        for each in loaded
        for outcome in measure(
            model, each, limit=options.limit, chat=chat, sampling=sampling, unsafe_code=options.unsafe_code
        )
    ]
    if model.rank == 0:
        groups = {each.row: each.group for each in suite.benchmarks if each.row and each.group}
        _report(options, model, [*outcomes, *best_rows(outcomes, groups)], chat)
        note = loss_note(model.lost_share, "byte_perplexity, bits_per_byte and word_perplexity are too low")
        if note is not None:
            warn(note)
    return 0


def _prepared(options: Any, suite: Suite, chat: bool) -> tuple[HarnessModel, list[Loaded]]:
    """The model and the benchmarks with their data, as the options of a command say.

    Raises:
        UserError: lm-evaluation-harness is missing, the checkpoint, a task or its data is not right.
    """
    _quiet_libraries()
    # Here, since --help should not wait for them.
    try:
        from llada_lightning.evaluation.benchmarks import load_benchmark, require_code_allowed, task_manager
        from llada_lightning.evaluation.harness import HarnessModel
    except ModuleNotFoundError as error:
        raise UserError(f"evaluate: {error.name} is missing; pip install 'llada-lightning[eval]'") from error

    include_path = Path(options.include_path) if options.include_path else None
    manager = task_manager(suite.benchmarks, include_path, {**_metadata(options), "chat": chat})
    once = {benchmark.task: benchmark for benchmark in suite.benchmarks}  # a task has several rows in a table
    if not options.skip_missing:
        for benchmark in once.values():  # before gigabytes are loaded
            require_code_allowed(manager, benchmark, options.unsafe_code)
    read = {}
    for benchmark in once.values():
        try:
            read[benchmark.task] = load_benchmark(manager, benchmark, options.unsafe_code)
        except UserError as error:
            if not options.skip_missing:
                raise
            warn(f"note: left out: {error}")
    loaded = [replace(read[each.task], benchmark=each) for each in suite.benchmarks if each.task in read]
    if not loaded:
        raise UserError("evaluate: no task is left")
    _join_processes(options)
    model = HarnessModel(
        load(vars(options)),
        monte_carlo=options.monte_carlo,
        cfg_scale=options.cfg_scale or 0.0,
        seed=options.seed,
        batch_size=options.batch_size,
        batch_tokens=options.batch_tokens,
        progress=False if options.quiet else None,
    )
    return model, loaded


def _suite(options: Any) -> Suite:
    """What is to be measured.

    Raises:
        UserError: Neither a suite nor tasks are given, or both; a table of settings has no tasks, or an option says
            what it varies.
    """
    chosen = None if options.suite is None else suite_named(options.suite)
    if options["values"] and not isinstance(chosen, Ablation):
        raise UserError(f"--values is of the suites {', '.join(ABLATIONS)}; leave it out, or name one")
    if isinstance(chosen, Ablation):
        if options.tasks is None:
            raise UserError(f"--suite {options.suite}: which tasks? give them with --tasks, as --tasks gsm8k")
        for name in sorted(chosen.varied & _said(options).keys()):
            raise UserError(f"--{name.replace('_', '-')} is what Table {chosen.table} varies; leave it out")
        return chosen.suite(_named_tasks(options), options["values"])
    if (chosen is None) == (options.tasks is None):
        given = "neither" if chosen is None else "both"
        raise UserError(f"evaluate: --suite and --tasks: {given} given; give one of them")
    if chosen is not None:
        if options.shots is not None:
            raise UserError(f"--shots {options.shots}: the suite says its own; leave it out, or name --tasks")
        return chosen
    return Suite(_named_tasks(options))


def _named_tasks(options: Any) -> tuple[Benchmark, ...]:
    names = list(dict.fromkeys(name.strip() for name in options.tasks.split(",") if name.strip()))
    if not names:
        raise UserError(f"--tasks '{options.tasks}' names no task; give names, as --tasks piqa,arc_challenge")
    return tuple(Benchmark(name, name, shots=options.shots) for name in names)


def _check_varied(ablation: Ablation, model: HarnessModel, loaded: list[Loaded]) -> None:
    """Whether the table asks something of this model and these tasks."""
    if only_left_to_right(model.lm):
        raise UserError(
            f"'{model.lm.name}' is an {model.lm.objective}, which has no {ablation.question} to vary; "
            "give a llada checkpoint"
        )
    for each in loaded:
        generated = any(part.OUTPUT_TYPE == "generate_until" for part in each.parts)
        if generated != (ablation.scored == "generation"):
            kind = "sampled answers" if generated else "likelihoods"
            raise UserError(
                f"task '{each.benchmark.name}' is of {kind}, and Table {ablation.table} varies the {ablation.scored}; "
                "name another task"
            )


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


def _check(options: Any) -> None:
    """What can be said before anything is read."""
    for name in ("limit", "monte_carlo", "batch_size", "batch_tokens", "length", "steps", "block_length", "top_k"):
        if options[name] is not None and options[name] < 1:
            raise UserError(f"--{name.replace('_', '-')} is {options[name]}; it must be at least 1")
    if options.shots is not None and options.shots < 0:
        raise UserError(f"--shots is {options.shots}; it must be at least 0")
    if options.out:
        require_replaceable(expanded(options.out))
        folder = Path(os.path.realpath(expanded(options.out))).parent
        if not folder.is_dir():
            raise UserError(f"evaluate: --out {options.out}: there is no folder {folder}; make it, or choose another")


def _quiet_libraries() -> None:
    """The bars and notices of libraries would stand between ours."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("LMEVAL_LOG_LEVEL", "ERROR")


def _join_processes(options: Any) -> None:
    """Where torchrun or srun started several: the documents are spread over them, each on a device of its own."""
    launch = launched()
    if launch is None or launch.processes == 1:
        return
    import torch
    import torch.distributed as dist

    if launch.launcher != "torchrun":
        raise UserError(f"evaluate: {launch.launcher} started {launch.processes} processes; start them by torchrun")
    if options.device is None and torch.cuda.is_available():
        options.device = f"cuda:{launch.local_rank}"
    if not dist.is_initialized():
        dist.init_process_group("gloo")  # only scores go over it


def _report(options: Any, model: HarnessModel, outcomes: list[Outcome], chat: bool) -> None:
    record = {
        "checkpoint": options.checkpoint,
        "objective": model.lm.objective,
        "suite": options.suite,
        "settings": _settings(options, chat),
        "results": [vars(outcome) for outcome in outcomes],
    }
    if options.out:
        write_json(expanded(options.out), record)
    joined = _join_run(options, outcomes, chat)
    if options.json:
        print_json(record)
        return
    console = people_console()
    ablation = ABLATIONS.get(options.suite)
    console.print(outcome_table(outcomes) if ablation is None else row_table(ablation.title, outcomes))
    if any(outcome.best_of for outcome in outcomes):
        console.print("The best row is chosen by these very scores, so it is optimistic.", soft_wrap=True)
    for path in filter(None, (options.out, joined)):
        console.print(f"-> {path!s}", soft_wrap=True)


def _settings(options: Any, chat: bool) -> dict[str, Any]:
    """How it was measured, as far as the command says."""
    common = {"monte_carlo": options.monte_carlo, "seed": options.seed, "limit": options.limit, "chat": chat}
    metadata = {"metadata": _metadata(options)} if options.metadata else {}
    return common | metadata | _sandbox(options) | _said(options)


def _sandbox(options: Any) -> dict[str, Any]:
    """The kind of sandbox in which the programs that the model wrote were run, where that was allowed."""
    if not options.unsafe_code:
        return {}
    from llada_lightning.evaluation.sandbox import is_isolated

    return {"sandbox": "namespaces" if is_isolated() else "limits only"}


def _said(options: Any) -> dict[str, Any]:
    """The settings of sampling that the options say."""
    return given_settings(options, (*_ANSWERS, "cfg_scale"))


def _join_run(options: Any, outcomes: list[Outcome], chat: bool) -> Path | None:
    """Adds scores in percent to the evaluations of the run that the checkpoint lies in; None where there is no run.

    A limited evaluation, or one under settings that a table varies, is no result of a run, and stays out.
    """
    from llada_lightning.checkpoints.run_folder import CONFIG, final_checkpoint, run_folder_of, saved_step
    from llada_lightning.records import write_evaluations

    path = Path(options.checkpoint)
    checkpoint = final_checkpoint(path) if path.is_dir() and (path / CONFIG).is_file() else path
    run = None if checkpoint is None else run_folder_of(checkpoint)
    shares = [outcome for outcome in outcomes if outcome.is_share and outcome.row is None]
    if checkpoint is None or run is None or not shares or options.limit is not None:
        return None
    settings = json.dumps(_settings(options, chat) | {"suite": options.suite}, sort_keys=True)
    step = saved_step(checkpoint)
    return write_evaluations(run, [outcome.as_row(step, settings) for outcome in shares])
