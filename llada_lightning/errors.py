"""What the user can mend, told apart from what only we can."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """A mistake that the user can mend: one line that says what is wrong, the value, and the mend.

    The command prints it as ``error: …`` on stderr and leaves with exit code 2, without a traceback.
    """


_OF_THE_DISK = frozenset({
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE,
    errno.EMFILE, errno.ENFILE,
})  # fmt: skip


def refusal(error: OSError) -> str | None:
    """What a disk, or the system, refused, in one line with the mend; None: another error, which is ours."""
    if error.errno not in _OF_THE_DISK:
        return None
    where = f"'{error.filename}': " if error.filename else ""
    return (
        f"{where}{error.strerror}; free space or mend the rights, and give the same command again (finished files are "
        "whole)"
    )


class LibraryPanicError(Exception):
    """A library written in Rust gave up on its input (a panic)."""


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
