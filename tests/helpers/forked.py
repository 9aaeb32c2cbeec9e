"""Processes that a server forks, which has imported the package: a new interpreter takes seven seconds to do so.

None shares the threads of the process that the tests run in.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from llada_lightning.commands.main import main
from llada_lightning.commands.sweep import PRELOADED
from llada_lightning.support.forks import ForkServer

_CONTEXT = multiprocessing.get_context("forkserver")
_SECONDS = 240


@cache
def server() -> ForkServer:
    return ForkServer([PRELOADED])


def exit_codes(function: Callable[..., Any], *arguments: tuple[Any, ...]) -> list[int | None]:
    """Call a function in a process for each tuple of arguments, at the same time; returns how the processes ended."""
    server()
    processes = [_CONTEXT.Process(target=_call, args=(function, given)) for given in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join(_SECONDS)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()  # where it is not done
        process.join()
    return codes


def run_command(argv: list[str], *environments: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run `llada` in a process for each environment; returns the first one's exit code, and what all printed."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = (Path(folder) / name for name in ("out", "err"))
        code, *_ = exit_codes(_command, *((argv, environment, out, err) for environment in environments))
        printed = [path.read_text() if path.exists() else "" for path in (out, err)]
    assert code is not None, printed
    return subprocess.CompletedProcess(argv, code, *printed)


def _call(function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    # As in a command's own process; a loader's worker would be the server's child else, and outlive its parent.
    multiprocessing.set_start_method("fork", force=True)
    function(*arguments)


def _command(argv: list[str], environment: dict[str, str], out: Path, err: Path) -> None:
    os.environ.clear()
    os.environ.update(environment)
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
    sys.exit(main(argv))
