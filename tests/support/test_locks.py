"""Two runs in one folder: the second is told who has it and changes nothing; a killed owner leaves nothing behind."""

from __future__ import annotations

import errno
import fcntl
import getpass
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from helpers.tiny_runs import child_environment, fit, fit_arguments
from llada_lightning.commands.main import main
from llada_lightning.support import cluster
from llada_lightning.support import locks as lock
from llada_lightning.support.cluster import Launch, shared_answer
from llada_lightning.support.errors import UserError
from llada_lightning.support.locks import LOCK, check_unlocked, run_lock

HOLD = """
import os, sys
from pathlib import Path
from llada_lightning.support.locks import run_lock
with run_lock(Path(sys.argv[1]), None, True):
    if os.fork() == 0:  # as a loader's worker, which outlives its killed parent for some seconds
        sys.stdin.readline()
        os._exit(0)
    print("held", flush=True)
    sys.stdin.readline()
"""


@contextmanager
def held(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the folder, and has a worker."""
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], env=child_environment(), **pipes)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        yield holder
    finally:
        holder.communicate("\n\n")


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {str(p): (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("devices", [(), ("--trainer.devices=2", "--trainer.strategy=ddp")], ids=["one", "two"])
def test_the_second_run_names_the_owner_and_writes_nothing(
    prepared: Path, tmp_path: Path, devices: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "test" / "run"
    with held(folder) as owner:
        before = contents(tmp_path)
        assert main(fit_arguments("arm", prepared, tmp_path, *devices)) == 2
        assert contents(tmp_path) == before
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: run.name: {folder} is in use by process {owner.pid} of {getpass.getuser()} on ")
    assert f" on {socket.gethostname()} since 20" in line
    assert line.endswith("; wait for it or end it, or choose another --run.name")


def test_a_killed_owner_leaves_the_folder_free_at_once(prepared: Path, tmp_path: Path) -> None:
    folder = tmp_path / "test" / "run"
    with held(folder) as owner:
        os.kill(owner.pid, signal.SIGKILL)
        owner.wait()
        assert (folder / LOCK).exists()
        fit("arm", prepared, tmp_path, "--trainer.max_steps=2")
        assert not (folder / LOCK).exists()


def test_who_only_reads_is_not_stopped(prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = fit("arm", prepared, tmp_path, "--trainer.max_steps=2")
    with held(folder):
        assert main(["validate", f"--config={folder / 'config.yaml'}"]) == 0
        assert main(["collect", str(tmp_path), "--out", str(tmp_path / "results.csv")]) == 0
        assert main(["generate", str(folder), "--prompt", "1 plus", "--length", "4", "--device", "cpu"]) == 0
        assert main(fit_arguments("arm", prepared, tmp_path, "--trainer.max_steps=2")) == 0  # it is done


def test_a_launch_is_refused_before_it_writes(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "test" / "run"
    with held(folder):
        assert main(["launch", "--launcher", "true", "--", *fit_arguments("arm", prepared, tmp_path)]) == 2
        assert "is in use by process" in capsys.readouterr().err
        assert not (folder / "launch.yaml").exists()
    check_unlocked(folder)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP])
def test_a_file_system_without_locks_is_warned_of(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuses(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "lockf", refuses)
    with run_lock(tmp_path, None, True):
        pass
    check_unlocked(tmp_path)
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: {tmp_path} lies on a file system without locks")


def test_a_lock_that_its_owner_has_just_removed_is_not_taken_for_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between opening and locking: the owner leaves, and another may make the file anew."""
    original, removed = lock._lock, []

    def removes_once(file: Any, folder: Path) -> None:
        if not removed:
            removed.append(os.fstat(file.fileno()).st_ino)
            (folder / LOCK).unlink()
        original(file, folder)

    monkeypatch.setattr(lock, "_lock", removes_once)
    with run_lock(tmp_path, None, True):
        assert (tmp_path / LOCK).exists()
    assert removed


def test_only_the_first_process_locks(tmp_path: Path) -> None:
    with run_lock(tmp_path / "run", None, False):
        assert not (tmp_path / "run").exists()


class Store(dict[str, bytes]):
    """As torchrun's processes share one."""

    def set(self, key: str, value: str) -> None:
        self[key] = value.encode()


def test_what_the_first_process_is_refused_all_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store()
    monkeypatch.setattr(cluster, "_shared_store", lambda: store)
    ranks = [Launch("torchrun", processes=2, nodes=1, rank=rank, local_rank=rank) for rank in range(2)]
    with held(tmp_path):
        for rank in ranks:
            with pytest.raises(UserError, match="is in use by process"), run_lock(tmp_path, rank, rank.rank == 0):
                pass
    assert shared_answer(ranks[0], "lock", "") == shared_answer(ranks[1], "lock", "own") == ""
