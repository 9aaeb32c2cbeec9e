"""``llada plan``: from argv to a table of runs, and the sweep that runs them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

from jsonargparse import Namespace

from llada_lightning.compute.flops import CONVENTIONS, MAX_BUDGETS, Convention
from llada_lightning.compute.hardware import Machine, MeasuredRate, measured_rates
from llada_lightning.compute.rules import BATCH_RULES, DECAY_FRACTION, LEARNING_RATE_RULES
from llada_lightning.objectives import OBJECTIVES
from llada_lightning.run import DataFacts, Source, Stream, sequences_read
from llada_lightning.settings import check_folder_name
from llada_lightning.study.plan.files import Destination, write_sweep
from llada_lightning.study.plan.grid import Grid
from llada_lightning.study.plan.lessons import lessons, print_plan
from llada_lightning.study.plan.plan import Plan, plan_study
from llada_lightning.study.plan.trunk import Recipe
from llada_lightning.study.results import read_results
from llada_lightning.support.command_line import CommandParser, add_json, print_json, refuse_unusable
from llada_lightning.support.errors import UserError
from llada_lightning.support.files import expanded
from llada_lightning.support.printing import people_console, shortened
from llada_lightning.support.reading import read_yaml
from llada_lightning.training.profiles import profiled_rate

_MOST_WORDS = 5 * MAX_BUDGETS

DataPath = str | dict[str, float]
"""A prepared folder, or a mixture's folders with weights."""

ReadData = Callable[[DataPath, int], DataFacts]
"""From the data's path and a sequence length to what is known of it. Injected: manifests are a floor above."""


def plan_command(argv: list[str], read_data: ReadData) -> int:
    """``llada plan --flops C …``: budgets -> a table of runs; with ``--out`` the sweep that runs them.

    Args:
        argv: the words after ``llada plan``.
        read_data: from the data's path and a sequence length to what is known of it.

    Raises:
        UserError: a setting makes no plan, the data cannot be read, or a file cannot be written.
    """
    if len(argv) > _MOST_WORDS:  # the parser would take minutes
        raise UserError(f"plan: {len(argv):,} words given; a plan has at most {MAX_BUDGETS} budgets and as many seeds")
    options = _parser().parse_args(argv)
    base = _read_base(options)
    plan, destination = _plan(options, base, read_data)
    files = _write_files(options, plan, destination, ["llada", "plan", *argv])
    if options.json:
        runs = plan.table().astype(object).to_dict("records")
        files_written = {key: str(path) for key, path in files.items()}
        warnings = [*plan.warnings(), *lessons(plan)]
        print_json({**files_written, "totals": plan.totals(), "warnings": warnings, "runs": runs})
    else:
        print_plan(plan, people_console())
        for key, path in files.items():
            people_console().print(f"{key}: {path}", soft_wrap=True, markup=False, highlight=False)
    return 0


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="llada plan",
        description="Turn FLOP budgets into a table of runs, and into the sweep that runs them.",
    )
    add = parser.add_argument
    add("--flops", type=float, nargs="+", required=True, metavar="C", help="budgets of training FLOPs")
    add("--objectives", nargs="+", choices=list(OBJECTIVES), default=list(OBJECTIVES), help="what to compare")
    add(
        "--budget-convention",
        choices=CONVENTIONS,
        default=None,
        help="FLOPs that a budget counts; 6nd unless the base says otherwise",
    )
    add("--seeds", type=int, nargs="+", default=[0], help="each run once for each of them")
    add("--separate", action="store_true", help="a run for each budget, instead of trunks that serve several")

    add("--points", type=int, default=5, help="shapes at each budget, around the objective's centre")
    for name, objective in OBJECTIVES.items():
        centre = objective.tokens_per_param
        add(f"--centre-{name}", type=float, default=centre, help="tokens per parameter at the centre")
    add("--shapes", nargs="+", type=str, default=[], metavar="SHAPE", help="exactly these at every budget instead")
    add("--tokens-per-param", type=float, nargs="+", default=[], metavar="R", help="these ratios instead")

    add("--lr-rule", choices=LEARNING_RATE_RULES, default="deepseek", help="learning rate by size, tokens and budget")
    add("--batch-rule", choices=BATCH_RULES, default="deepseek", help="global batch by tokens or budget")
    add("--lr", type=float, default=None, help="one learning rate for all runs instead")
    for name in OBJECTIVES:
        add(f"--lr-scale-{name}", type=float, default=1.0, metavar="X", help="times the learning rate")
    add("--batch", type=int, default=None, metavar="SEQUENCES", help="one global batch for all runs instead")
    add(
        "--warmup-steps",
        type=int,
        default=None,
        help="for all runs; default 5 % of the mean length, at most 2000 and a quarter of the shortest run",
    )
    add("--decay-fraction", type=float, default=DECAY_FRACTION, help="share of each run over which the rate falls")

    add("--base", type=str, default=None, metavar="YAML", help="configuration under every run's own settings")
    add("--data", type=str, default=None, metavar="DIR", help="prepared data: says vocabulary and epochs")
    add("--vocab-size", type=int, default=None, help="words of the model; default: the data's tokenizer")
    add("--sequence-length", type=int, default=None, help="tokens of a sequence (default 256)")
    add("--study", type=str, default=None, help="folder of the results; default: the sweep's name")

    add("--device", type=str, default=None, metavar="NAME", help="such as H100: for memory, and for hours with --mfu")
    add("--devices", type=int, default=1, help="devices of one run")
    add("--mfu", type=float, default=None, help="share of the device's peak that training achieves")
    add(
        "--measured",
        type=str,
        nargs="+",
        default=[],
        metavar="FILE",
        help="hours by the throughput of results tables, or of profiles' summary.json",
    )
    add("--micro-batch", type=int, default=None, help="sequences of a device's forward pass; default: what fits")
    add("--sharded", action="store_true", help="FSDP divides the states among the devices")

    add("--out", type=str, default=None, metavar="YAML", help="sweep to write; its table goes beside it as CSV")
    add("--slurm", type=str, default=None, metavar="SBATCH", help="job array over the sweep to write")
    add_json(parser)
    return parser


