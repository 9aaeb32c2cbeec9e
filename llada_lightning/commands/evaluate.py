"""``llada evaluate``: benchmarks through lm-evaluation-harness."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from llada_lightning.commands.model_options import REMASKINGS, STRATEGIES, add_model_options, load
from llada_lightning.data.manifest import loss_note
from llada_lightning.evaluation.suites import SUITES, Benchmark, Suite, suite_named
from llada_lightning.support.cluster import launched
from llada_lightning.support.command_line import CommandParser, add_json, print_json
from llada_lightning.support.errors import UserError
from llada_lightning.support.files import expanded, require_replaceable, write_json
from llada_lightning.support.printing import people_console, warn

if TYPE_CHECKING:
    from llada_lightning.evaluation.benchmarks import Loaded, Outcome
    from llada_lightning.evaluation.harness import HarnessModel

_SAMPLING = (
    "length", "steps", "block_length", "strategy", "remasking", "threshold", "zero_eos_confidence", "cfg_scale",
)  # fmt: skip
_MONTE_CARLO = 128


def evaluate_parser() -> CommandParser:
    """The options of ``llada evaluate``."""
    parser = CommandParser(
        prog="llada evaluate", description="Benchmarks of a checkpoint, through lm-evaluation-harness."
    )
    add_evaluation_options(parser)
    return parser


def add_evaluation_options(parser: CommandParser) -> None:
    """What is measured and how; of `llada ablate` too."""
    add_model_options(parser)
    what = parser.add_argument_group("what is measured", "one of the first two")
    what.add_argument("--suite", type=str | None, default=None, help=f"of the paper: {', '.join(SUITES)}")
    what.add_argument("--tasks", type=str | None, default=None, help="names of lm-evaluation-harness: a,b,c")
    what.add_argument(
        "--include-path", type=str | None, default=None, metavar="DIR", help="folder with task YAML files of yours"
    )
    what.add_argument(
        "--shots", type=int | None, default=None, help="examples in the prompt; as the suite or task says"
    )
    what.add_argument("--limit", type=int | None, default=None, help="the first documents of each task only, for a try")
    what.add_argument("--chat", action="store_true", help="prompts through the checkpoint's chat template")
    what.add_argument("--unsafe-code", action="store_true", help="let tasks run what the model writes, in a sandbox")
    what.add_argument("--skip-missing", action="store_true", help="go on without tasks that cannot be loaded")
    how = parser.add_argument_group("likelihoods")
    how.add_argument(
        "--monte-carlo",
        type=int,
        default=_MONTE_CARLO,
        help="masks of a continuation of several tokens (llada); one token is exact by one pass",
    )
    how.add_argument("--batch-tokens", type=int | None, default=None, help="tokens of one forward pass")
    answers = parser.add_argument_group("answers", "instead of what the suite or task says")
    answers.add_argument("--length", type=int | None, default=None, help="tokens of an answer")
    answers.add_argument("--steps", type=int | None, default=None, help="of an answer (llada)")
    answers.add_argument("--block-length", type=int | None, default=None, help="tokens denoised together (llada)")
    answers.add_argument("--strategy", choices=STRATEGIES, default=None, help="llada; see llada generate --help")
    answers.add_argument("--remasking", choices=REMASKINGS, default=None, help="llada")
    answers.add_argument("--threshold", type=float | None, default=None, help="instead of steps (llada)")
    answers.add_argument("--zero-eos-confidence", action="store_true", help="predictions of EOS are kept last (llada)")
    answers.add_argument("--batch-size", type=int, default=8, help="prompts sampled together")
    both = parser.add_argument_group("both")
    both.add_argument("--cfg-scale", type=float | None, default=None, help="w of guidance (Eq. 16), llada")
    both.add_argument("--seed", type=int, default=0, help="of masks and samples")
    output = parser.add_argument_group("output")
    output.add_argument("--out", type=str | None, default=None, metavar="FILE", help="JSON with every metric")
    output.add_argument("--quiet", action="store_true", help="no progress on stderr")
    add_json(parser)


def main(argv: list[str]) -> int:
    """Runs ``llada evaluate`` with its arguments; returns the exit code.

    A checkpoint in a run's folder has its scores joined to that run's: `llada collect` gives them to the table.

    Raises:
        UserError: an option, the checkpoint, a task or its data is not right.
    """
    options = evaluate_parser().parse_args(argv)
    suite = suite_of(options)
    check(options)
    model, loaded = prepared(options, suite)
    from llada_lightning.evaluation.benchmarks import measure

    chat = suite.chat or options.chat
    sampling = said(options)
    outcomes = [
        outcome
        for each in loaded
        for outcome in measure(
            model, each, limit=options.limit, chat=chat, sampling=sampling, unsafe_code=options.unsafe_code
        )
    ]
    if model.rank == 0:
        _report(options, model, outcomes, chat)
        note = loss_note(model.lost_share, "byte_perplexity, bits_per_byte and word_perplexity are too low")
        if note is not None:
            warn(note)
    return 0


def prepared(options: Any, suite: Suite) -> tuple[HarnessModel, list[Loaded]]:
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
    manager = task_manager(suite.benchmarks, include_path)
    if not options.skip_missing:
        for benchmark in suite.benchmarks:  # before gigabytes are loaded
            require_code_allowed(manager, benchmark, options.unsafe_code)
    loaded = []
    for benchmark in suite.benchmarks:
        try:
            loaded.append(load_benchmark(manager, benchmark, options.unsafe_code))
        except UserError as error:
            if not options.skip_missing:
                raise
            warn(f"note: left out: {error}")
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


def suite_of(options: Any) -> Suite:
    """What is to be measured.

    Raises:
        UserError: neither a suite nor tasks are given, or both.
    """
    if (options.suite is None) == (options.tasks is None):
        given = "neither" if options.suite is None else "both"
        raise UserError(f"evaluate: --suite and --tasks: {given} given; give one of them")
    if options.suite is not None:
        suite = suite_named(options.suite)
        if options.shots is not None:
            raise UserError(f"--shots {options.shots}: the suite says its own; leave it out, or name --tasks")
        return suite
    names = list(dict.fromkeys(name.strip() for name in options.tasks.split(",") if name.strip()))
    if not names:
        raise UserError(f"--tasks '{options.tasks}' names no task; give names, as --tasks piqa,arc_challenge")
    return Suite(tuple(Benchmark(name, name, shots=options.shots) for name in names))


def check(options: Any) -> None:
    """What can be said before anything is read."""
    for name in ("limit", "monte_carlo", "batch_size", "batch_tokens", "length", "steps", "block_length"):
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
    console.print(_table(outcomes))
    for path in filter(None, (options.out, joined)):
        console.print(f"-> {path!s}", soft_wrap=True)


def _settings(options: Any, chat: bool) -> dict[str, Any]:
    """How it was measured, as far as the command says."""
    common = {"monte_carlo": options.monte_carlo, "seed": options.seed, "limit": options.limit, "chat": chat}
    return common | sandbox_of(options) | said(options)


def sandbox_of(options: Any) -> dict[str, Any]:
    """The kind of sandbox in which the programs that the model wrote were run, where that was allowed."""
    if not options.unsafe_code:
        return {}
    from llada_lightning.evaluation.sandbox import is_isolated

    return {"sandbox": "namespaces" if is_isolated() else "limits only"}


def said(options: Any) -> dict[str, Any]:
    """The settings of sampling that the options say."""
    return {name: options[name] for name in _SAMPLING if options[name]}


def _table(outcomes: list[Outcome]) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1), show_edge=False)
    table.add_column("task", no_wrap=True)
    table.add_column("metric", overflow="fold")
    for name in ("shots", "n", "value ± s.e."):
        table.add_column(name, justify="right", no_wrap=True)
    for outcome in outcomes:
        scale, unit = (100, " %") if outcome.is_share else (1, "")
        value = f"{scale * outcome.value:.2f}"
        if math.isfinite(outcome.stderr):
            value += f" ± {scale * outcome.stderr:.2f}"
        shots = "" if outcome.shots is None else str(outcome.shots)
        table.add_row(outcome.name, outcome.metric, shots, str(outcome.n), value + unit)
    return table


def _join_run(options: Any, outcomes: list[Outcome], chat: bool) -> Path | None:
    """Adds scores in percent to the evaluations of the run that the checkpoint lies in; None where there is no run.

    A limited evaluation is no result of a run, and stays out.
    """
    from llada_lightning.checkpoints.run_folder import CONFIG, final_checkpoint, run_folder_of, saved_step
    from llada_lightning.records import write_evaluations

    path = Path(options.checkpoint)
    checkpoint = final_checkpoint(path) if path.is_dir() and (path / CONFIG).is_file() else path
    run = None if checkpoint is None else run_folder_of(checkpoint)
    shares = [outcome for outcome in outcomes if outcome.is_share]
    if checkpoint is None or run is None or not shares or options.limit is not None:
        return None
    settings = json.dumps(_settings(options, chat) | {"suite": options.suite}, sort_keys=True)
    step = saved_step(checkpoint)
    return write_evaluations(run, [outcome.as_row(step, settings) for outcome in shares])
