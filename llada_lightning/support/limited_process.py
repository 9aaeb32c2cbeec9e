"""A Python process that works on the input of strangers: bounded in CPU time and memory, even within one operation.

On systems other than Linux the limit of memory may not be held.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any


class CallError(Exception):
    """The function in the process raised an exception; the message is one line."""


class ProcessEndedError(Exception):
    """The process ended before it answered.

    Args:
        code: The exit code of the process; negative: the signal that ended it.
    """

    def __init__(self, code: int) -> None:
        super().__init__(f"its process ended with exit code {code}")
        self.code = code

    @property
    def over_time(self) -> bool:
        """Whether the process exceeded its CPU time."""
        return self.code == -signal.SIGPROF

    @property
    def over_memory(self) -> bool:
        """Whether the process exceeded its memory, as far as the exit code tells."""
        return self.code in (-signal.SIGABRT, -signal.SIGKILL, -signal.SIGSEGV)


class LimitedProcess:
    """A process that calls functions for this one.

    It starts at the first call, and again at the first call after it ended. It ends with this object or with this
    process. A fork of this process gets another one.

    Args:
        module: The module whose mapping ``CALLS`` holds the functions by name. Their arguments and results are made of
            the types of JSON.
    """

    def __init__(self, module: str) -> None:
        self._module = module
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = os.getpid()

    def call(self, name: str, arguments: list[Any], seconds: float, memory: int) -> Any:
        """Returns the result of a function.

        Args:
            name: The name of the function.
            arguments: The arguments of the function.
            seconds: The limit of CPU time of this call, of all threads together.
            memory: The limit of the memory of the process, in bytes.

        Raises:
            CallError: The function raised an exception.
            ProcessEndedError: The process exceeded a limit or was ended.
            OSError: The process cannot be started.
        """
        if self._owner != os.getpid():  # after a fork lock and pipes are those of the parent
            self._lock, self._process, self._owner = threading.Lock(), None, os.getpid()
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._start()
                self.prepare()
            return self.exchange(name, arguments, seconds, memory)

    def prepare(self) -> None:
        """Called with each new process before its first call; subclasses give it what later calls need."""

    def exchange(self, name: str, arguments: list[Any], seconds: float, memory: int) -> Any:
        """:meth:`call` for a process that runs already."""
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps([name, arguments, seconds, memory]).encode() + b"\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = b""
        except BaseException:  # an interrupt, after which the answer to this call must not be that of the next
            self.close()
            raise
        if not line.endswith(b"\n"):
            code = process.wait()
            self.close()
            raise ProcessEndedError(code)
        answer = json.loads(line)
        if "error" in answer:
            raise CallError(answer["error"])
        return answer["value"]

    def close(self) -> None:
        """Ends the process."""
        process, self._process = self._process, None
        if process is not None:
            _end(process, self._owner)

    def _start(self) -> None:
        self.close()
        # -I: a module in the working directory of the user is never imported; the path is that of this process.
        program = (
            f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import serve; "
            f"from {self._module} import CALLS; serve(CALLS)"
        )
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-c", program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # where a library written in Rust prints the stack of a panic
            start_new_session=True,  # Ctrl-C is meant for this process
        )
        weakref.finalize(self, _end, self._process, self._owner)


def _end(process: subprocess.Popen[bytes], owner: int) -> None:
    if owner != os.getpid():  # a fork has copies of the pipes, and no child to end
        return
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        assert pipe is not None
        with suppress(OSError):  # a request that was not sent
            pipe.close()


def serve(calls: Mapping[str, Callable[..., Any]]) -> None:
    """Answers the lines of stdin until it is closed; runs in the process."""
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # which ends the process
    _limit(resource.RLIMIT_CORE, 0)
    for line in sys.stdin.buffer:
        name, arguments, seconds, memory = json.loads(line)
        _limit(resource.RLIMIT_DATA, memory)
        signal.setitimer(signal.ITIMER_PROF, seconds)
        try:
            answer = json.dumps({"value": calls[name](*arguments)})
        except BaseException as error:  # a panic of a library derives from BaseException
            answer = json.dumps({"error": " ".join(str(error).split())})
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.buffer.write(answer.encode() + b"\n")
        sys.stdout.buffer.flush()


def _limit(kind: int, value: int) -> None:
    hard = resource.getrlimit(kind)[1]
    with suppress(ValueError, OSError):  # macOS refuses some limits
        resource.setrlimit(kind, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))
