"""Programs that a model wrote, judged by tests, each of the two in a process of its own with limits.

The verdict comes from the process of the tests, which sees of the program nothing but plain values (see
``evaluation.sandboxed``). Each process has the resources of :class:`Limits` and nothing of the parent's environment.
Nothing that a program leaves behind is read: whatever it prints goes nowhere, and its files vanish with it.

Where Linux lets the user make namespaces, a process has no network, process numbers of its own, so that all it started
ends with it, and a file system that holds Python and the system's libraries, read only, and a small folder in memory to
work in. It can neither read nor write the user's files. Elsewhere (see :func:`is_isolated`) it has no folder and can
write no byte to a file, but it can read, empty and remove what the user can, reach the network, and leave processes
behind, which could attach to the tests' process and forge a verdict. :func:`say_what_is_not_held` tells the user.

Not held anywhere: the sum of the memory of all processes that a program starts (each is limited); their number where
they are root's in a user namespace; and what the tests themselves believe the program, such as a helper that
HumanEval's prompt defines and its test calls (`poly` of HumanEval/32): a program that defines it anew decides what it
returns.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, Literal

from llada_lightning.support.signals import say

Verdict = Literal["passed", "failed", "timed out"]

_NAMESPACES = ("--mount", "--net", "--ipc", "--pid", "--fork", "--kill-child=SIGKILL")
_SYSTEM = ("/usr", "/lib", "/lib32", "/lib64", "/bin", "/sbin", "/etc", "/nix/store")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
_FILES = 4096
"""Files and folders that a program may make."""


@dataclass(frozen=True)
class Limits:
    """What a program may use, and what its tests may.

    Args:
        seconds: The wall-clock time of program and tests together, in seconds.
        cpu_seconds: The CPU time of each process, in seconds.
        memory_bytes, file_bytes: The sizes of the address space of each process, and of each file, in bytes.
        folder_bytes: The size of all files together, in bytes.
        processes: The number of processes of the user, the program's own included.
    """

    seconds: float = 10.0
    cpu_seconds: int = 10
    memory_bytes: int = 2**30
    file_bytes: int = 2**20
    folder_bytes: int = 2**26
    processes: int = 64


@dataclass(frozen=True)
class ProgramResult:
    """How a program ended (`passed`: its tests ran to their last line), and the end of the traceback of its tests."""

    verdict: Verdict
    errors: str = ""


def run_program(program: str, limits: Limits = Limits(), tests: str = "") -> ProgramResult:
    """Runs Python source, and then tests that call what it defines.

    Args:
        program: The source of the program. Nothing in it can report that the tests passed.
        limits: The limits of program and tests.
        tests: The source of the tests, which use names of the program, such as HumanEval's `check(candidate)` or MBPP's
            `assert f(1) == 2`. Arguments and results are copies: numbers, text, containers, and a few values of the
            standard library. Any other object is asked by its name and equals nothing but itself. Without tests the
            program itself decides: it passes when it ran to its last line.
    """
    command = _isolation()
    with ExitStack() as processes, TemporaryFile("w+") as order:
        json.dump({"program": program, "tests": tests}, order)
        order.seek(0)
        with ExitStack() as descriptors:  # the processes have theirs; ours would keep the pipes open
            (answers, answer), (questions, question) = os.pipe(), os.pipe()
            for descriptor in (answers, answer, questions, question):
                descriptors.callback(os.close, descriptor)
            for_program = _start(command, limits, "program", stdin=questions, stdout=answer)
            processes.callback(_end, for_program)
            pipes = (answers, question)
            judge = _start(command, limits, "tests", pipes, stdin=order, stdout=subprocess.PIPE, pass_fds=pipes)
            processes.callback(_end, judge)
        try:
            said, _ = judge.communicate(timeout=limits.seconds)
        except subprocess.TimeoutExpired:
            return ProgramResult("timed out")
    try:
        verdict = json.loads(said)
    except ValueError:  # a limit has ended the tests
        return ProgramResult("failed", "the tests ended without a verdict")
    return ProgramResult("passed" if verdict["passed"] else "failed", verdict["errors"])


def _start(
    command: Sequence[str], limits: Limits, role: str, pipes: Sequence[int] = (), **streams: Any
) -> subprocess.Popen[bytes]:
    isolated = bool(command)
    paths = dict.fromkeys((*_SYSTEM, sys.base_prefix, sys.prefix))
    order = {
        "role": role,
        "pipes": pipes,
        "limits": {
            "RLIMIT_CPU": limits.cpu_seconds,
            "RLIMIT_AS": limits.memory_bytes,
            "RLIMIT_FSIZE": limits.file_bytes if isolated else 0,  # no folder of its own, so no files
            "RLIMIT_NPROC": limits.processes,
            "RLIMIT_CORE": 0,
        },
        "shown": [*(p for p in paths if not p.startswith("/usr/")), *_DEVICES] if isolated else None,
        "folder": f"size={limits.folder_bytes},nr_inodes={_FILES},mode=1777",
    }
    source = Path(__file__).with_name("sandboxed.py").read_text(encoding="utf-8")
    return subprocess.Popen(
        [*command, sys.executable, "-I", "-B", "-c", source, json.dumps(order)],
        cwd="/",
        env={"PATH": os.defpath, "LANG": "C.UTF-8", "HOME": "/tmp", "TMPDIR": "/tmp", "OMP_NUM_THREADS": "1"},
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        **streams,
    )


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends the process and all of its group; with its own process numbers, all that it started."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdout is not None:
        process.stdout.close()


@cache
def _isolation() -> tuple[str, ...]:
    """The command that makes the namespaces, empty where the system allows none; root tries without one of users."""
    unshare = shutil.which("unshare")
    users = ("--user", "--map-root-user")
    for kinds in ((), users) if sys.platform == "linux" and os.geteuid() == 0 else (users,):
        command = (unshare or "unshare", *kinds, *_NAMESPACES)
        with suppress(OSError):
            tried = _start(command, Limits(), "none", stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
            if tried.wait() == 0:
                return command
    return ()


def is_isolated() -> bool:
    """Whether programs run in namespaces of their own: of files, network and processes."""
    return bool(_isolation())


@cache
def say_what_is_not_held() -> None:
    """One line on stderr, once a process, where the system makes no namespaces."""
    if not is_isolated():
        say(
            "warning: this system lets this user make no namespaces, so the sandbox limits time, memory and the "
            "writing of files only: what the model wrote can read, empty and remove this user's files, reach the "
            "network, leave processes behind and, with intent, forge a verdict; use a container or a virtual machine"
        )


# --- pass@k -----------------------------------------------------------------------------------------------------------


class SandboxedCodeEval:
    """What `evaluate.load("code_eval")` gives to lm-evaluation-harness, with every program in a sandbox."""

    def compute(
        self, references: Sequence[str], predictions: Sequence[Sequence[str]], k: Sequence[int] = (1,), **_: object
    ) -> tuple[dict[str, float], dict[int, list[Verdict]]]:
        """The mean over problems of pass@k, for each k up to the number of candidates, and the verdicts.

        The references are the tests of each problem, the predictions its candidates.
        """
        verdicts = [
            [run_program(candidate, tests=tests).verdict for candidate in candidates]
            for tests, candidates in zip(references, predictions, strict=True)
        ]
        fewest = min(map(len, verdicts), default=0)
        scores = {
            f"pass@{n}": sum(pass_at(n, len(each), each.count("passed")) for each in verdicts) / len(verdicts)
            for n in k
            if n <= fewest
        }
        return scores, dict(enumerate(verdicts))


def pass_at(k: int, samples: int, passed: int) -> float:
    """The chance that one of k candidates, of the samples at random, passes: 1 - C(n - c, k) / C(n, k)."""
    return 1 - math.comb(samples - passed, k) / math.comb(samples, k)


@contextmanager
def sandboxed_code_eval() -> Iterator[None]:
    """Tasks that load the metric `code_eval` within the block get the sandboxed one; prints its limits."""
    import evaluate

    say_what_is_not_held()
    original = evaluate.load

    def load(path: str, *arguments: Any, **options: Any) -> Any:
        return SandboxedCodeEval() if path == "code_eval" else original(path, *arguments, **options)

    evaluate.load = load
    try:
        yield
    finally:
        evaluate.load = original
