"""A folder that is either complete or not there: written under a temporary name beside its place, then renamed."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from llada_lightning.errors import UserError


@contextlib.contextmanager
def building(out: Path) -> Iterator[Path]:
    """Gives a temporary folder beside ``out``, which takes the name ``out`` when the block ends well.

    A block that raises leaves nothing. What a killed process left is removed by the next one that builds the same
    folder: a lock, which the system drops with its process, tells what is left over from what is being written.

    Raises:
        UserError: ``out`` cannot be written, is taken away meanwhile, or another process is building it.
    """
    prefix = f".{out.name}.partial-"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(out, prefix)
        partial = Path(tempfile.mkdtemp(prefix=prefix, dir=out.parent))
        os.chmod(partial, 0o777 & ~_umask())  # mkdtemp's folder is closed to others
        lock = os.open(partial, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"output '{out}' cannot be written ({error.strerror}); choose another folder") from error
    try:
        _lock(lock, out)
        yield partial
        _take_name(partial, out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        os.close(lock)


def _lock(folder: int, out: Path) -> None:
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        message = f"output '{out}' is being prepared by another process; wait for it, or choose another folder"
        raise UserError(message) from error
    except OSError as error:  # some network file systems have no locks
        message = f"output '{out}' cannot be locked ({error.strerror}); choose a folder on another disk, and copy it"
        raise UserError(message) from error


def _take_name(partial: Path, out: Path) -> None:
    try:
        partial.rename(out)  # an empty folder in its place is replaced, any other is not
    except FileNotFoundError as error:
        raise UserError(f"output '{out}': its folder was removed while it was being prepared; run again") from error
    except OSError as error:
        message = f"output '{out}' appeared while it was being prepared ({error.strerror}); choose another folder"
        raise UserError(message) from error


def _remove_leftovers(out: Path, prefix: str) -> None:
    for path in out.parent.iterdir():
        if not path.name.startswith(prefix):
            continue
        try:
            lock = os.open(path, os.O_RDONLY)
        except FileNotFoundError:  # another process has just ended
            continue
        try:
            _lock(lock, out)
            shutil.rmtree(path)
        finally:
            os.close(lock)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
