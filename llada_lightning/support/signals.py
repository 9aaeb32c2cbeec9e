"""Stopping a run at the end of a step: the step is saved, and all processes stop together."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from llada_lightning.support.cluster import requeue_together
from llada_lightning.support.printing import warn

SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""A closed terminal, Ctrl-C, the usual request, and SLURM's warning before it takes the nodes away. If several
arrive, the last one in this list counts."""


class LeaveRequest:
    """The signals that asked this process, and by agreement all processes of the run, to stop; None: none so far."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.agreed: signal.Signals | None = None

    def install(self) -> None:
        """Handles the signals here: the handler of Lightning would communicate with other processes within it."""
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                signal.signal(number, self._handle)

    def _handle(self, number: int, frame: Any) -> None:
        if number == signal.SIGINT and self.received == signal.SIGINT:
            raise KeyboardInterrupt
        if self.received is None:
            again = " (again to stop at once)" if number == signal.SIGINT else ""
            say(f"stopping at the end of this step{again}")
        self.received = max(signal.Signals(number), self.received or SIGNALS[0], key=SIGNALS.index)


@contextmanager
def leaving_at_a_steps_end(request: LeaveRequest) -> Iterator[None]:
    """Turns signals into requests to stop; once the run has saved its step, the process exits with 128 + signal.

    SIGUSR1 also asks SLURM to start the job again: a job gets it by `--signal=SIGUSR1@SECONDS`.

    Args:
        request: The request that the signals are recorded in.
    """
    before = {number: signal.getsignal(number) for number in SIGNALS}
    request.install()
    try:
        yield
    except SIGTERMException:
        if request.agreed == signal.SIGUSR1:
            _finish_wandb()
            requeue_together()
        sys.exit(128 + (request.agreed or signal.SIGTERM))
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler)


@rank_zero_only
def say(message: str) -> None:
    """Prints one line on stderr, from the first process only."""
    warn(message)


def _finish_wandb() -> None:
    """Send what W&B still holds: SLURM ends the job's processes soon after it is asked to requeue the job."""
    wandb = sys.modules.get("wandb")
    if wandb is not None and wandb.run is not None:
        with suppress(Exception):  # W&B is never in the way
            wandb.finish(exit_code=1)
