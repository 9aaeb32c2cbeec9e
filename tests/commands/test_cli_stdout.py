"""A stdout that takes no more: closed by its reader, or full."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from llada_lightning.commands import main as cli
from llada_lightning.support.command_line import print_json
from llada_lightning.support.printing import people_console

Captured = pytest.CaptureFixture[str]
PRINTERS: list[Callable[[], object]] = [
    lambda: print("left in the buffer"),
    lambda: print("at once", flush=True),
    lambda: print_json({"long": "x" * 100_000}),
    lambda: people_console().print("a table"),
    lambda: sys.exit(print("help")),  # type: ignore[func-returns-value]
]


@pytest.fixture(params=range(len(PRINTERS)))
def printer(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that prints in one of the ways there are, and ends well."""
    monkeypatch.setattr(cli, "_dispatch", lambda _: 0 if PRINTERS[request.param]() is None else 1)


def test_a_pipe_that_nobody_reads_ends_the_command_quietly(
    printer: None, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stdout:
        monkeypatch.setattr("sys.stdout", stdout)
        assert cli.main([]) == 141
    assert capsys.readouterr().err == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has this device")
def test_a_full_disk_behind_stdout_is_one_line(
    printer: None, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    with open("/dev/full", "w") as stdout:
        monkeypatch.setattr("sys.stdout", stdout)
        assert cli.main([]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and "No space left on device" in err and err.count("\n") == 1


def test_a_broken_pipe_that_is_not_stdout_is_our_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(_: list[str]) -> int:
        raise BrokenPipeError

    monkeypatch.setattr(cli, "_dispatch", breaks)
    reader, writer = os.pipe()
    with os.fdopen(reader), os.fdopen(writer, "w") as stdout:
        monkeypatch.setattr("sys.stdout", stdout)
        with pytest.raises(BrokenPipeError):
            cli.main([])
