"""One writer for the folder of a run: a lock in the folder that names its owner and ends with the process.

The lock is the system's (POSIX, `fcntl`): it ends with the process, however that ends, and is not inherited by the
workers of a loader, which outlive a killed process by some seconds.
"""

from __future__ import annotations

import errno
import fcntl
import getpass
import json
import os
import shlex
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from textwrap import shorten
from typing import IO

from llada_lightning.support.cluster import Launch, shared_answer
from llada_lightning.support.errors import UserError

LOCK = ".lock"
"""The file, in the folder of a run that is trained now or was killed, that names its owner, as JSON."""

_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


@contextmanager
def run_lock(folder: Path, launch: Launch | None, first: bool) -> Iterator[None]:
    """Holds the folder of a run while the block runs; the first process for all of them.

    On a file system without locks a line on stderr says so, and the block runs.

    Args:
        folder: The folder of the run, which is created.
        launch: The launch of this process. Where torchrun launched it, all processes get the first one's answer.
        first: Whether this is the first process of the run.

    Raises:
        UserError: Another process holds the folder, and is named, or the folder cannot be written. Nothing is changed.
    """
    held: IO[str] | None = None
    refusal = ""
    if first:
        try:
            held = _locked(folder / LOCK)
        except UserError as error:
            refusal = str(error)
    refusal = shared_answer(launch, "lock", refusal)
    if refusal:
        raise UserError(refusal)
    try:
        yield
    finally:
        if held is not None:
            (folder / LOCK).unlink(missing_ok=True)  # while it is held, so that nobody's is removed
            held.close()


def check_unlocked(folder: Path) -> None:
    """Refuses a folder that a process trains in now; writes nothing.

    Args:
        folder: The folder of the run.

    Raises:
        UserError: A process trains in the folder; the message names it.
    """
    try:
        with (folder / LOCK).open("r+") as file:
            _lock(file, folder)
    except FileNotFoundError:
        return
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise _unwritable(folder, error) from error


def _locked(path: Path) -> IO[str] | None:
    """Returns the locked file with this process as its owner; None: the file system has no locks."""
    folder = path.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        while True:
            file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+")
            try:
                _lock(file, folder)
                if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                    file.truncate(0)
                    json.dump(_this_process(), file)
                    file.flush()
                    return file
            except BaseException:
                file.close()
                raise
            file.close()  # of an owner that has just left, and removed it
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise _unwritable(folder, error) from error
        print(
            f"warning: {folder} lies on a file system without locks ({error.strerror}); make sure that no other "
            "process trains in it",
            file=sys.stderr,
            flush=True,
        )
        return None


def _lock(file: IO[str], folder: Path) -> None:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        raise UserError(
            f"run.name: {folder} is in use by {_owner(file)}; wait for it or end it, or choose another --run.name"
        ) from error


def _owner(file: IO[str]) -> str:
    try:
        owner = json.load(file)
        return (
            f"process {owner['pid']} of {owner['user']} on {owner['host']} since {owner['since']} "
            f"({shorten(owner['command'], 120)})"
        )
    except (ValueError, LookupError, TypeError, AttributeError):  # it is about to write its name
        return "another process"


def _this_process() -> dict[str, str | int]:
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a user without a name
        user = f"user {os.getuid()}"
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "user": user,
        "since": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": shlex.join(sys.argv),
    }


def _unwritable(folder: Path, error: OSError) -> UserError:
    return UserError(f"run.root: {folder} cannot be written ({error.strerror}); choose another")
