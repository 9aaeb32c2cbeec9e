"""``llada sweep``: from argv to the runs of a sweep file."""

from __future__ import annotations

import shlex
from collections import Counter
from dataclasses import asdict
from functools import partial
from pathlib import Path

from llada_lightning.commands import fit
from llada_lightning.commands.main import main as command
from llada_lightning.study.sweep import (
    SHIPPED,
    Sweep,
    check_unchanged,
    fit_arguments,
    planned_run,
    read_sweep,
    render_command,
    runs_that_left,
    state_of,
)
from llada_lightning.study.sweep.runner import SweepOutcome, budget_share, run_sweep
from llada_lightning.support.command_line import CommandParser, add_json, print_json
from llada_lightning.support.errors import UserError
from llada_lightning.support.forks import ForkServer, can_fork
from llada_lightning.support.libraries import quiet_libraries
from llada_lightning.support.printing import people_console

PRELOADED = "llada_lightning.training.preloaded"


def main(argv: list[str]) -> int:
    """``llada sweep run FILE``: runs what is left of a W&B sweep on this machine; ``llada sweep show FILE`` lists it.

    Returns:
        0 if every run is done, 1 if some failed, 130 if the sweep was interrupted; of one run by its index, the exit
        code of its fit.
    """
    cut = argv.index("--") if "--" in argv else len(argv)
    parser = CommandParser(
        prog="llada sweep",
        description="Run a W&B sweep file on this machine. Arguments after `--` are handed to every fit.",
    )
    parser.add_argument("action", choices=["run", "show"], help="run: do what is left of it; show: list its runs")
    parser.add_argument(
        "file",
        type=str,
        metavar="FILE",
        help="W&B sweep file, method grid, command `llada fit …`; or the name of one that comes with the package: "
        + ", ".join(SHIPPED),
    )
    parser.add_argument("--jobs", type=int, default=1, help="runs at once")
    parser.add_argument(
        "--index", type=int | None, help="run only this one (from 0), in this process: a job array's task"
    )
    parser.add_argument(
        "--fork", type=bool, default=True, help="fork runs from one process that has imported all they need (Linux)"
    )
    parser.add_argument("--edited", action="store_true", help="the file was changed half-way, and that is meant")
    add_json(parser)
    options = parser.parse_args(argv[:cut])
    sweep, extra = read_sweep(options.file), argv[cut + 1 :]
    if options.action == "show":
        return _show(sweep, extra, options.json)
    if options.index is not None:
        return _run_one(sweep, options.index, extra, options.edited)
    # Before the runs are planned: the process imports meanwhile what they need.
    fork = partial(ForkServer([PRELOADED]).start, command) if options.fork and can_fork() else None
    notes = people_console(stderr=True)
    notes.print("importing the libraries, planning the runs …", style="dim")
    asked = {"jobs": options.jobs, "extra": extra, "edited": options.edited}
    outcome = run_sweep(sweep, run_folder, fork=fork, console=notes, **asked)
    if options.json:
        print_json(asdict(outcome))
    else:
        _print_outcome(outcome)
    return outcome.exit_code


def run_folder(arguments: list[str]) -> Path:
    """The folder of the run that `llada ARGUMENTS` (from `fit` on) would start."""
    quiet_libraries()
    from llada_lightning.training.fit import run_folder  # takes seconds: a sweep that is done needs none of it

    return run_folder(arguments)


def _run_one(sweep: Sweep, index: int, extra: list[str], edited: bool) -> int:
    if not 0 <= index < len(sweep.points):
        raise UserError(f"sweep: --index is {index}, but {sweep.path} has runs 0 to {len(sweep.points) - 1}")
    arguments = [*fit_arguments(render_command(sweep, sweep.points[index])), *extra]
    check_unchanged(sweep, run_folder(arguments).parent, by_index=True, edited=edited)
    return fit.main(arguments)


def _show(sweep: Sweep, extra: list[str], as_json: bool) -> int:
    runs = [planned_run(sweep, point, run_folder, extra) for point in sweep.points]
    states = [state_of(run.folder) for run in runs]
    studies = dict.fromkeys(run.folder.parent for run in runs) if sweep.path is not None else {}
    left = {str(study): count for study in studies if (count := len(runs_that_left(sweep, study)))}
    if as_json:
        listed = [
            {
                "index": index,
                "state": state,
                "folder": str(run.folder),
                "command": shlex.join(["llada", *run.arguments]),
            }
            for index, (run, state) in enumerate(zip(runs, states, strict=True))
        ]
        print_json({"name": sweep.name, "file": str(sweep.path), "runs": listed, "left_the_file": left})
        return 0
    console = people_console()
    for index, (run, state) in enumerate(zip(runs, states, strict=True)):
        what = f"{state} {budget_share(run):.0%}" if state == "begun" else state
        console.print(f"{index:>5}  {what:<10}  {run.folder!s}", soft_wrap=True, highlight=False)
    counts = Counter(states)
    console.print(f"{len(runs)} runs: " + ", ".join(f"{count} {state}" for state, count in counts.items()))
    if sweep.path in SHIPPED.values():  # for `wandb sweep`, or as the start of a sweep of one's own
        console.print(f"file: {sweep.path}", soft_wrap=True, markup=False, highlight=False)
    for study, count in left.items():
        console.print(f"note: {count} of the runs that {study} was begun with have left the file", soft_wrap=True)
    return 0


def _print_outcome(outcome: SweepOutcome) -> None:
    console = people_console()
    counts = {
        "done": len(outcome.done),
        "done before": len(outcome.skipped),
        "of these diverged": len(outcome.diverged),
        "failed": len(outcome.failed),
        "left": len(outcome.left),
    }
    console.print("runs: " + ", ".join(f"{count} {name}" for name, count in counts.items() if count))
    for failed in outcome.failed:
        line = f"failed: {failed.name}: {failed.reason}; log: {failed.log}"
        console.print(line, soft_wrap=True)
    if outcome.interrupted:
        console.print("interrupted; the same command goes on where it stopped")
    elif outcome.failed:
        console.print("the same command tries the failed runs again")
