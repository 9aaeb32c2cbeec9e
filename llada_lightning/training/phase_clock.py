"""Where a step's time goes: data, transfer, forward, backward, optimizer, callbacks, and Lightning's loop around them.

Lightning tells its profiler what begins and what ends. The clock takes that place for a few steps and notes each change
of phase, so every moment of a step belongs to exactly one phase.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from lightning.pytorch.profilers import Profiler
from torch.profiler import record_function

from llada_lightning.training.profiles import PHASES

VALIDATION = "validation"
"""Between two training steps, and no part of either."""
ANNOTATION = "llada."
"""Begins the name of a phase in the trace."""

_LOOP, _CALLBACKS = "loop", "callbacks"
_PHASE_OF_HOOK = {
    "train_dataloader_next": "data",
    "batch_to_device": "transfer",
    "training_step": "forward",
    "backward": "backward",
    "optimizer_step": "optimizer",
    "optimizer_zero_grad": "optimizer",
    "configure_gradient_clipping": "optimizer",
    "lr_scheduler_step": "optimizer",
}
assert {*_PHASE_OF_HOOK.values(), _LOOP, _CALLBACKS} == set(PHASES)

Mark = Any
"""A moment: seconds of the host's clock, or an event in the GPU's queue."""


def stopwatch(device: torch.device) -> Callable[[], Mark]:
    """What notes a moment on a device without waiting for it.

    A GPU works behind the host. There a moment is an event in its queue, and a phase is the time between two of them:
    what the host does while the GPU is busy costs nothing, and what the GPU waits for costs what it waits.
    """
    if device.type != "cuda":
        return time.perf_counter

    def now() -> Mark:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    return now


def milliseconds(start: Mark, end: Mark) -> float:
    """Between two moments; those of a GPU must be over."""
    return 1e3 * (end - start) if isinstance(start, float) else start.elapsed_time(end)


class PhaseClock(Profiler):
    """Notes the phases of steps, and names them in a trace that is being recorded.

    Args:
        now: notes a moment (:func:`stopwatch`).
    """

    def __init__(self, now: Callable[[], Mark]) -> None:
        super().__init__()
        self._now = now
        self._actions = [("", _LOOP)]
        self._steps: list[list[tuple[str, Mark]]] = []
        self._in_step = False
        self._annotation: Any = None

    def start(self, action_name: str) -> None:
        self._actions.append((action_name, _phase(action_name, self._actions[-1][1])))
        self._note()

    def stop(self, action_name: str) -> None:
        """Lightning also ends what it began before the clock was there."""
        found = [place for place, (name, _) in enumerate(self._actions) if name == action_name]
        if found:
            del self._actions[found[-1]]
        self._note()

    def begin_step(self) -> None:
        self._steps.append([])
        self._in_step = True
        self._note()

    def end_step(self) -> None:
        self._steps[-1].append(("", self._now()))
        self._in_step = False
        self._annotate(None)

    def phases(self) -> list[dict[str, float]]:
        """Milliseconds of each phase in each step; the device must have come to the last one's end."""
        found = []
        for notes in self._steps:
            spent = dict.fromkeys((*PHASES, VALIDATION), 0.0)
            for (phase, start), (_, end) in pairwise(notes):
                spent[phase] += milliseconds(start, end)
            found.append(spent)
        return found

    def _note(self) -> None:
        phase = self._actions[-1][1]
        if self._in_step and (not self._steps[-1] or self._steps[-1][-1][0] != phase):
            self._steps[-1].append((phase, self._now()))
            self._annotate(phase)

    def _annotate(self, phase: str | None) -> None:
        if self._annotation is not None:
            self._annotation.__exit__(None, None, None)
        self._annotation = None if phase is None else record_function(ANNOTATION + phase)
        if self._annotation is not None:
            self._annotation.__enter__()


def _phase(action: str, enclosing: str) -> str:
    """The phase of an action by the name that Lightning gives it, such as `[Strategy]DDPStrategy.backward`."""
    if VALIDATION in (action, enclosing):
        return VALIDATION
    if action.startswith("[Callback]"):
        return _CALLBACKS
    return _PHASE_OF_HOOK.get(action.rpartition(".")[2], enclosing)
