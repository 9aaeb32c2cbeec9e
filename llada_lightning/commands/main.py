"""The command `llada`."""

from __future__ import annotations

import os
import re
import select
import sys
from importlib import import_module

from llada_lightning import __version__
from llada_lightning.commands import FORMER_VERBS, VERBS, usage
from llada_lightning.support.cluster import check_environment, says_it
from llada_lightning.support.errors import UserError, refusal
from llada_lightning.support.printing import print_what_the_encoding_holds, shortened, warn
from llada_lightning.support.security import import_plugins, redacted

_BROKEN_PIPE = 128 + 13
"""As a shell says it of a command that SIGPIPE ended."""

MESSAGE_LENGTH = 2000
"""Characters of a message; the middle of a longer one is left out."""


def main(argv: list[str] | None = None) -> int:
    """Run the command with the arguments after `llada` (by default those of the process).

    Returns:
        0 done, 2 the user's mistake, 1 our fault (a traceback), 130 interrupted, 141 nobody reads stdout any more.
    """
    print_what_the_encoding_holds()
    code = _outcome(sys.argv[1:] if argv is None else list(argv))
    refused = _refused_by_stdout()
    if isinstance(refused, BrokenPipeError):
        return _BROKEN_PIPE
    if refused is not None and code == 0:
        warn(f"error: stdout: {refused.strerror}; free space, or send the output elsewhere")
        return 2
    return code


def _outcome(args: list[str]) -> int:
    """The exit code; every error but our own is said."""
    try:
        return _dispatch(args)
    except UserError as error:
        return _mistake(redacted(_without_traceback(str(error))))
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            return _BROKEN_PIPE
        refused = refusal(error)
        if refused is None:
            raise
        return _mistake(refused)
    except ValueError as error:
        if str(error) != "embedded null byte":
            raise
        return _mistake("a path holds a NUL byte, which no file system allows; correct the path")
    except KeyboardInterrupt:  # before, or after, there is a step to save
        warn("interrupted")
        return 130
    except SystemExit as leave:  # --help, a run that is done, a signal
        if isinstance(leave.__context__, BrokenPipeError):  # rich leaves so
            return _BROKEN_PIPE
        return leave.code if isinstance(leave.code, int) else int(leave.code is not None)


def _without_traceback(message: str) -> str:
    """The message of an error; a loader's worker hands its errors over with a traceback before them."""
    return re.split(r"\n(?:\w+\.)+\w+: ", message)[-1] if message.startswith("Caught ") else message


def _mistake(message: str) -> int:
    """Prints what the user can correct as one line, once for all processes of a run; returns the exit code."""
    line = shortened(message, MESSAGE_LENGTH)
    if says_it(line):
        warn(f"error: {line}")
    return 2


def _refused_by_stdout() -> OSError | None:
    """Why stdout does not take what was printed, if so; it is let go then, or Python would complain at its exit."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return error
    return None


def _nobody_reads() -> bool:
    """Whether stdout is a pipe that its reader has closed: any other broken pipe is our fault."""
    poll = select.poll()
    try:
        poll.register(sys.stdout, 0)
    except (AttributeError, OSError, ValueError, TypeError):  # none, closed, or not of the system
        return False
    return bool(poll.poll(0))


def entry_point() -> None:
    """What the console script calls: the process ends with the command."""
    asked = [verb for verb in VERBS if sys.argv[1:] in ([verb.name, "--help"], [verb.name, "-h"])]
    if asked and asked[0].file == "fit":
        from llada_lightning.support.libraries import prepare_for_help

        prepare_for_help()
    sys.exit(main())


def _dispatch(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help"):
        print(usage(), end="")
        return 0 if args else 2
    if args[0] == "--version":
        print(f"llada-lightning {__version__}")
        return 0
    command, *rest = args
    check_environment()
    import_plugins()
    if command in FORMER_VERBS:
        now = FORMER_VERBS[command]
        raise UserError(f"'{command}' is a part of evaluate now; type: {now}; see 'llada evaluate --help'")
    verb = next((verb for verb in VERBS if verb.name == command), None)
    if verb is None:
        raise UserError(f"'{command}' is not a command; choose from {', '.join(verb.name for verb in VERBS)}")
    module = import_module(f"llada_lightning.commands.{verb.file}")
    code: int = module.main([*verb.first, *rest])
    return code
