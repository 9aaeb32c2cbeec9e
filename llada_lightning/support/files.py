"""Files and folders that appear whole or not at all, and strict JSON.

They are written under a temporary name beside their place, and then renamed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from llada_lightning.support.errors import UserError
from llada_lightning.support.printing import shortened

_BLOCK_BYTES = 1 << 20

_STEM_BYTES, _SUFFIX_BYTES = 200, 20
"""The largest numbers of bytes of a file's stem and suffix in its temporary name, which must stay below 255."""


@contextmanager
def written_atomically(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside ``path``, and renames it when the block ends without an error.

    A link stays a link: the file that it leads to is replaced. The temporary file is locked while it is written, and
    the system drops the lock with its process. So the next call that writes the same file removes what a killed
    process left, but not what another process is writing.

    Args:
        path: The path of the file.

    Raises:
        UserError: As :func:`require_replaceable`.
    """
    require_replaceable(path)
    target = Path(os.path.realpath(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    stem = os.fsencode(path.stem)[:_STEM_BYTES].decode(errors="ignore")
    suffix = path.suffix if len(os.fsencode(path.suffix)) <= _SUFFIX_BYTES else ""  # writers go by the given suffix
    _remove_leftovers(target.parent, stem, suffix)
    temporary, lock = _locked_file(target.parent, stem, suffix)
    try:
        yield temporary
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
        os.close(lock)


def _locked_file(folder: Path, stem: str, suffix: str) -> tuple[Path, int]:
    """A new, empty, hidden file and the open descriptor that holds its lock."""
    while True:
        path = folder / f".{stem}.{uuid4().hex}{suffix}"
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        with suppress(OSError):  # a file system without locks: then nobody can lock it to remove it, either
            fcntl.flock(lock, fcntl.LOCK_EX)
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock), path.lstat()):
                return path, lock
        os.close(lock)  # another process removed it before it was locked


def _remove_leftovers(folder: Path, stem: str, suffix: str) -> None:
    name = re.compile(rf"\.{re.escape(stem)}\.[0-9a-f]{{32}}{re.escape(suffix)}")
    with suppress(OSError):  # a folder whose names may not be read
        for path in [Path(entry) for entry in os.scandir(folder) if name.fullmatch(entry.name)]:
            with suppress(OSError):  # locked by its living writer, renamed meanwhile, or of another user
                lock = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    path.unlink()
                finally:
                    os.close(lock)


def expanded(path: str | os.PathLike[str]) -> Path:
    """Returns the path with a leading ``~`` or ``~user`` replaced by that home folder.

    The ``~`` stays where there is no such user, so that the path is reported as missing; ``Path.expanduser`` raises a
    RuntimeError there.
    """
    return Path(os.path.expanduser(path))


def local_path(folder: str | os.PathLike[str]) -> str | None:
    """Returns a data folder's path on this machine, without ``local:`` or ``file://``; None: the folder is remote."""
    text = os.fspath(folder)
    for prefix in ("local:", "file://"):
        if text.startswith(prefix):
            return text[len(prefix) :]
    return None if "://" in text else os.path.expanduser(text)


def require_replaceable(path: Path) -> None:
    """Refuses a path that a rename would destroy: a device, a pipe, a folder, a link that leads back to itself.

    Args:
        path: The path of the file that is to be replaced.

    Raises:
        UserError: The path exists and is not a regular file, or no file can have this name.
    """
    try:
        is_loop = Path(os.path.realpath(path)).is_symlink()
        replaceable = not is_loop and (path.is_file() or not path.exists())
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno != errno.ENAMETOOLONG:
            raise
        raise UserError(f"'{shortened(path)}' cannot name a file ({_reason(error)}); choose another name") from error
    if not replaceable:
        raise UserError(f"'{path}' is no regular file, so it cannot be replaced; choose another file")


def is_there(path: Path) -> bool:
    """Returns whether anything has this name, even a link that leads nowhere.

    Args:
        path: The path.

    Raises:
        UserError: The path cannot be read, or nothing can have this name.
    """
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as error:
        raise UserError(f"'{shortened(path)}' cannot be read: {_reason(error)}; check the path") from error
    return True


def _reason(error: OSError | ValueError) -> str:
    """Why a path was refused; a ValueError is that of a NUL byte in it."""
    return str(getattr(error, "strerror", None) or error)


def file_sha256(path: str | os.PathLike[str]) -> str:
    """Returns the SHA-256 of a file in hexadecimal, read in blocks; OSError where it cannot be read."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def json_sha256(value: Any) -> str:
    """Returns the SHA-256 of a value as JSON that is equal for equal values: keys sorted, no white space, ASCII."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def strict_json(value: Any) -> Any:
    """Returns a value with None for every non-finite number, because JSON has no NaN; tuples become lists."""
    if isinstance(value, dict):
        return {key: strict_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def json_bytes(value: Any) -> bytes:
    """``value`` as indented JSON, as the files of a tokenizer have it: read and written again it has the same bytes."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def write_json(path: Path, value: Any) -> None:
    """Writes ``value`` as indented, strict JSON, atomically."""
    with written_atomically(path) as temporary:
        temporary.write_text(json.dumps(strict_json(value), indent=2, allow_nan=False) + "\n", encoding="utf-8")


@contextlib.contextmanager
def building(out: Path) -> Iterator[Path]:
    """Yields a temporary folder beside ``out``, which is renamed to ``out`` when the block ends without an error.

    A block that raises leaves nothing. What a killed process left is removed by the next one that builds the same
    folder: a lock, which the system drops with its process, distinguishes it from what is being written.

    Args:
        out: The path of the folder.

    Raises:
        UserError: ``out`` cannot be written, is removed meanwhile, or another process is building it.
    """
    prefix = f".{out.name}.partial-"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _remove_unfinished_folders(out, prefix)
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


def _remove_unfinished_folders(out: Path, prefix: str) -> None:
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
