"""``llada collect``: from argv to one results table."""

from __future__ import annotations

from dataclasses import asdict

from rich.markup import escape

from llada_lightning.command_line import CommandParser, add_json, people_console, print_json
from llada_lightning.errors import UserError
from llada_lightning.scaling.collect import collect
from llada_lightning.scaling.results import write_results


def collect_command(argv: list[str]) -> int:
    """``llada collect PATH … --out results.csv``: run folders -> one results table.

    Raises:
        UserError: a path is no folder, no run has left a record, or the table's name is neither CSV nor parquet.
    """
    parser = CommandParser(prog="llada collect", description="Collect the results of run folders into one table.")
    parser.add_argument("paths", nargs="+", type=str, metavar="PATH", help="run folders, or folders that hold them")
    parser.add_argument("--out", type=str, default="results.csv", help="table to write: .csv or .parquet")
    add_json(parser)
    options = parser.parse_args(argv)
    table, report = collect(options.paths)
    notes = people_console(stderr=True)
    for line in report.lines():
        notes.print(escape(line), soft_wrap=True)
    if table.empty:
        where = ", ".join(options.paths)
        raise UserError(f"collect: no results under {where} ({report.folders} run folders, none has a record yet)")
    path = write_results(table, options.out)
    if options.json:
        print_json({"out": str(path), **asdict(report)})
    else:
        people_console().print(f"{report.records} results of {report.folders} run folders -> {escape(str(path))}")
    return 0
