"""Errors that the user can fix, as opposed to errors of this package."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from llada_lightning.support.printing import shortened


class UserError(Exception):
    """A mistake that the user can fix: one line with what is wrong, the value, and how to fix it.

    The command prints it as ``error: …`` on stderr and exits with code 2, without a traceback.
    """


_DISK = "free space or correct the rights, and give the same command again (finished files are whole)"
_PATH = "check the path"
_REMEDIES = {
    **dict.fromkeys((
        errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE,
    ), _DISK),
    **dict.fromkeys((errno.ELOOP, errno.EISDIR, errno.ENOTDIR), _PATH),
    errno.ENAMETOOLONG: "choose a shorter name",
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "raise the limit of open files (ulimit -n), or use fewer workers"),
    **dict.fromkeys((errno.ENOMEM, errno.EAGAIN), "free memory, raise the limit of processes (ulimit -u), or use fewer "
                    "workers"),
}  # fmt: skip
"""How a user can fix an error of the system, by its number."""


def refusal(error: OSError) -> str | None:
    """Returns one line about an error of the disk or the system, with how to fix it; None: another error."""
    remedy = _REMEDIES.get(error.errno or 0)
    if remedy is None:
        return None
    where = f"'{shortened(error.filename)}': " if error.filename else ""
    return f"{where}{error.strerror}; {remedy}"


class LibraryPanicError(Exception):
    """A panic of a library written in Rust."""


@contextmanager
def panics_as_exceptions() -> Iterator[None]:
    """Turns a panic of a library written in Rust into an Exception, for the handlers around the call.

    PyO3 raises a panic as a ``PanicException``, which derives from BaseException, and of which each library has a class
    of its own that cannot be imported.

    Raises:
        LibraryPanicError: the library panicked.
    """
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise LibraryPanicError(" ".join(str(error).split())) from error
