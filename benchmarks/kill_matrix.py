"""A hundred kills: `llada fit` and its neighbours, ended with SIGKILL at random and at chosen moments, lose nothing.

Small real fits are killed and started again with the same words until they are done. Then the loss curve of
metrics.csv, the hashes of the final weights and of the optimizer's state, and the result must equal those of a run
that nobody disturbed. Run: python benchmarks/kill_matrix.py --kills 100 --jobs 2 --out FOLDER
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from kill_commands import SweepKiller, commands, kill_command
from kill_fits import Cell, CellKiller, CellReport, References, cells
from kill_moments import aims
from llada_lightning.support.files import write_json, written_atomically
from processes import child_environment
from small_fits import prepare_corpora

COMMANDS = ("prepare", "convert", "collect", "sweep")
HITS = ("start-up", "training", "save", "validation")
COMPARED = ("curve", "weights", "optimizer", "result")

Job = Callable[[Callable[[], None]], CellReport]
"""From a function to call after each kill to the report."""


def shares(total: int, parts: int) -> list[int]:
    """A total in whole parts as equal as can be, the larger ones first."""
    return [total // parts + (part < total % parts) for part in range(parts)]


def plan(options: argparse.Namespace, references: References) -> tuple[dict[str, Job], list[Cell]]:
    """The jobs by name, and the undisturbed runs that they need."""
    matrix = [cell for cell in cells() if chosen(cell.name, options.only)]
    jobs: dict[str, Job] = {}
    needed = [cell.undisturbed for cell in matrix]
    kills = shares(options.kills, max(1, len(matrix)))
    for number, (cell, count) in enumerate(zip(matrix, kills, strict=False)):
        if count:
            jobs[cell.name] = fit_job(cell, number, count, references, options)
    names = [name for name in COMMANDS if chosen(name, options.only)]
    for name, count in zip(names, shares(options.command_kills, max(1, len(names))), strict=False):
        if count:
            jobs[name] = command_job(name, count, references, options)
            needed += [Cell("arm"), Cell("llada")]
    return jobs, list(dict.fromkeys(needed))


def chosen(name: str, only: list[str]) -> bool:
    """Whether a name holds one of the words."""
    return not only or any(word in name for word in only)


def fit_job(cell: Cell, number: int, kills: int, references: References, options: argparse.Namespace) -> Job:
    folder, wanted = options.out / "runs", aims(kills, number)
    return lambda advance: CellKiller(cell, wanted, references, folder, options.seed, advance).run()


def command_job(name: str, kills: int, references: References, options: argparse.Namespace) -> Job:
    folder = options.out / "commands"
    if name == "sweep":
        return lambda advance: SweepKiller(references, folder, options.seed, advance).run(kills)
    [command] = [command for command in commands(references) if command.name == name]
    return lambda advance: kill_command(command, kills, references, folder, options.seed, advance)


def run_jobs(jobs: dict[str, Job], needed: list[Cell], references: References, kills: int, at_once: int) -> list[Any]:
    """The undisturbed runs, then all jobs, ``at_once`` at a time; reports in the jobs' order."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    reports: dict[str, CellReport] = {}
    with (
        Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as bar,
        ThreadPoolExecutor(at_once) as pool,
    ):
        undisturbed = bar.add_task("undisturbed runs", total=len(needed))
        for done in as_completed([pool.submit(references.get, cell) for cell in needed]):
            done.result()
            bar.advance(undisturbed)
        task = bar.add_task("kills", total=kills)
        running = {pool.submit(job, lambda: bar.advance(task)): name for name, job in jobs.items()}
        for ended in as_completed(running):
            name, error = running[ended], ended.exception()
            reports[name] = ended.result() if error is None else failed(name, error)
            console.print(describe(reports[name]), highlight=False)
    return [reports[name] for name in jobs]


def failed(name: str, error: BaseException) -> CellReport:
    return CellReport(name, findings=[f"{type(error).__name__}: {error}"])


def describe(report: CellReport) -> str:
    """A cell in a line."""
    left = f"; left behind: {', '.join(report.left)}" if report.left else ""
    state = "equal" if report.good else "; ".join([*report.findings, *report.different.values()]) or "nothing ran"
    return f"{report.name}: {len(report.kills)} kills, {report.restarts} restarts: {state}{left}"


