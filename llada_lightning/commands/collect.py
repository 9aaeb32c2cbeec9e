"""``llada collect``: from argv to one results table."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from llada_lightning.support.command_line import CommandParser, add_json, print_json
from llada_lightning.support.errors import UserError
from llada_lightning.support.files import expanded
from llada_lightning.support.printing import people_console


def main(argv: list[str]) -> int:
    """``llada collect PATH … --out results.csv``: run folders and W&B projects -> one results table.

    Beside it comes ``results.covariance.csv``, the joint error of the losses, from the folders' validation files, and
    ``results.NAME.covariance.csv`` of the losses by each yardstick that a run has measured.
    What is unfinished, damaged or left out is named on stderr, and in the object that ``--json`` prints.
    """
    parser = CommandParser(
        prog="llada collect",
        description="Collect the results of run folders and of W&B projects into one table. Runs that are unfinished, "
        "damaged or left out are named on stderr; the exit code is 0 wherever a table was written.",
    )
    parser.add_argument(
        "paths",
        nargs="+",
        type=str,
        metavar="PATH",
        help="run folders, or folders that hold them; wandb:ENTITY/PROJECT for the runs of a W&B project",
    )
    parser.add_argument("--out", type=str, default="results.csv", help="table to write: .csv or .parquet")
    add_json(parser)
    options = parser.parse_args(argv)
    from llada_lightning.study.collect import gather  # after the parser: --help answers at once
    from llada_lightning.study.results import check_destination, write_covariance, write_results
    from llada_lightning.study.yardstick import write_yardstick_covariances

    options.out = str(expanded(options.out))
    check_destination(Path(options.out))
    collection = gather(options.paths)
    table, report = collection.table(), collection.report
    notes = people_console(stderr=True)
    found = f"{report.folders} run folders" + (f" and {report.wandb_runs} W&B runs" if report.wandb_runs else "")
    if table.empty:
        for line in report.lines():
            notes.print(line, soft_wrap=True)
        raise UserError(f"collect: no results under {', '.join(options.paths)} ({found}, none has a record yet)")
    path = write_results(table, options.out)
    report.covariance = write_covariance(collection.rows(), path)
    report.yardsticks = write_yardstick_covariances(collection.rows(), path)
    for line in report.lines():
        notes.print(line, soft_wrap=True)
    if options.json:
        print_json({"out": str(path), **asdict(report)})
        return 0
    console = people_console()
    console.print(f"{report.records} results of {found} -> {path!s}", soft_wrap=True)
    if report.covariance.path:
        joint = f"joint errors of {report.covariance.rows} results -> {report.covariance.path}"
        console.print(joint, soft_wrap=True)
    for name, own in report.yardsticks.items():
        if own.path:
            console.print(f"joint errors of {own.rows} results by {name} -> {own.path}", soft_wrap=True)
    return 0
