"""What torch.profiler's trace tells beside the phases: dearest operations, communication, how busy the device was.

A trace is in Chrome's format: each event has a name, a category (`cpu_op`, `kernel`, …), a start and a duration.
"""

from __future__ import annotations

import gzip
import json
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

_DEVICE = frozenset({"kernel", "gpu_memcpy", "gpu_memset"})
_COMMUNICATION = re.compile(r"nccl|rccl|gloo|c10d|record_param_comms", re.IGNORECASE)


class Event(NamedTuple):
    """What ran from ``start`` to ``end``, in microseconds, on one thread or one of the GPU's queues."""

    name: str
    category: str
    thread: str
    start: float
    end: float


@dataclass(frozen=True)
class Operation:
    """All calls of one operation, or of one kernel; ``milliseconds`` without those of what it calls."""

    name: str
    milliseconds: float
    calls: int


@dataclass(frozen=True)
class TraceFacts:
    """Of a whole trace, in milliseconds.

    Attributes:
        operations: dearest first: kernels where there are any, else the CPU's operations.
        communication: some communication is under way.
        communication_alone: likewise, and nothing is computed meanwhile.
        device_busy: the GPU computes or copies; None where the trace holds no GPU.
    """

    operations: list[Operation]
    communication: float
    communication_alone: float
    device_busy: float | None


def read_trace(path: Path) -> list[Event]:
    """The events of a gzipped trace that have a duration."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        found: list[dict[str, Any]] = json.load(file)["traceEvents"]
    return [
        Event(e["name"], e.get("cat", ""), f"{e['pid']}/{e['tid']}", float(e["ts"]), float(e["ts"]) + float(e["dur"]))
        for e in found
        if e.get("ph") == "X" and "dur" in e
    ]


def trace_facts(events: Iterable[Event], left_out: str = "") -> TraceFacts:
    """Communication goes by the names of nccl, gloo and torch's c10d.

    Args:
        left_out: an annotation; what begins within it does not count.
    """
    events = _without(list(events), left_out)
    on_device = [event for event in events if event.category in _DEVICE]
    work = on_device or [event for event in events if event.category == "cpu_op"]
    # gloo works in threads of its own, and what it does there is an annotation.
    told = work if on_device else [event for event in events if event.category in ("cpu_op", "user_annotation")]
    communicating = [event for event in told if _COMMUNICATION.search(event.name)]
    computing = [event for event in work if not _COMMUNICATION.search(event.name)]
    return TraceFacts(
        operations=_operations(work),
        communication=_covered(communicating) / 1e3,
        communication_alone=(_covered([*communicating, *computing]) - _covered(computing)) / 1e3,
        device_busy=_covered(on_device) / 1e3 if on_device else None,
    )


def _without(events: list[Event], left_out: str) -> list[Event]:
    """A GPU works later than the host asks it to, so each has its own spans of an annotation."""
    spans = {
        on_gpu: [event for event in events if event.name == left_out and event.category == category]
        for on_gpu, category in ((False, "user_annotation"), (True, "gpu_user_annotation"))
    }
    return [
        event
        for event in events
        if not any(span.start <= event.start < span.end for span in spans[event.category in _DEVICE])
    ]


def _covered(events: Iterable[Event]) -> float:
    """Microseconds in which at least one of the events is under way."""
    total, until = 0.0, float("-inf")
    for event in sorted(events, key=lambda event: event.start):
        total += max(0.0, event.end - max(event.start, until))
        until = max(until, event.end)
    return total


def _operations(events: Iterable[Event]) -> list[Operation]:
    threads: dict[str, list[Event]] = defaultdict(list)
    for event in events:
        threads[event.thread].append(event)
    spent: dict[str, float] = defaultdict(float)
    calls: dict[str, int] = defaultdict(int)
    for members in threads.values():
        open_events: list[Event] = []
        for event in sorted(members, key=lambda event: (event.start, -event.end)):
            while open_events and open_events[-1].end <= event.start:
                open_events.pop()
            if open_events:  # the caller's own time is without it
                spent[open_events[-1].name] -= event.end - event.start
            spent[event.name] += event.end - event.start
            calls[event.name] += 1
            open_events.append(event)
    found = [Operation(name, microseconds / 1e3, calls[name]) for name, microseconds in spent.items()]
    return sorted(found, key=lambda operation: -operation.milliseconds)