def _plan(options: Namespace, base: Mapping[str, Any], read_data: ReadData) -> tuple[Plan, Destination]:
    data, model, trainer = base["data"], base["model"], base["trainer"]
    path: DataPath | None = data.get("path") if options.data is None else options.data
    _check_path(path)
    sequence_length = _first(options.sequence_length, _count(data, "data", "sequence_length"), 256)
    if sequence_length < 1:
        raise UserError(f"plan: --sequence-length {sequence_length} must be at least 1")
    vocab_size = _first(options.vocab_size, _count(model, "model", "vocab_size"))
    facts = None if path is None else read_data(path, sequence_length)
    if facts is not None and vocab_size is not None and vocab_size < facts.vocab_size:
        raise UserError(f"plan: --vocab-size {vocab_size} is below the data's {facts.vocab_size} words; leave it out")
    words = vocab_size if facts is None else _first(vocab_size, facts.vocab_size)
    if words is None:
        raise UserError("plan: the vocabulary is not known; give --data DIR, or --vocab-size")
    limit = _count(data, "data", "train_tokens")
    stream = Stream(
        words,
        sequence_length,
        random_length_share=_first(_number(data, "data", "random_length_share"), Stream.random_length_share),
        mask_eps=_first(_number(data, "data", "mask_eps"), Stream.mask_eps),
        sources=() if facts is None else _sources_read(facts.sources, sequence_length, limit),
    )
    machine = Machine(
        device=options.device,
        devices=options.devices,
        mfu=options.mfu,
        measured=tuple(rate for path in options.measured for rate in _measured(path)) if options.measured else None,
        sharded=options.sharded,
        micro_batch=_first(options.micro_batch, _count(data, "data", "micro_batch")),
    )
    if trainer.get("accumulate_grad_batches") not in (None, 1) and machine.micro_batch is None:
        raise UserError("base: trainer.accumulate_grad_batches follows from the batch; give --micro-batch instead")
    plan = plan_study(
        options.flops,
        stream,
        objectives=options.objectives,
        grid=Grid(
            points=options.points,
            centres={objective: options[f"centre_{objective}"] for objective in OBJECTIVES},
            shapes=options.shapes,
            tokens_per_param=options.tokens_per_param,
        ),
        recipe=Recipe(
            lr_rule=options.lr_rule,
            batch_rule=options.batch_rule,
            lr=options.lr,
            lr_scale={objective: options[f"lr_scale_{objective}"] for objective in OBJECTIVES},
            batch=options.batch,
            warmup_steps=options.warmup_steps,
            decay_fraction=options.decay_fraction,
        ),
        machine=machine,
        convention=_convention(options, base["budget"]),
        seeds=options.seeds,
        separate=options.separate,
    )
    study = str(_first(options.study, base["run"].get("study"), Path(options.out or "plan").stem))
    check_folder_name("plan: --study", study, nested=True)
    return plan, Destination(study=study, data=path, base=options.base, vocab_size=vocab_size)


def _check_path(path: Any) -> None:
    weights = list(path.values()) if isinstance(path, dict) else []
    is_mixture = weights and all(isinstance(weight, (int, float)) and weight > 0 for weight in weights)
    if path is not None and not isinstance(path, str) and not is_mixture:
        given = shortened(repr(path))
        raise UserError(
            f"base: data.init_args.path {given} is neither a folder nor a mapping from folders to weights above 0"
        )


def _sources_read(sources: tuple[Source, ...], sequence_length: int, train_tokens: int | None) -> tuple[Source, ...]:
    """The sources with the sequences that a limit on distinct tokens leaves of them."""
    present, weights = [source.sequences for source in sources], [source.weight for source in sources]
    left = sequences_read(present, weights, sequence_length, train_tokens)
    return tuple(Source(weight, sequences) for weight, sequences in zip(weights, left, strict=True))


