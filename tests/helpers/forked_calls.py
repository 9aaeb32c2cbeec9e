"""What tests of forked processes call: functions of a module, from arguments to an exit code."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import sys
import tempfile
import threading
import time


def describe(arguments: list[str]) -> int:
    """Prints what the process is, as JSON."""
    found = {
        "arguments": arguments,
        "argv": sys.argv[1:],
        "main": sys.modules["__main__"].__spec__.name,
        "environment": dict(os.environ),
        "leads_a_session": os.getsid(0) == os.getpid(),
        "threads": threading.active_count(),
        "torch": "torch" in sys.modules,
        "cuda": "torch" in sys.modules and sys.modules["torch"].cuda.is_initialized(),
        "signals": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
    }
    print(json.dumps(found))
    return 7


def leave_a_folder(arguments: list[str]) -> int:
    """Makes a temporary folder that is to be removed as the process ends, and prints its path."""
    leave_a_folder.kept = tempfile.TemporaryDirectory()  # type: ignore[attr-defined]
    print(leave_a_folder.kept.name)  # type: ignore[attr-defined]
    return 0


def fail(arguments: list[str]) -> int:
    raise RuntimeError("of the call")


def wait(arguments: list[str]) -> int:
    """Says that it runs, and waits for a signal."""
    print("waiting")
    while True:
        time.sleep(60)


def locked(path: str) -> bool:
    """Whether another process holds the lock of a file."""
    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
