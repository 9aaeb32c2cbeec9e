"""``llada report``: a study -> one page with its verdict, figures, tables, settings and limits."""

from __future__ import annotations

import platform
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse import Namespace

from llada_lightning.commands.fitting import PUBLISHED, ReadTable, add_fit_options, fits_of, read_table, unfinished
from llada_lightning.support.command_line import CommandParser, add_json, check_draws, print_json
from llada_lightning.support.errors import UserError
from llada_lightning.support.files import expanded, file_sha256, written_atomically
from llada_lightning.support.printing import people_console, shortened

if TYPE_CHECKING:
    from llada_lightning.study.report import Report, Source

HTML, MARKDOWN, BESIDE = "report.html", "report.md", "report_files"
"""The files of a report, and the folder of its figures and of the table that was collected for it."""

LIBRARIES = ("llada-lightning", "numpy", "scipy", "pandas", "matplotlib")
"""The libraries behind the numbers and figures of a report."""


@dataclass(frozen=True)
class Study:
    """The results table of a study, and where its report goes."""

    table: str
    """The path of the table, or `published`."""
    name: str
    out: Path
    collected: list[str] | None = None
    """What was found beside sound results where the table was collected from runs."""
    unfinished: str | None = None
    """How many of its runs are done; None where all are, or where that is not known."""


def main(argv: list[str]) -> int:
    """``llada report STUDY``: a folder of runs or a results table -> ``report.html`` and ``report.md``."""
    parser = CommandParser(
        prog="llada report",
        description="Write one page about a study: its verdict in a few sentences, figures, multipliers, runs, how it "
        "was counted, settings, versions, hashes, limits, and what was left out. report.html needs nothing beside it; "
        "report.md is the same as Markdown.",
    )
    parser.add_argument(
        "study",
        type=str,
        metavar="STUDY",
        help="folder of runs, wandb:ENTITY/PROJECT, table that `llada collect` wrote, or `published`",
    )
    parser.add_argument(
        "--out", type=str, metavar="DIR", help="folder of the report (default: that of the runs or of the table)"
    )
    parser.add_argument("--title", type=str, help="title of the page")
    add_fit_options(parser)
    add_json(parser)
    options = parser.parse_args(argv)
    check_draws("report", options)
    from llada_lightning.study.fits import usable_runs  # after the parser: --help answers at once
    from llada_lightning.study.report import make_report

    study = _study(options)
    read = read_table(study.table, options.yardstick, options.source_flops)
    fits = None if usable_runs(read.table).empty else fits_of("report", read, options)
    report = make_report(read.table, fits, options.convention, _source(study, read, options))
    try:
        files = _write(report, study.out)
    except OSError as error:
        raise UserError(f"report: --out {study.out} cannot be written ({error.strerror}); choose a folder") from error
    if options.json:
        figures = {figure.name: str(study.out / BESIDE / f"{figure.name}.svg") for figure in report.figures}
        names = {"html": files[0], "markdown": files[1], "figures": figures, "table": study.table}
        left_out = report.left_out.row_count
        print_json({**names, "verdict": list(report.verdict), "convention": options.convention, "left_out": left_out})
    else:
        console = people_console()
        for sentence in report.verdict:
            console.print(f"{sentence}\n", highlight=False)
        console.print(f"-> {', '.join(files)}", soft_wrap=True)
    return 0


def _study(options: Namespace) -> Study:
    """The study that is named; runs are collected into a table beside the report.

    Raises:
        UserError: There is none, it holds no result, or the folder of its report is not said.
    """
    from llada_lightning.study.collect import PREFIX

    given = options.study
    here = None if options.out is None else expanded(options.out)
    if given == PUBLISHED or given.startswith(PREFIX):
        if here is None:
            raise UserError(f"report: {given} has no folder of its own; give the folder of the report with --out")
        return Study(given, given, here) if given == PUBLISHED else _collected(given, given, here)
    path = expanded(given)
    if path.is_dir():
        return _collected(str(path), path.resolve().name, here or path)
    if path.suffix not in (".csv", ".parquet") and not path.exists():
        raise UserError(f"report: '{shortened(given)}': no such folder or table; give a folder of runs, or a table")
    # Tables of several studies have one name, and their folders have several.
    name = path.resolve().parent.name if path.stem == "results" else path.stem
    return Study(str(path), name, here or path.parent, unfinished=unfinished(str(path)))


def _collected(source: str, name: str, out: Path) -> Study:
    """As `llada collect` does, with the paths in its report as they are from the folder of runs."""
    from llada_lightning.study.collect import gather
    from llada_lightning.study.results import write_covariance, write_results
    from llada_lightning.study.yardstick import write_yardstick_covariances

    collection = gather([source])
    table, found = collection.table(), collection.report
    if table.empty:
        runs = found.folders + found.wandb_runs
        said = f"{runs} run{'s' * (runs != 1)}, none has a record yet"
        tables = sorted(path.name for path in Path(source).glob("*.csv")) if Path(source).is_dir() else []
        hint = f", or give a table in it, such as {tables[0]}" if tables else ""
        raise UserError(f"report: '{shortened(source)}' holds no result ({said}); finish a run{hint}")
    path = out / BESIDE / "results.csv"
    try:
        write_results(table, path)
        found.covariance = write_covariance(collection.rows(), path)
        found.yardsticks = write_yardstick_covariances(collection.rows(), path)
    except OSError as error:
        raise UserError(f"report: --out {out} cannot be written ({error.strerror}); choose a folder") from error
    lines = found.lines() if source == "." else [line.replace(f"{source}/", "") for line in found.lines()]
    return Study(str(path), name, out, lines, found.missing)


def _source(study: Study, read: ReadTable, options: Namespace) -> Source:
    from llada_lightning.study.report import Source

    files = [] if study.table == PUBLISHED else [Path(study.table), *filter(None, [read.covariance_file])]
    table = study.table if study.table == PUBLISHED else Path(study.table).name
    return Source(
        title=options.title or f"Scaling study: {study.name}",
        created=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        versions={**{name: version(name) for name in LIBRARIES}, "python": platform.python_version()},
        table="the published isoFLOP study" if study.table == PUBLISHED else table,
        hashes={path.name: file_sha256(path) for path in files},
        command=shlex.join(["llada", "curves", table, "--out", "DIR", *_given(options)]),
        collected=study.collected,
        unfinished=study.unfinished,
    )


def _given(options: Namespace) -> Iterable[str]:
    """The options of the fits, as they are given to `llada curves`."""
    for name in ("convention", "reference", "yardstick", "unit", "samples", "seed"):
        if options[name] is not None:
            yield from (f"--{name}", str(options[name]))
    if options.source_flops:
        yield "--source-flops"


def _write(report: Report, out: Path) -> list[str]:
    """Writes the figures, then the pages; returns the paths of the pages."""
    from llada_lightning.study.report.page import html_page, markdown_page

    texts = {out / BESIDE / f"{figure.name}.svg": figure.svg for figure in report.figures}
    texts |= {out / HTML: html_page(report), out / MARKDOWN: markdown_page(report, BESIDE)}
    for path, text in texts.items():
        with written_atomically(path) as temporary:
            temporary.write_bytes(text.encode("utf-8", "replace"))  # a name of a file may be no text
    return [str(out / HTML), str(out / MARKDOWN)]
