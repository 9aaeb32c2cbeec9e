"""Leaving a run in good order: at a step's end, with the step saved."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch.utilities.exceptions import SIGTERMException


@contextmanager
def stopping_at_a_steps_end() -> Iterator[None]:
    """Ctrl-C and a closed terminal act as SIGTERM does: the step ends, is saved, and the run leaves (130, 129).

    A second Ctrl-C stops at once. Lightning hands SIGTERM to all ranks and checks for it at each step's end.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []

    def ask_to_leave(number: int, frame: Any) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)
        print("stopping at the end of this step (again to stop at once)", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGTERM)

    before = {number: signal.signal(number, ask_to_leave) for number in (signal.SIGINT, signal.SIGHUP)}
    try:
        yield
    except SIGTERMException:
        sys.exit(128 + (received[0] if received else signal.SIGTERM))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
