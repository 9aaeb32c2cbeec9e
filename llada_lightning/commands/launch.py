"""``llada launch``: one process resolves a run, and a launcher starts it on many.

Under a W&B sweep the agent runs this verb: it alone has the sweep's arguments, and its environment, which the launched
processes inherit, names the run that they are to log to.
"""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

from llada_lightning.study.sweep import launch_fit
from llada_lightning.support.command_line import CommandParser
from llada_lightning.support.errors import UserError
from llada_lightning.support.files import written_atomically
from llada_lightning.support.libraries import quiet_libraries

SRUN = "srun --kill-on-bad-exit=1"


def main(argv: list[str]) -> int:
    """``llada launch [--launcher L] -- fit …``: writes the run's `launch.yaml`, and becomes the launcher."""
    cut = argv.index("--") if "--" in argv else len(argv)
    parser = CommandParser(
        prog="llada launch",
        description="Resolve a run once, then start it on many processes: `llada launch -- fit --config …`.",
    )
    parser.add_argument("--launcher", type=str, help=f"in a SLURM job '{SRUN}', else none by default")
    options = parser.parse_args(argv[:cut])
    arguments = argv[cut + 1 :]
    if arguments[:1] != ["fit"]:
        raise UserError("launch: what to launch is not said; give `llada launch -- fit` and the run's arguments")
    default = SRUN if "SLURM_JOB_ID" in os.environ else ""
    words = launcher_words(default if options.launcher is None else options.launcher)
    quiet_libraries()
    from llada_lightning.training.fit import resolved_run  # after the parser: --help answers at once

    folder, resolved = resolved_run(arguments)
    try:
        with written_atomically(folder / "launch.yaml") as path:
            path.write_text(resolved)
    except OSError as error:
        raise UserError(f"run.root: {folder} cannot be written ({error.strerror}); choose another") from error
    return _become([*words, *launch_fit(["fit", "--config", str(folder / "launch.yaml")])])


def launcher_words(launcher: str) -> list[str]:
    """A launcher as words; torchrun, which expects a script, is told to run a program."""
    try:
        words = shlex.split(launcher)
    except ValueError as error:
        raise UserError(f"launch: --launcher {launcher!r} is no command ({error}); fix its quotes") from error
    is_torchrun = words and (Path(words[0]).name == "torchrun" or "torch.distributed.run" in words)
    return [*words, "--no-python"] if is_torchrun and "--no-python" not in words else words


def _become(words: list[str]) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        os.execvp(words[0], words)
    except OSError as error:
        raise UserError(f"launch: '{words[0]}' cannot be started ({error.strerror}); check --launcher") from error
