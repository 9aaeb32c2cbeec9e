"""A process for the input of strangers: answers, errors, limits, and how it ends."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from llada_lightning.support.limited_process import CallError, LimitedProcess, ProcessEndedError

CALLS = """
import os, signal

def raise_it():
    raise KeyError("no such\\nkey")

def spin():
    while True:
        pass

def end(number):
    os.kill(os.getpid(), number)

CALLS = {"add": lambda a, b: a + b, "raise": raise_it, "spin": spin, "end": end, "fill": lambda size: len("a" * size)}
"""
LIMITS = (5.0, 1 << 30)


@pytest.fixture
def process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LimitedProcess:
    (tmp_path / "calls_of_a_test.py").write_text(CALLS)
    monkeypatch.syspath_prepend(tmp_path)
    return LimitedProcess("calls_of_a_test")


def test_one_process_answers_and_reports_errors(process: LimitedProcess) -> None:
    assert process.call("add", [1, 2], *LIMITS) == 3
    first = process._process
    with pytest.raises(CallError, match=r"no such.*key"):
        process.call("raise", [], *LIMITS)
    with pytest.raises(CallError):
        process.call("fill", [1 << 34], *LIMITS)
    assert process.call("add", ["a", "b"], *LIMITS) == "ab"
    assert process._process is first


def test_at_its_limits_it_ends_and_the_next_call_starts_another(process: LimitedProcess) -> None:
    with pytest.raises(ProcessEndedError) as caught:
        process.call("spin", [], 0.2, 1 << 30)
    assert caught.value.over_time and not caught.value.over_memory
    with pytest.raises(ProcessEndedError, match=r"exit code -9") as caught:
        process.call("end", [int(signal.SIGKILL)], *LIMITS)
    assert caught.value.over_memory and not caught.value.over_time
    assert process.call("add", [1, 1], *LIMITS) == 2
