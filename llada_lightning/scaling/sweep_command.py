"""``llada sweep``: from argv to the runs of a sweep file."""

from __future__ import annotations

from dataclasses import asdict

from rich.markup import escape

from llada_lightning.command_line import CommandParser, add_json, people_console, print_json
from llada_lightning.scaling.sweep import read_sweep
from llada_lightning.scaling.sweep_run import RunFolder, SweepOutcome, run_sweep


def sweep_command(argv: list[str], run_folder: RunFolder) -> int:
    """``llada sweep run FILE``: runs what is left of a W&B sweep on this machine.

    Args:
        argv: the words after ``llada sweep``; what follows ``--`` is handed to every fit.
        run_folder: from ``fit`` and its arguments to the folder of that run.

    Returns:
        0 if every run is done, 1 if some failed, 130 if the sweep was interrupted.

    Raises:
        UserError: the file is no grid sweep of ``llada fit``, or a run's arguments are refused.
    """
    cut = argv.index("--") if "--" in argv else len(argv)
    parser = CommandParser(
        prog="llada sweep",
        description="Run a W&B sweep file on this machine. Arguments after `--` are handed to every fit.",
    )
    parser.add_argument("action", choices=["run"], help="run: do what is left of the sweep")
    parser.add_argument("file", type=str, metavar="FILE", help="W&B sweep file, method grid, command `llada fit …`")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once")
    add_json(parser)
    options = parser.parse_args(argv[:cut])
    notes = people_console(stderr=True)
    outcome = run_sweep(read_sweep(options.file), run_folder, jobs=options.jobs, extra=argv[cut + 1 :], console=notes)
    if options.json:
        print_json(asdict(outcome))
    else:
        _print_outcome(outcome)
    return outcome.exit_code


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
        console.print(escape(line), soft_wrap=True)
    if outcome.interrupted:
        console.print("interrupted; the same command goes on where it stopped")
    elif outcome.failed:
        console.print("the same command tries the failed runs again")
