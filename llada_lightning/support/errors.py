"""Errors that the user can fix, as opposed to errors of this package."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """A mistake that the user can fix: one line with what is wrong, the value, and how to fix it.

    The command prints it as ``error: …`` on stderr and exits with code 2, without a traceback.
    """


class LibraryPanicError(Exception):
    """A panic of a library written in Rust."""


@contextmanager
def panics_as_exceptions() -> Iterator[None]:
    """Turns a panic of a library written in Rust into an Exception, for the handlers around the call.

    PyO3 raises a panic as a ``PanicException``, which derives from BaseException, and of which each library has a class
    of its own that cannot be imported.

    Raises:
        LibraryPanicError: The library panicked.
    """
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise LibraryPanicError(" ".join(str(error).split())) from error
