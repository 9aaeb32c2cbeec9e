"""A forked process is as one of its own: session, environment, argv, log, lock and exit code; it is a clean copy."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import tempfile
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest

from helpers import forked_calls
from helpers.forked import server
from helpers.tiny_runs import TESTS, child_environment
from llada_lightning.support.forks import Call, ForkedProcess, can_fork

pytestmark = pytest.mark.skipif(not can_fork(), reason="processes are forked on Linux only")


def start(call: Call, log: Path, *arguments: str, **environment: str) -> ForkedProcess:
    with log.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return server().start(call, list(arguments), {"PATH": os.defpath, **environment}, file.fileno())


def test_a_forked_process_is_one_of_its_own(tmp_path: Path) -> None:
    process = start(forked_calls.describe, tmp_path / "log", "fit", "--lr=1", HELLO="world")
    assert process.wait(120) == process.poll() == 7
    found: dict[str, Any] = json.loads((tmp_path / "log").read_text())
    assert found["arguments"] == found["argv"] == ["fit", "--lr=1"]
    assert found["main"] == "llada_lightning.__main__"  # what Lightning starts for a second device
    assert found["environment"]["HELLO"] == "world"
    assert "HOME" not in found["environment"]
    assert found["leads_a_session"]
    assert found["signals"] == []


def test_the_server_has_imported_torch_and_started_no_thread_and_no_gpu(tmp_path: Path) -> None:
    start(forked_calls.describe, tmp_path / "log").wait(120)
    found = json.loads((tmp_path / "log").read_text())
    assert (found["torch"], found["cuda"], found["threads"]) == (True, False, 1)


def test_its_temporary_folders_go_with_it(tmp_path: Path) -> None:
    assert start(forked_calls.leave_a_folder, tmp_path / "log").wait(120) == 0
    assert not Path((tmp_path / "log").read_text().strip()).exists()


def test_an_exception_is_in_its_log_and_a_signal_in_its_exit_code(tmp_path: Path) -> None:
    assert start(forked_calls.fail, tmp_path / "failed").wait(120) == 1
    assert "RuntimeError: of the call" in (tmp_path / "failed").read_text()
    process = start(forked_calls.wait, tmp_path / "killed")
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0)
    assert process.poll() is None
    assert forked_calls.locked(str(tmp_path / "killed"))
    process.terminate()
    assert process.wait(120) == process.returncode == -signal.SIGTERM
    process.terminate()  # of one that has ended: nothing
    assert not forked_calls.locked(str(tmp_path / "killed"))


def test_the_end_of_the_server_is_the_end_of_its_processes_for_us_and_the_next_one_has_a_new_server(
    tmp_path: Path,
) -> None:
    process = start(forked_calls.wait, tmp_path / "orphan")
    os.kill(forkserver._forkserver._forkserver_pid, signal.SIGKILL)
    try:
        assert process.wait(120) == 255
    finally:
        process.kill_group()  # as the runner of a sweep does with a run that failed
    while forked_calls.locked(str(tmp_path / "orphan")):
        pass
    assert start(forked_calls.describe, tmp_path / "next").wait(120) == 7


def test_where_the_servers_socket_would_have_too_long_a_path_nothing_is_forked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/tmp")
    assert can_fork()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / ("long" * 20)))
    assert not can_fork()


WITHOUT_A_GPU = """
import torch

def refused(*arguments, **named):
    raise AssertionError("a GPU was asked for")

for name in ("is_available", "device_count", "init", "_lazy_init", "current_device", "get_device_properties"):
    setattr(torch.cuda, name, refused)
import llada_lightning.training.preloaded
"""


def test_no_import_of_the_server_asks_for_a_gpu() -> None:
    """The driver, once asked how many there are, does not work in a forked process."""
    command = [sys.executable, "-c", WITHOUT_A_GPU]
    ended = subprocess.run(command, env=child_environment(), capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr


SERVER_OF_ITS_OWN = """
import sys
from llada_lightning.support.errors import UserError
from llada_lightning.support.forks import ForkServer
from helpers import forked_calls
if __name__ == "__main__":
    try:
        ForkServer(["helpers.poisoned"]).start(forked_calls.fail, [], {}, 2)
    except UserError as error:
        sys.exit(f"refused: {error}")
"""


def test_a_server_that_dies_while_it_imports_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "helpers").mkdir()
    (tmp_path / "helpers" / "__init__.py").write_text(f"__path__.append({str(TESTS / 'helpers')!r})\n")
    (tmp_path / "helpers" / "poisoned.py").write_text("raise SystemExit('no library')\n")
    environment = child_environment()
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), environment["PYTHONPATH"]])
    (tmp_path / "script.py").write_text(SERVER_OF_ITS_OWN)
    command = [sys.executable, str(tmp_path / "script.py")]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 1
    *_, last = ended.stderr.strip().splitlines()
    assert last.startswith("refused: the process that runs are forked from has ended"), ended.stderr
    assert "--fork false" in last
    assert "no library" in ended.stderr
