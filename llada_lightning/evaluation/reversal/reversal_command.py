"""``llada reversal``: one half of a pair given, how often a checkpoint gives the other."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.table import Table

from llada_lightning.commands import model_options as shared
from llada_lightning.support.command_line import CommandParser, add_json, print_json, unescaped
from llada_lightning.support.errors import UserError
from llada_lightning.support.printing import people_console

if TYPE_CHECKING:
    from llada_lightning.evaluation.reversal.run import Direction, ReversalResult


def reversal_parser() -> CommandParser:
    """The options of ``llada reversal``."""
    parser = CommandParser(
        prog="llada reversal", description="Pairs whose texts have one order, asked for forwards and backwards."
    )
    shared.add_model_options(parser)
    asked = parser.add_argument_group("pairs")
    asked.add_argument("--pairs", type=str, default=None, help="JSON list of objects with 'first' and 'second'")
    asked.add_argument("--facts", type=str, default=None, help="facts:COUNT[@SEED], as llada prepare took it")
    asked.add_argument("--max-pairs", type=int | None, default=None, help="ask for the first so many only")
    asked.add_argument(
        "--form",
        choices=("prompt", "infill", "chat"),
        default="prompt",
        help="prompt: the known half to be continued; infill: masks where the other half stands (llada alone); chat: "
        "the paper's prompts through the checkpoint's chat template",
    )
    asked.add_argument("--joiner", type=str, default=None, help="between the halves; ' is ' for facts, else '，'")
    asked.add_argument("--end", type=str, default=None, help="behind the second half; '.' for facts, else '。'")
    asked.add_argument("--batch-size", type=int, default=64, help="prompts at a time")
    shared.add_sampling_options(parser)
    add_json(parser)
    return parser


def reversal_command(argv: list[str]) -> int:
    """Runs ``llada reversal`` with its arguments; returns the exit code.

    Raises:
        UserError: an option, the pairs or the checkpoint is not right.
    """
    options = vars(reversal_parser().parse_args(argv))
    if (options["pairs"] is None) == (options["facts"] is None):
        raise UserError("reversal: give --pairs FILE.json, or --facts facts:COUNT[@SEED], and not both")
    if options["max_pairs"] is not None and options["max_pairs"] < 1:
        raise UserError(f"--max-pairs {options['max_pairs']}: give at least 1")
    from llada_lightning.data.facts_corpus import END, JOINER, facts_source
    from llada_lightning.evaluation.reversal.run import ReversalSettings, read_pairs, run_reversal

    invented = options["facts"] is not None
    pairs = facts_source(options["facts"]).pairs() if invented else read_pairs(options["pairs"])
    usual = (JOINER, END) if invented else ("，", "。")
    joiner, end = (
        default if options[key] is None else unescaped(options[key])
        for key, default in zip(("joiner", "end"), usual, strict=True)
    )
    settings = ReversalSettings(
        options["form"],
        joiner=joiner,
        end=end,
        batch_size=options["batch_size"],
        sampling=shared.sampling_settings(options),
    )
    lm = shared.load(options)
    results = run_reversal(lm, pairs[: options["max_pairs"]], settings)
    if options["json"]:
        record: dict[str, Any] = {"checkpoint": options["checkpoint"], "objective": lm.objective}
        print_json({**record, "form": options["form"], **{name: _record(one) for name, one in results.items()}})
    else:
        people_console().print(_table(results, options["form"]))
    return 0


def _record(result: ReversalResult) -> dict[str, Any]:
    return {**result.exact.record(), "characters": result.characters}


def _table(results: dict[Direction, ReversalResult], form: str) -> Table:
    table = Table(caption=f"asked by {form}; exact: the other half letter by letter")
    table.add_column("direction")
    for name in ("pairs", "exact, %", "s.e.", "characters, %"):
        table.add_column(name, justify="right")
    for name, result in results.items():
        exact = result.exact
        figures = (f"{100 * share:.1f}" for share in (exact.value, exact.stderr, result.characters))
        table.add_row(name, str(exact.count), *figures)
    return table
