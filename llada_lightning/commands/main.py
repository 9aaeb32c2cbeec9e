"""The command `llada`."""

from __future__ import annotations

import os
import re
import select
import sys
from collections.abc import Callable
from pathlib import Path

from llada_lightning import __version__
from llada_lightning.support.cluster import check_environment, process_rank, says_it
from llada_lightning.support.errors import UserError, refusal
from llada_lightning.support.printing import print_what_the_encoding_holds, shortened, warn
from llada_lightning.support.security import redacted

USAGE = """\
usage: llada COMMAND [options]        (llada COMMAND --help lists a command's options)

How does masked diffusion (LLaDA) scale against autoregression, under the same compute?

  prepare    corpus -> tokenizer -> shards that training streams
  fit        train one model; --budget.flops decides for how long; resumes by itself
  validate   the loss of a checkpoint: exact for arm, the bound for llada
  test       the same under Lightning's other name
  predict    the loss of each validation sequence
  plan       FLOP budgets -> a table of runs, and the sweep that runs them
  replay     what was in one step of a run: its sequences, each with its loss
  launch     resolve a fit once and start it on many processes (srun, torchrun)
  sweep      run a sweep file on this machine, skipping what is done
  collect    run folders, W&B projects -> one table of results
  curves     table of results -> fits and figures
  generate   text from a checkpoint, by any sampler; the process drawn
  chat       a conversation with a checkpoint
  score      log-likelihood of continuations, multiple choice, perplexity of texts
  evaluate   benchmarks of a checkpoint, through lm-evaluation-harness; iGSM, reversal, the paper's Tables 6 to 10
  convert    a checkpoint -> an inference folder of ours, or Hugging Face LLaDA or Llama

  --version  print the version
"""

_BROKEN_PIPE = 128 + 13
"""As a shell says it of a command that SIGPIPE ended."""

MESSAGE_LENGTH = 2000
"""Characters of a message; the middle of a longer one is left out."""

MOVED = {
    "igsm": "llada evaluate CKPT --tasks igsm",
    "reversal": "llada evaluate CKPT --tasks reversal --metadata pairs=FILE.json",
    "ablate": "llada evaluate CKPT --suite ablate-length --tasks TASK",
}
"""Commands of earlier versions, and what to type now."""

LIGHTNING_COMMANDS = ("fit", "validate", "test", "predict")


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code: 0 done, 2 the user's mistake, 1 our fault (a traceback), 130 interrupted,
    141 where nobody reads stdout any more.

    Args:
        argv: the arguments after `llada`; those of the process by default.
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
    """What the console script calls."""
    sys.exit(main())


def _dispatch(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if args else 2
    if args[0] == "--version":
        print(f"llada-lightning {__version__}")
        return 0
    command, *rest = args
    check_environment()
    if command in LIGHTNING_COMMANDS:
        return _lightning(args)
    verbs = _verbs()
    if command in MOVED:
        raise UserError(f"'{command}' is a part of evaluate now; type: {MOVED[command]}; see 'llada evaluate --help'")
    if command not in verbs:
        known = ", ".join([*LIGHTNING_COMMANDS, *verbs])
        raise UserError(f"'{command}' is not a command; choose from {known}")
    return verbs[command](rest)


def _verbs() -> dict[str, Callable[[list[str]], int]]:
    """Commands beside Lightning's; each imports what it needs, so that none waits for torch in vain."""

    def run_folder(args: list[str]) -> Path:
        quiet_libraries()
        from llada_lightning.training.fit import run_folder

        return run_folder(args)

    def launch(args: list[str]) -> int:
        quiet_libraries()
        from llada_lightning.commands.launch import launch_command
        from llada_lightning.training.fit import resolved_run

        return launch_command(args, resolved_run)

    def replay(args: list[str]) -> int:
        quiet_libraries()
        from llada_lightning.commands.replay import replay_command

        return replay_command(args)

    def prepare(args: list[str]) -> int:
        from llada_lightning.commands.prepare import prepare_command

        return prepare_command(args)

    def plan(args: list[str]) -> int:
        from llada_lightning.commands.plan import plan_command
        from llada_lightning.data.manifest import read_data_facts

        return plan_command(args, read_data_facts)

    def sweep(args: list[str]) -> int:
        from llada_lightning.commands.sweep import sweep_command

        return sweep_command(args, run_folder, _lightning)

    def collect(args: list[str]) -> int:
        from llada_lightning.commands.collect import collect_command

        return collect_command(args)

    def curves(args: list[str]) -> int:
        from llada_lightning.commands.curves import curves_command

        return curves_command(args)

    def generate(args: list[str]) -> int:
        from llada_lightning.commands.generate import generate_command

        return generate_command(args)

    def chat(args: list[str]) -> int:
        from llada_lightning.commands.chat import chat_command

        return chat_command(args)

    def convert(args: list[str]) -> int:
        from llada_lightning.commands.convert import convert_command

        return convert_command(args)

    def score(args: list[str]) -> int:
        from llada_lightning.commands.score import score_command

        return score_command(args)

    def evaluate(args: list[str]) -> int:
        from llada_lightning.commands.evaluate import evaluate_command

        return evaluate_command(args)

    return {
        "plan": plan,
        "launch": launch,
        "replay": replay,
        "prepare": prepare,
        "sweep": sweep,
        "collect": collect,
        "curves": curves,
        "generate": generate,
        "chat": chat,
        "score": score,
        "evaluate": evaluate,
        "convert": convert,
    }


def _lightning(args: list[str]) -> int:
    quiet_libraries()
    from llada_lightning.training.fit import LladaCLI

    LladaCLI(args)
    return 0


def quiet_libraries() -> None:
    """Prepare the libraries that a run imports: which process this is, what they print, where they keep files.

    What they tell everyone at every start, and nobody can act upon, is silenced. torch keeps what it compiles in the
    user's cache folder, where later runs find it, instead of in /tmp.
    """
    import logging
    import warnings

    os.environ.setdefault("LITDATA_DISABLE_VERSION_CHECK", "1")
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", os.path.join(cache, "llada-lightning", "compiled"))
    import lightning  # noqa: F401  (sets the levels that follow)
    from lightning.pytorch.utilities.rank_zero import rank_zero_only

    # Lightning believes RANK and its like, whoever has set them.
    rank_zero_only.rank = process_rank()  # type: ignore[attr-defined]
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",
        ".*sync_dist=True.*",
        ".*torch.distributed is disabled, unavailable or uninitialized.*",
        ".*Checkpoint directory .* exists and is not empty.*",
        ".*callbacks used to create the checkpoint need to be provided.*",
        ".*custom batch sampler.*",
        ".*The dirpath has changed.*",
        ".*The given buffer is not writable.*",
        ".*isinstance.treespec, LeafSpec.*",
    ):
        warnings.filterwarnings("ignore", message=message)
