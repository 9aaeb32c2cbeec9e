"""Processes that are forked from one that has imported the libraries already, so that each of many begins at once.

They come from the fork server of ``multiprocessing``, and lead a life of their own as if they had been started by a
shell: a session, an environment, an argv and a log of their own, and they outlive whoever asked for them. The server
imports modules and nothing else: it starts no threads of its own and touches no GPU, both of which a fork cannot copy.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from multiprocessing import connection, forkserver, reduction
from multiprocessing.context import ForkServerProcess
from typing import Any

from llada_lightning.support.errors import UserError

_ATTEMPTS, _PAUSE = 50, 0.1
_SERVER_ENDED = 255

Call = Callable[[list[str]], int]
"""A function of a module, from the arguments of a command to its exit code."""


_LONGEST_FOLDER = 70
"""Bytes of the path of the folder for temporary files: the server's socket lies below it, and has at most 107."""


def can_fork() -> bool:
    """Whether forked processes are safe here: on Linux, where the path of the folder for temporary files is short."""
    # Libraries of other systems do not stand a fork.
    return sys.platform == "linux" and len(os.fsencode(tempfile.gettempdir())) <= _LONGEST_FOLDER


class ForkServer:
    """The process that others are forked from. It ends when they and this process have ended.

    Args:
        modules: The names of modules that it imports. A process has one fork server: modules of a second object of
            this class are not imported.
    """

    def __init__(self, modules: Sequence[str]) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(list(modules))
        # An interrupt from the terminal is for us: the server would print a traceback while it imports.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        try:
            forkserver.ensure_running()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def start(self, call: Call, arguments: list[str], environment: Mapping[str, str], output: int) -> ForkedProcess:
        """Fork a process that calls a function and ends.

        Args:
            call: The function of a module. The module's name and the function's are all that is handed over.
            arguments: The arguments of the function, and of the process as others see it (``sys.argv``).
            environment: The environment of the process.
            output: A file descriptor, for stdout and stderr. The process shares its locks.

        Raises:
            UserError: The server died, such as while it imported a module.
        """
        given = (call.__module__, call.__qualname__, arguments, dict(environment), _Descriptor(output))
        for _ in range(_ATTEMPTS):
            process = self._context.Process(target=_run, args=given)
            try:
                process.start()
            except ConnectionRefusedError:  # a server that was killed, and is not yet gone: then a new one is started
                time.sleep(_PAUSE)
            except (EOFError, OSError) as error:
                raise UserError(
                    f"the process that runs are forked from has ended ({type(error).__name__}); its own message stands "
                    "above; with --fork false each run is a process of its own"
                ) from error
            else:
                return ForkedProcess(process)
        raise UserError("the process that runs are forked from does not answer; give --fork false")


class ForkedProcess:
    """A forked process with the part of ``subprocess.Popen`` that a runner of processes needs."""

    def __init__(self, process: ForkServerProcess) -> None:
        self._process = process
        assert process.pid is not None
        self.pid = process.pid

    @property
    def returncode(self) -> int | None:
        """The exit code; negative: the signal that ended it; 255 as well where the server has ended; None: it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, once there is one.

        Raises:
            subprocess.TimeoutExpired: The process still runs after ``timeout`` seconds.
        """
        if not connection.wait([self._process.sentinel], timeout):
            raise subprocess.TimeoutExpired(str(self.pid), timeout or 0.0)
        self._process.join()
        code = self.returncode
        assert code is not None
        return code

    def terminate(self) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGTERM)

    def kill_group(self) -> None:
        """Ends the process, and what it has left behind."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        if self.returncode in (None, _SERVER_ENDED):  # it may not lead a group yet
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)


class _Descriptor:
    """A file descriptor that goes to the new process with the other arguments."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __reduce__(self) -> tuple[Any, ...]:
        return _received, (reduction.DupFd(self.number),)


def _received(handle: Any) -> _Descriptor:
    return _Descriptor(handle.detach())


def _run(module: str, name: str, arguments: list[str], environment: dict[str, str], output: _Descriptor) -> None:
    """What the forked process does: become a process of its own, and call the function."""
    os.setsid()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    for own in (1, 2):
        os.dup2(output.number, own)
    os.close(output.number)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    os.environ.clear()
    os.environ.update(environment)
    multiprocessing.set_start_method(None, force=True)  # the platform's, as in a command's own process
    # What starts this process again, for its second device, reads these two.
    sys.modules["__main__"] = import_module("llada_lightning.__main__")
    sys.argv = [sys.modules["__main__"].__file__ or "", *arguments]
    try:
        code = getattr(import_module(module), name)(arguments)
    finally:
        # A forked process leaves without them; among them are those that remove temporary folders.
        atexit._run_exitfuncs()
    sys.exit(code)