def _measured(path: str) -> tuple[MeasuredRate, ...]:
    return (profiled_rate(path),) if Path(path).suffix == ".json" else measured_rates(read_results(path))


def _convention(options: Namespace, budget: Mapping[str, Any]) -> Convention:
    convention = _first(options.budget_convention, budget.get("convention"), "6nd")
    if convention not in CONVENTIONS:
        raise UserError(f"base: budget.convention {convention!r} is not known; it is one of {', '.join(CONVENTIONS)}")
    return cast(Convention, convention)


def _number(section: Mapping[str, Any], name: str, key: str) -> float | None:
    """A number of the base, where it is given; YAML 1.1 reads 1e-3 as a word."""
    value = section.get(key)
    try:
        number = None if value is None else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if number is not None and not math.isfinite(number):
        raise UserError(f"base: {name}.init_args.{key} {value!r} is not a number; give one, or leave it out")
    return number


def _count(section: Mapping[str, Any], name: str, key: str) -> int | None:
    number = _number(section, name, key)
    if number is not None and not (number.is_integer() and number >= 1):
        raise UserError(f"base: {name}.init_args.{key} {number:g} is not a whole number from 1 on; mend it")
    return None if number is None else int(number)


def _first(*choices: Any) -> Any:
    """The first that is given."""
    return next((choice for choice in choices if choice is not None), None)


_DECIDED = {
    "budget": ("flops", "tokens"),
    "trainer": ("max_steps",),
    "schedule": ("decay_steps", "decay_tokens", "plateaus", "total_steps"),
}
"""Settings of a base that would change what the plan has counted."""
_CHOSEN = {
    "schedule": {"lr": "lr", "warmup_steps": "warmup_steps", "decay_fraction": "decay_fraction"},
    "data": {"global_batch": "batch"},
    "model": {"shape": "shapes"},
}
"""Settings that the plan writes for every run, each with the option that chooses it: a base's would be overruled."""


_FULL_NAMES = {
    "schedule": "model.init_args.schedule",
    "data": "data.init_args",
    "model": "model.init_args",
}


def _read_base(options: Namespace) -> dict[str, dict[str, Any]]:
    """The sections of a base configuration that a plan reads.

    Raises:
        UserError: it cannot be read, or sets what the plan decides.
    """
    path, content = options.base, dict[str, Any]()
    if path is not None:
        content = read_yaml(path) or {}
    refuse_unusable(content, "base")
    if not isinstance(content, dict):
        raise UserError(f"plan: --base {path} holds no mapping; give one of llada fit's")
    sections = {name: _section(content, name) for name in ("budget", "run", "trainer", "model", "data")}
    for name in ("model", "data"):
        sections[name] = _section(sections[name], "init_args")
    sections["schedule"] = _section(sections["model"], "schedule")
    for section, keys in _DECIDED.items():
        for key in keys:
            if sections[section].get(key) not in (None, [], -1):
                where = _FULL_NAMES.get(section, section)
                raise UserError(f"plan: --base {path} sets {where}.{key}, which the plan decides; leave it out")
    for section, chosen in _CHOSEN.items():
        for key, option in chosen.items():
            value = sections[section].get(key)
            if value is not None and not _is_same(value, options[option]):
                raise UserError(
                    f"plan: --base {path} sets {_FULL_NAMES[section]}.{key} to {shortened(value, 80)}, which the plan "
                    f"would overrule; leave it out, or give the plan the same by --{option.replace('_', '-')}"
                )
    return sections


def _is_same(value: Any, chosen: Any) -> bool:
    try:
        return float(value) == float(chosen)  # YAML 1.1 reads 1e-3 as a word
    except (TypeError, ValueError):
        return [value] == chosen  # of shapes


def _section(content: Mapping[str, Any], name: str) -> dict[str, Any]:
    section = content.get(name)
    return section if isinstance(section, dict) else {}


def _write_files(options: Namespace, plan: Plan, destination: Destination, command: list[str]) -> dict[str, Path]:
    """The files that were asked for, by what they are."""
    if options.out is None:
        if options.slurm is not None:
            raise UserError("plan: --slurm runs a sweep; give --out too")
        return {}
    out = expanded(options.out)
    if out.suffix not in (".yaml", ".yml"):
        raise UserError(f"plan: --out {out} must end in .yaml")
    if options.slurm is not None and expanded(options.slurm).resolve() in (
        out.resolve(),
        out.with_suffix(".csv").resolve(),
    ):
        raise UserError(f"plan: --slurm {options.slurm} is the sweep's own file or its table's; choose another name")
    if destination.data is None:
        raise UserError("plan: --out needs the data that the runs read; give --data DIR, or --base with data.path")
    slurm = None if options.slurm is None else expanded(options.slurm)
    table = write_sweep(out, plan, destination, command, slurm)
    return {"sweep": out, "table": table, **({} if slurm is None else {"slurm": slurm})}
