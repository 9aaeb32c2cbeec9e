"""Programs that a model wrote, run in a process of their own with limits.

The process has no more than: so many seconds of CPU and of the clock, so much memory, files of so many bytes, an empty
temporary folder to work in, and an environment without what the parent's holds. Where the system lets users make
namespaces (`unshare`), it has no network and its own process numbers, so that all it started ends with it. Elsewhere
its process group is ended, which a program that means harm can leave. The number of processes is limited, but Linux
does not hold root to that. Files that the user can read, it can read: run code of a model that you do not trust in a
container.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

Verdict = Literal["passed", "failed", "timed out"]

_ERRORS_KEPT = 2000
_ISOLATION = ("--user", "--map-root-user", "--net", "--pid", "--fork", "--kill-child=SIGKILL")

# Runs in the child. The word that says "passed" is read before the program starts and written after it has ended, so
# that one which leaves early, with whatever exit code, has not passed.
_CHILD = """\
import json, os, resource, sys
order = json.loads(sys.stdin.readline())
said = os.dup(1)
errors = os.open("errors", os.O_WRONLY | os.O_CREAT)
for target, source in ((0, os.open(os.devnull, os.O_RDONLY)), (1, os.open(os.devnull, os.O_WRONLY)), (2, errors)):
    os.dup2(source, target)
for name, value in order["limits"].items():
    limit = getattr(resource, name)
    most = resource.getrlimit(limit)[1]
    value = value if most == resource.RLIM_INFINITY else min(value, most)
    resource.setrlimit(limit, (value, value))
exec(compile(order["program"], "program", "exec"), {"__name__": "__main__"})
os.write(said, order["word"].encode())
"""


@dataclass(frozen=True)
class Limits:
    """What a program may use.

    Args:
        seconds: of the clock.
        cpu_seconds: of CPU, of each process.
        memory_bytes: of address space, of each process.
        file_bytes: of each file that it writes.
        processes: of the user, its own included; not held against root.
    """

    seconds: float = 10.0
    cpu_seconds: int = 10
    memory_bytes: int = 2**30
    file_bytes: int = 2**20
    processes: int = 64


@dataclass(frozen=True)
class ProgramResult:
    """How a program ended.

    Args:
        verdict: `passed`: it ran to its last line.
        errors: the end of what it wrote to stderr.
    """

    verdict: Verdict
    errors: str = ""


def run_program(program: str, limits: Limits = Limits()) -> ProgramResult:
    """Runs Python source to its end, or to a limit.

    A program passes where its last line is reached: an exception, a failed assertion, an exit, of whatever code, and a
    limit are failures.
    """
    with TemporaryDirectory(prefix="llada-program-", ignore_cleanup_errors=True) as folder:
        word = secrets.token_hex(16)
        order = {"program": program, "word": word, "limits": _rlimits(limits)}
        process = subprocess.Popen(
            [*_isolation(), sys.executable, "-I", "-B", "-c", _CHILD],
            cwd=folder,
            env={"PATH": os.defpath, "LANG": "C.UTF-8", "HOME": folder, "TMPDIR": folder, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
        try:
            said, _ = process.communicate(json.dumps(order) + "\n", timeout=limits.seconds)
        except subprocess.TimeoutExpired:
            return ProgramResult("timed out", _errors(Path(folder)))
        finally:
            _end(process)
        passed = process.returncode == 0 and said == word
        return ProgramResult("passed" if passed else "failed", _errors(Path(folder)))


def _rlimits(limits: Limits) -> dict[str, int]:
    return {
        "RLIMIT_CPU": limits.cpu_seconds,
        "RLIMIT_AS": limits.memory_bytes,
        "RLIMIT_FSIZE": limits.file_bytes,
        "RLIMIT_NPROC": limits.processes,
        "RLIMIT_CORE": 0,
    }


def _end(process: subprocess.Popen[str]) -> None:
    """Ends the process and all of its group; with its own process numbers, all that it started."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with suppress(OSError):
                stream.close()


def _errors(folder: Path) -> str:
    try:
        with (folder / "errors").open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _ERRORS_KEPT))
            return file.read().decode(errors="replace")
    except OSError:
        return ""


@cache
def _isolation() -> tuple[str, ...]:
    """The command that takes network and process numbers away, where the system allows it."""
    unshare = shutil.which("unshare")
    if unshare is None:
        return ()
    command = (unshare, *_ISOLATION)
    tried = subprocess.run([*command, "true"], capture_output=True, check=False)
    return command if tried.returncode == 0 else ()


def is_isolated() -> bool:
    """Whether programs run without network and with process numbers of their own."""
    return bool(_isolation())