def table(reports: list[CellReport]) -> str:
    """The reports as a Markdown table, with their sums."""
    head = ["cell", "kills", *HITS, "result", "one rank", "restarts", "left behind", "steps lost"]
    lines = ["| " + " | ".join([*head, *COMPARED]) + " |", "|" + "---|" * (len(head) + len(COMPARED))]
    for report in reports:
        equal = ["-" if not report.runs else "no" if key in report.different else "yes" for key in COMPARED]
        lines.append("| " + " | ".join([report.name, *counts([report]), f"{report.mean_lost:.1f}", *equal]) + " |")
    lost = sum(kill.lost for report in reports for kill in report.kills)
    kills = sum(len(report.kills) for report in reports)
    equal = [str(sum(bool(r.runs) and key not in r.different for r in reports)) for key in COMPARED]
    lines.append("| " + " | ".join(["all", *counts(reports), f"{lost / max(1, kills):.1f}", *equal]) + " |")
    return "\n".join(lines)


def counts(reports: list[CellReport]) -> list[str]:
    """Kills, kills by what they hit, kills of one rank only, restarts, temporary files that stayed."""
    kills = [kill for report in reports for kill in report.kills]
    hits = Counter(kill.hit for kill in kills)
    results = hits["result"] + hits["after a result"]
    ranks = sum(kill.target.startswith("rank") for kill in kills)
    restarts, left = sum(report.restarts for report in reports), sum(len(report.left) for report in reports)
    return [str(number) for number in [len(kills), *(hits[hit] for hit in HITS), results, ranks, restarts, left]]


def write_report(out: Path, reports: list[CellReport], seconds: float, options: argparse.Namespace) -> None:
    """`kill_matrix.json` and `kill_matrix.md`."""
    about = {
        "seed": options.seed,
        "jobs": options.jobs,
        "seconds": round(seconds),
        "cores": len(os.sched_getaffinity(0)),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "lightning": version("lightning"),
        "date": time.strftime("%Y-%m-%d"),
    }
    bad = [report for report in reports if not report.good]
    content = {**about, "equal": not bad, "cells": [report.as_dict() for report in reports]}
    write_json(out / "kill_matrix.json", content)
    notable = [report for report in reports if not report.good or report.left]
    findings = [f"- {describe(report)}" for report in notable] or ["Every run equals its undisturbed one."]
    with written_atomically(out / "kill_matrix.md") as path:
        path.write_text("\n\n".join([table(reports), "\n".join(findings), str(about)]) + "\n")


def main(argv: list[str] | None = None) -> int:
    """Returns 0 if every run equals its undisturbed one and nothing else was found, else 1."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100, help="of fits, over all cells")
    parser.add_argument("--command-kills", type=int, default=20, help="of prepare, convert, collect and sweep")
    parser.add_argument("--jobs", type=int, default=2, help="cells at once")
    parser.add_argument("--out", type=Path, required=True, help="a new folder, for everything")
    parser.add_argument("--seed", type=int, default=0, help="of all random moments")
    parser.add_argument("--only", nargs="*", default=[], metavar="WORD", help="cells whose name holds one of these")
    options = parser.parse_args(argv)
    options.out = options.out.resolve()
    if options.out.exists() and any(options.out.iterdir()):
        parser.error(f"--out: {options.out} is not empty; name a new folder")
    names = [*(cell.name for cell in cells()), *COMMANDS]
    if not any(chosen(name, options.only) for name in names):
        parser.error(f"--only: no cell is called {' or '.join(options.only)}; choose from: {'; '.join(names)}")
    begin = time.monotonic()
    environment = child_environment(options.out / "tmp")
    references = References(options.out / "undisturbed", prepare_corpora(options.out / "data"), environment)
    jobs, needed = plan(options, references)
    reports = run_jobs(jobs, needed, references, options.kills + options.command_kills, options.jobs)
    write_report(options.out, reports, time.monotonic() - begin, options)
    print(table(reports))
    print(f"\n{'all equal' if all(report.good for report in reports) else 'NOT equal'}: {options.out}/kill_matrix.json")
    return 0 if all(report.good for report in reports) else 1


if __name__ == "__main__":
    sys.exit(main())
