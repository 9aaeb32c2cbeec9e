"""The one exception for a user's mistake."""


class UserError(Exception):
    """A mistake that the user can mend: one line that says what is wrong, the value, and the mend.

    The command prints it as ``error: …`` on stderr and leaves with exit code 2, without a traceback.
    """
