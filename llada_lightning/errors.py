"""What the user can mend, told apart from what only we can."""

from __future__ import annotations

import errno

from llada_lightning.printing import shortened


class UserError(Exception):
    """A mistake that the user can mend: one line that says what is wrong, the value, and the mend.

    The command prints it as ``error: …`` on stderr and leaves with exit code 2, without a traceback.
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
"""What a user can do about an error of the system."""


def refusal(error: OSError) -> str | None:
    """What a disk, or the system, refused, in one line with the remedy; None: another error, which is ours."""
    remedy = _REMEDIES.get(error.errno or 0)
    if remedy is None:
        return None
    where = f"'{shortened(error.filename)}': " if error.filename else ""
    return f"{where}{error.strerror}; {remedy}"
