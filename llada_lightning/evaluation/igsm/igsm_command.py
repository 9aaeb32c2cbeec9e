"""``llada igsm``: how many generated problems a checkpoint solves."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Any

from rich.table import Table

from llada_lightning.commands import model_options as shared
from llada_lightning.data.igsm import FEWEST_STEPS, MOST_STEPS, problems
from llada_lightning.support.command_line import CommandParser, add_json, print_json
from llada_lightning.support.errors import UserError
from llada_lightning.support.printing import people_console

if TYPE_CHECKING:
    from llada_lightning.evaluation.igsm.run import IgsmResult


def igsm_parser() -> CommandParser:
    """The options of ``llada igsm``."""
    parser = CommandParser(
        prog="llada igsm", description="Accuracy on generated problems that no training corpus of ours holds."
    )
    shared.add_model_options(parser)
    asked = parser.add_argument_group("problems")
    asked.add_argument("--problems", type=int, default=100, help="of each number of steps, 4 to 6")
    asked.add_argument("--problem-seed", type=int, default=0, help="of the problems")
    asked.add_argument("--shots", type=int, default=4, help="solved problems before each, 0 to 4")
    asked.add_argument("--no-system", action="store_true", help="leave the system prompt out")
    asked.add_argument("--chat", action="store_true", help="ask through the checkpoint's chat template")
    asked.add_argument("--batch-size", type=int, default=16, help="problems at a time")
    shared.add_sampling_options(parser)
    add_json(parser)
    return parser


def igsm_command(argv: list[str]) -> int:
    """Runs ``llada igsm`` with its arguments; returns the exit code.

    Raises:
        UserError: an option or the checkpoint is not right, or a prompt does not fit the context.
    """
    options = vars(igsm_parser().parse_args(argv))
    if options["problems"] < 1:
        raise UserError(f"--problems {options['problems']}: give at least 1")
    from llada_lightning.evaluation.igsm.run import IgsmSettings, run_igsm

    sampling = shared.sampling_settings(options)
    settings = IgsmSettings(
        options["shots"], not options["no_system"], options["chat"], options["batch_size"], sampling
    )
    numbers = range(FEWEST_STEPS, MOST_STEPS + 1)
    drawn = [
        problem
        for steps in numbers
        for problem in islice(problems(options["problem_seed"], steps=steps, test=True), options["problems"])
    ]
    lm = shared.load(options)
    result = run_igsm(lm, drawn, settings)
    if options["json"]:
        print_json({"checkpoint": options["checkpoint"], "objective": lm.objective, **_record(result)})
    else:
        people_console().print(_table(result))
    return 0


def _record(result: IgsmResult) -> dict[str, Any]:
    return {
        "overall": result.overall.record(),
        "by_steps": {str(steps): accuracy.record() for steps, accuracy in result.by_steps.items()},
        "unanswered": result.given.count(None),
    }


def _table(result: IgsmResult) -> Table:
    table = Table(caption=f"chance is 20 %; {result.given.count(None)} answers hold no #### 0 to 4")
    for name in ("steps", "problems", "accuracy, %", "s.e."):
        table.add_column(name, justify="right")
    rows = [(str(steps), accuracy) for steps, accuracy in result.by_steps.items()]
    for name, accuracy in [*rows, ("all", result.overall)]:
        table.add_row(name, str(accuracy.count), f"{100 * accuracy.value:.1f}", f"{100 * accuracy.stderr:.1f}")
    return table
