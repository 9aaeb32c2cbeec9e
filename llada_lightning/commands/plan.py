"""``llada plan``: from argv to a table of runs, and the sweep that runs them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast, get_args

from jsonargparse import Namespace

from llada_lightning.compute.flops import CONVENTIONS, MAX_BUDGETS, Convention
from llada_lightning.compute.hardware import Machine, MeasuredRate, measured_rates
from llada_lightning.compute.rules import BATCH_RULES, DECAY_FRACTION, LEARNING_RATE_RULES
from llada_lightning.data.manifest import read_data_facts
from llada_lightning.objectives import BLOCK_LENGTH, COMPARED, OBJECTIVES, REFERENCE
from llada_lightning.run import Stream
from llada_lightning.settings import check_folder_name
from llada_lightning.study.plan import Grid, Plan, Recipe, TuningGrid, plan_study
from llada_lightning.study.plan.base import Base, check_data_path, planned_stream, read_base
from llada_lightning.study.plan.extension import extend, read_commands
from llada_lightning.study.plan.outputs import WIDTH, Destination, print_plan, run_values, write_files
from llada_lightning.study.plan.paper import paper_notes, paper_plan, paper_tables
from llada_lightning.study.plan.trunk import SeedsAt
from llada_lightning.study.plan.tuning import BATCHES, RATES
from llada_lightning.study.rule_file import FittedRules, read_rule_file
from llada_lightning.study.sweep import COPY_SUFFIX, read_sweep
from llada_lightning.support.command_line import CommandParser, add_json, print_json
from llada_lightning.support.errors import UserError
from llada_lightning.support.files import expanded
from llada_lightning.support.printing import people_console, shortened

_MOST_ARGUMENTS = 5 * MAX_BUDGETS
_NAME = ("llada", "plan")
_SEEDS_AT = "points of further seeds: the middle shape of each objective's three smallest budgets (cheap), or all"
_FORCE = "overwrite files that were edited since they were planned"


def main(argv: list[str]) -> int:
    """``llada plan --flops C …``: budgets -> a table of runs; with ``--out`` the sweep that runs them.

    ``llada plan --append FILE`` adds budgets and seeds to a sweep that it has written.
    """
    if len(argv) > _MOST_ARGUMENTS:  # the parser would take minutes
        raise UserError(f"plan: {len(argv):,} words given; a plan has at most {MAX_BUDGETS} budgets and as many seeds")
    added: dict[str, str] = {}
    if any(word.partition("=")[0] == "--append" for word in argv):
        options = _append_parser().parse_args(argv)
        plan, files, added = _append(options, argv)
    else:
        options = _parser().parse_args(argv)
        if options.paper:
            return _print_paper(options)
        if not options.flops:
            raise UserError("plan: no budget is given; give --flops C ..., or --paper, or --append FILE")
        plan, destination = _plan(options, read_base(options.base, vars(options)))
        files = write_files(plan, destination, [*_NAME, *argv], options.out, options.slurm, force=options.force)
    if options.json:
        runs = plan.table().astype(object).to_dict("records")
        files_written = {key: str(path) for key, path in files.items()}
        print_json({**files_written, **added, "totals": plan.totals(), "warnings": plan.warnings(), "runs": runs})
    else:
        print_plan(plan, people_console())
        for key, what in {**files, **added}.items():
            people_console().print(f"{key}: {what}", soft_wrap=True, markup=False, highlight=False)
    return 0


def _append(options: Namespace, argv: list[str]) -> tuple[Plan, dict[str, Path], dict[str, str]]:
    """``llada plan --append FILE``: the plan of the file made again from its commands, extended, and written."""
    path = expanded(options.append)
    made, appended = read_commands(path)
    first = _parser().parse_args(made)
    plan, destination = _plan(first, read_base(first.base, vars(first)))
    for words in appended:
        earlier = _append_parser().parse_args(words)
        plan = extend(plan, earlier.flops, earlier.seeds, earlier.seeds_at, earlier.shapes)
    before = len(plan.runs())
    if [point.get("config") for point in read_sweep(path).points] != run_values(plan, destination):
        raise UserError(
            f"plan: --append '{shortened(path)}': its commands no longer make its runs: it is of another version, or "
            "the data or files that it names have changed; plan a new study by --out"
        )
    plan = extend(plan, options.flops, options.seeds, options.seeds_at, options.shapes)
    commands = [[*_NAME, *words] for words in (made, *appended, argv)]
    files = write_files(
        plan, destination, commands[0], str(path), first.slurm, appended=commands[1:], force=options.force
    )
    return plan, files, {"added": f"runs {before} to {len(plan.runs()) - 1} (--index of llada sweep run)"}


def sweep_that_grows(folder: Path) -> tuple[str, list[float]] | None:
    """The planned sweep of a study, and the budgets of its commands; None where it is not known, or cannot grow.

    Args:
        folder: The folder of the study, in which the copy of the sweep names the file.
    """
    try:
        copies = sorted(folder.glob(f"*{COPY_SUFFIX}"))
        made = _parser().parse_args(read_commands(copies[0])[0]) if len(copies) == 1 else None
        if made is None or made.tune or not made.out:
            return None
        _, appended = read_commands(expanded(made.out))
    except (UserError, OSError):
        return None
    return made.out, [*made.flops, *(flops for words in appended for flops in _append_parser().parse_args(words).flops)]


def _append_parser() -> CommandParser:
    parser = CommandParser(
        prog="llada plan",
        description="Add budgets or seeds to a planned sweep, with the rates, batches, warmups and trunks that it has.",
    )
    add = parser.add_argument
    add("--append", type=str, required=True, metavar="YAML", help="the planned sweep")
    add("--flops", type=float, nargs="+", default=[], metavar="C", help="new budgets of training FLOPs")
    add("--seeds", type=int, nargs="+", default=[], help="new seeds")
    add("--seeds-at", choices=get_args(SeedsAt), default="cheap", help=_SEEDS_AT)
    shapes = "shapes that the new budgets and seeds are for, as 4x128 or L2-d64-h2-kv2-ff192 (default: as planned)"
    add("--shapes", type=str, nargs="+", default=[], metavar="SHAPE", help=shapes)
    add("--force", action="store_true", help=_FORCE)
    add_json(parser)
    return parser


def _print_paper(options: Namespace) -> int:
    if any(options[name] for name in ("flops", "out", "slurm", "base", "tune", "overlap", "rule")):
        raise UserError(
            "plan: --paper has the paper's budgets and files (sweeps/paper-scalability.yaml); give it alone"
        )
    machine = _machine(options, options.micro_batch)
    machine.check(OBJECTIVES if options.measured else [])
    planned = paper_plan(machine)
    if options.json:
        print_json({"notes": paper_notes(planned, machine), "rows": planned.astype(object).to_dict("records")})
        return 0
    console = people_console()
    console.width = WIDTH
    for table in paper_tables(planned):
        console.print(table)
    for note in paper_notes(planned, machine):
        console.print(note, soft_wrap=True, markup=False, highlight=False)
    return 0


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="llada plan",
        description="Turn FLOP budgets into a table of runs, and into the sweep that runs them.",
    )
    add = parser.add_argument
    add("--flops", type=float, nargs="+", default=[], metavar="C", help="budgets of training FLOPs")
    add(
        "--paper",
        action="store_true",
        help="instead the rows of the paper's Tables 18 and 19, with memory and hours on a cluster of --devices "
        "(sweeps/paper-scalability.yaml runs them)",
    )
    add("--objectives", nargs="+", choices=list(OBJECTIVES), default=list(COMPARED), help="what to compare")
    add(
        "--budget-convention",
        choices=CONVENTIONS,
        help="FLOPs that a budget counts; 6nd unless the base says otherwise",
    )
    add("--seeds", type=int, nargs="+", default=[0], help="the first one is run everywhere, the others at --seeds-at")
    add("--seeds-at", choices=get_args(SeedsAt), default="cheap", help=_SEEDS_AT)
    add("--separate", action="store_true", help="a run for each budget, instead of trunks that serve several")

    add("--points", type=int, help="shapes at each budget, around the objective's centre; default 5, with --tune 1")
    for name, objective in OBJECTIVES.items():
        centre = objective.tokens_per_param
        add(f"--centre-{name}", type=float, default=centre, help="tokens per parameter at the centre")
    add(
        "--shapes",
        nargs="+",
        type=str,
        default=[],
        metavar="SHAPE",
        help="exactly these at every budget instead: names, 4x128 as the table prints it, or L2-d64-h2-kv2-ff192",
    )
    add("--tokens-per-param", type=float, nargs="+", default=[], metavar="R", help="these ratios instead")

    add("--lr-rule", choices=LEARNING_RATE_RULES, default="deepseek", help="learning rate by size, tokens and budget")
    add("--batch-rule", choices=BATCH_RULES, default="deepseek", help="global batch by tokens or budget")
    add("--lr", type=float, help="one learning rate for all runs instead")
    for name in OBJECTIVES:
        add(f"--lr-scale-{name}", type=float, metavar="X", help="times the learning rate")
    add("--batch", type=int, metavar="SEQUENCES", help="one global batch for all runs instead")
    add(
        "--warmup-steps",
        type=int,
        help="for all runs; default 5 % of the mean length, at most 2000 and a quarter of the shortest run",
    )
    add("--decay-fraction", type=float, default=DECAY_FRACTION, help="share of each run over which the rate falls")

    add("--rule", type=str, metavar="FILE", help="learning rate and batch by the rules that a tuning study measured")
    add("--tune", action="store_true", help="a tuning study: rates x batches at every budget, around the rules'")
    add("--tune-rates", type=float, nargs="+", default=list(RATES), metavar="X", help="its rates, times the rule's")
    add("--tune-batches", type=float, nargs="+", default=list(BATCHES), metavar="X", help="its batches, likewise")
    add(
        "--overlap",
        action="store_true",
        help=f"lower {REFERENCE}'s budgets to the losses of the others; so does --tune",
    )
    add("--multiplier", type=float, metavar="X", help=f"FLOPs of the others over {REFERENCE}'s; default: as measured")

    add("--base", type=str, metavar="YAML", help="configuration under every run's own settings")
    add("--data", type=dict[str, float] | str, metavar="DIR", help="prepared data, or a mixture {DIR: weight, ...}")
    add("--vocab-size", type=int, help="words of the model; default: the data's tokenizer")
    add("--sequence-length", type=int, help="tokens of a sequence (default 256)")
    add("--block-length", type=int, metavar="TOKENS", help=f"block of block diffusion (default {BLOCK_LENGTH})")
    add("--study", type=str, help="folder of the results; default: the sweep's name")

    add(
        "--device",
        type=str,
        metavar="NAME",
        help="such as H100: for memory, and for hours, by the speeds of the package, --mfu or --measured",
    )
    add("--devices", type=int, default=1, help="devices of one run")
    add("--mfu", type=float, help="share of the device's peak that training achieves")
    add(
        "--measured",
        type=str,
        nargs="+",
        default=[],
        metavar="FILE",
        help="hours by the throughput of results tables, or of profiles' summary.json",
    )
    add("--micro-batch", type=int, help="sequences of a device's forward pass; default: what fits")
    add("--sharded", action="store_true", help="FSDP divides the states among the devices")

    add("--out", type=str, metavar="YAML", help="sweep to write; its table goes beside it as CSV")
    add("--slurm", type=str, metavar="SBATCH", help="job array over the sweep to write")
    add("--append", type=str, metavar="YAML", help="add --flops and --seeds to this planned sweep, as it was planned")
    add("--force", action="store_true", help=_FORCE)
    add_json(parser)
    return parser


def _plan(options: Namespace, base: Base) -> tuple[Plan, Destination]:
    path = base.data.get("path") if options.data is None else options.data
    check_data_path(path, "base: data.init_args.path" if options.data is None else "plan: --data")
    sequence_length = _first(options.sequence_length, base.count("data", "sequence_length"), 256)
    if sequence_length < 1:
        raise UserError(f"plan: --sequence-length {sequence_length} must be at least 1")
    vocab_size = _first(options.vocab_size, base.count("model", "vocab_size"))
    facts = None if path is None else read_data_facts(path, sequence_length)
    stream = planned_stream(base, facts, vocab_size, sequence_length, options.block_length)

    def given(*names: str) -> dict[str, Any]:
        return {name: options[name] for name in names}

    def of_each(setting: str) -> dict[str, float]:
        settings = {objective: options[f"{setting}_{objective}"] for objective in OBJECTIVES}
        return {objective: value for objective, value in settings.items() if value is not None}

    machine = _machine(options, _first(options.micro_batch, base.count("data", "micro_batch")))
    if base.section("trainer").get("accumulate_grad_batches") not in (None, 1) and machine.micro_batch is None:
        raise UserError("base: trainer.accumulate_grad_batches follows from the batch; give --micro-batch instead")
    plan = plan_study(
        options.flops,
        stream,
        grid=Grid(
            centres=of_each("centre"),
            points=_first(options.points, 1 if options.tune else Grid.points),
            **given("shapes", "tokens_per_param"),
        ),
        recipe=Recipe(
            lr_scale=of_each("lr_scale"),
            fitted=_fitted(options.rule, options.objectives, stream, None if facts is None else facts.tokenizer),
            **given("lr_rule", "batch_rule", "lr", "batch", "warmup_steps", "decay_fraction"),
        ),
        machine=machine,
        convention=_convention(options, base),
        overlap=options.overlap or (options.tune and REFERENCE in options.objectives and len(options.objectives) > 1),
        tuning=TuningGrid(options.tune_rates, options.tune_batches) if options.tune else None,
        **given("objectives", "seeds", "seeds_at", "separate", "multiplier"),
    )
    study = str(_first(options.study, base.section("run").get("study"), Path(options.out or "plan").stem))
    check_folder_name("plan: --study", study, nested=True)
    return plan, Destination(study=study, data=path, base=options.base, vocab_size=vocab_size)


def _fitted(
    path: str | None, objectives: Sequence[str], stream: Stream, tokenizer: str | None
) -> Mapping[str, FittedRules]:
    """The rules of a file, by objective; none without a path."""
    if path is None:
        return {}
    rules = read_rule_file(path)
    rules.check(path, objectives, stream.vocab_size, stream.sequence_length, tokenizer)
    names = {objective: str(rules.name_of(objective)) for objective in objectives}
    for objective, name in names.items():
        if name != objective:
            people_console(stderr=True).print(
                f"note: the rules of {name} serve for {objective}; --base has to have the settings of that variant",
                soft_wrap=True, markup=False, highlight=False,
            )  # fmt: skip
    return {objective: rules.objectives[name] for objective, name in names.items()}


def _machine(options: Namespace, micro_batch: int | None) -> Machine:
    return Machine(
        device=options.device,
        devices=options.devices,
        mfu=options.mfu,
        sharded=options.sharded,
        measured=tuple(rate for path in options.measured for rate in _measured(path)) if options.measured else None,
        micro_batch=micro_batch,
    )


def _measured(path: str) -> tuple[MeasuredRate, ...]:
    if Path(path).suffix == ".json":
        from llada_lightning.training.profiles import profiled_rate  # its package imports torch

        return (profiled_rate(path),)
    from llada_lightning.study.results import read_results

    return measured_rates(read_results(path))


def _convention(options: Namespace, base: Base) -> Convention:
    convention = _first(options.budget_convention, base.section("budget").get("convention"), "6nd")
    if convention not in CONVENTIONS:
        raise UserError(f"base: budget.convention {convention!r} is not known; it is one of {', '.join(CONVENTIONS)}")
    return cast(Convention, convention)


def _first(*choices: Any) -> Any:
    """The first choice that is not None."""
    return next((choice for choice in choices if choice is not None), None)
