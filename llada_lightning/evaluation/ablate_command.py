"""``llada ablate``: the paper's Tables 6 to 10 for a checkpoint and tasks."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from llada_lightning.commands.evaluate import (
    add_evaluation_options,
    check,
    prepared,
    said,
    sandbox_of,
    suite_of,
)
from llada_lightning.evaluation.ablations import ABLATIONS, Ablation, Cell, Measured, ablation, run_ablation
from llada_lightning.support.command_line import CommandParser, print_json
from llada_lightning.support.errors import UserError
from llada_lightning.support.files import expanded, write_json
from llada_lightning.support.printing import people_console

if TYPE_CHECKING:
    from llada_lightning.evaluation.benchmarks import Loaded
    from llada_lightning.evaluation.harness import HarnessModel


def ablate_parser() -> CommandParser:
    """The options of ``llada ablate``."""
    parser = CommandParser(
        prog="llada ablate", description="The paper's Tables 6 to 10 for a llada checkpoint and tasks."
    )
    tables = ", ".join(f"{name} (Table {ablation(name).table})" for name in ABLATIONS)
    vary = parser.add_argument_group("what is varied")
    vary.add_argument("--vary", type=str, required=True, help=tables)
    vary.add_argument("--blocks", type=int, nargs="+", default=[], help="block lengths of strategies; 2 4 8 32")
    vary.add_argument("--lengths", type=int, nargs="+", default=[], help="of answers, for length; 256 512 1024")
    add_evaluation_options(parser)
    return parser


def ablate_command(argv: list[str]) -> int:
    """Runs ``llada ablate`` with its arguments; returns the exit code.

    Raises:
        UserError: an option, the checkpoint, a task or its data is not right, or what is varied is not of this model.
    """
    options = ablate_parser().parse_args(argv)
    what = ablation(options.vary, options.blocks, options.lengths)
    suite = suite_of(options)
    check(options)
    _check_not_varied(what, said(options))
    model, loaded = prepared(options, suite)
    _check_model(what, model, loaded)

    def evaluate(settings: dict[str, Any]) -> Measured:
        from llada_lightning.evaluation.benchmarks import measure

        model.cfg_scale = settings.get("cfg_scale", 0.0)
        sampling = said(options) | settings
        found = [
            outcome
            for each in loaded
            for outcome in measure(
                model,
                each,
                limit=options.limit,
                chat=suite.chat or options.chat,
                sampling=sampling,
                unsafe_code=options.unsafe_code,
            )
        ]
        return {outcome.name: (outcome.value, outcome.stderr) for outcome in found}

    cells = run_ablation(what, evaluate)
    if model.rank == 0:
        _report(options, what, cells)
    return 0


def _check_not_varied(what: Ablation, given: dict[str, Any]) -> None:
    varied = {name for row in what.rows for name in row.settings}
    for name in varied & given.keys():
        raise UserError(f"--{name.replace('_', '-')} is what Table {what.table} varies; leave it out")


def _check_model(what: Ablation, model: HarnessModel, loaded: list[Loaded]) -> None:
    """Whether the table asks something of this model and these tasks."""
    if model.lm.causal:
        raise UserError(f"'{model.lm.name}' is an arm, which has no {what.question} to vary; give a llada checkpoint")
    for each in loaded:
        generated = any(part.OUTPUT_TYPE == "generate_until" for part in each.parts)
        if generated != (what.scored == "generation"):
            kind = "sampled answers" if generated else "likelihoods"
            raise UserError(
                f"task '{each.benchmark.name}' is of {kind}, and Table {what.table} varies the {what.scored}; "
                "name another task"
            )


def _report(options: Any, what: Ablation, cells: dict[str, dict[str, Cell]]) -> None:
    record = {
        "checkpoint": options.checkpoint,
        "table": what.table,
        "question": what.question,
        "settings": {
            "monte_carlo": options.monte_carlo,
            "seed": options.seed,
            "limit": options.limit,
            **sandbox_of(options),
            **said(options),
        },
        "rows": {row: {task: vars(cell) for task, cell in tasks.items()} for row, tasks in cells.items()},
    }
    if options.out:
        write_json(expanded(options.out), record)
    if options.json:
        print_json(record)
        return
    console = people_console()
    console.print(_table(what, cells))
    if any(cell.of for tasks in cells.values() for cell in tasks.values()):
        console.print("The best of several settings, picked by these very scores, flatters itself.", soft_wrap=True)
    if options.out:
        console.print(f"-> {options.out}", soft_wrap=True)


def _table(what: Ablation, cells: dict[str, dict[str, Cell]]) -> Table:
    """Rows and tasks as in the paper, in percent."""
    title = f"Table {what.table}: {what.question}, % ± s.e."
    table = Table(box=SIMPLE_HEAD, padding=(0, 1), show_edge=False, title=title, title_justify="left")
    table.add_column("", no_wrap=True)
    for task in dict.fromkeys(task for tasks in cells.values() for task in tasks):
        table.add_column(task, justify="right")
    for row, tasks in cells.items():
        table.add_row(row, *(_percent(cell) for cell in tasks.values()))
    return table


def _percent(cell: Cell) -> str:
    text = f"{100 * cell.value:.1f}"
    if cell.stderr is not None and math.isfinite(cell.stderr):
        text += f" ± {100 * cell.stderr:.1f}"
    return text if cell.of is None else f"{text} ({cell.of})"
