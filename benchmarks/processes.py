"""Commands in processes that can be found again: ranks, loader workers and whatever else they start carry a tag.

A tag in the environment is inherited over sessions and stays when a parent dies, which process groups and parents do
not. Linux only: it reads /proc.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from uuid import uuid4

_TAG = "LLADA_BENCHMARK_TAG"
_ROOT = Path(__file__).parents[1]


def child_environment(temporary: Path, trusted: str = "") -> dict[str, str]:
    """As ours without W&B's settings; one thread, because bits depend on their number.

    Args:
        temporary: folder for temporary files, so that what is left behind can be counted.
        trusted: modules, by commas, from which a configuration may take classes.
    """
    temporary.mkdir(parents=True, exist_ok=True)
    ours = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    given = [ours["PYTHONPATH"]] if ours.get("PYTHONPATH") else []
    paths = os.pathsep.join([*(str(_ROOT / folder) for folder in ("", "benchmarks", "tests")), *given])
    settings = {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TMPDIR": str(temporary)}
    return {**ours, **settings, "LLADA_TRUSTED_MODULES": trusted}


@dataclass
class Start:
    """A command that runs: its first process and all that descend from it.

    Attributes:
        began: time.monotonic() at the start.
        began_at: the clock's time at the start, to compare with files' times.
    """

    process: subprocess.Popen[bytes]
    tag: str
    log: Path
    began: float = field(default_factory=time.monotonic)
    began_at: float = field(default_factory=time.time)

    @property
    def ended(self) -> bool:
        return self.process.poll() is not None

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    def members(self) -> dict[int, dict[str, str]]:
        """Process id -> environment of each that lives."""
        found = {}
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit():
                with suppress(OSError):  # it has ended, or is not ours
                    text = (folder / "environ").read_bytes().decode(errors="replace")
                    environment = dict(item.split("=", 1) for item in text.split("\0") if "=" in item)
                    if self.tag in environment.get(_TAG, "").split():
                        found[int(folder.name)] = environment
        return found

    def rank(self, number: int) -> int | None:
        """The process of a rank that Lightning's launcher started; None where it does not live (yet)."""
        if number == 0:
            return None if self.ended else self.process.pid
        ranks = (pid for pid, env in self.members().items() if env.get("LOCAL_RANK") == str(number))
        return next((pid for pid in ranks if parent_of(pid) == self.process.pid), None)

    def kill(self) -> None:
        """SIGKILL to all, until none is left: a process may start another between the look and the kill."""
        while living := self.members():
            for pid in living:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.process.poll()
            time.sleep(0.01)
        self.process.wait()

    def outlived(self, seconds: float) -> bool:
        """Whether a process still lives after this long; an end before is waited for and no longer."""
        deadline = time.monotonic() + seconds
        while self.members():
            if time.monotonic() > deadline:
                return True
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(0.05)
            time.sleep(0.05)
        return False

    def last_line(self) -> str:
        lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        return lines[-1] if lines else ""


def parent_of(pid: int) -> int | None:
    """The parent's process id; None where the process has ended."""
    with suppress(OSError, ValueError):
        # The name, in brackets, may hold anything.
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return None


def start(words: list[str], log: Path, environment: dict[str, str]) -> Start:
    """Start `llada WORDS` with the package beside this folder; its output is appended to ``log``."""
    return launch([sys.executable, "-m", "llada_lightning", *words], f"llada {' '.join(words)}", log, environment)


def launch(command: list[str], shown: str, log: Path, environment: dict[str, str], folder: Path | None = None) -> Start:
    """Start a command, in a folder; its output is appended to ``log``, behind a line that shows the command.

    What a tagged process starts with this function carries both tags, so that either finds it.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    tag = uuid4().hex
    with log.open("ab") as file:
        file.write(f"$ {shown}\n".encode())
        file.flush()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**environment, _TAG: f"{os.environ.get(_TAG, '')} {tag}"},
            start_new_session=True,
            cwd=folder,
        )
    return Start(process, tag, log)


def finish(words: list[str], log: Path, environment: dict[str, str], timeout: float = 600.0) -> Start:
    """:func:`start`, and wait for a good end.

    Raises:
        RuntimeError: it ended badly, or not in time.
    """
    running = start(words, log, environment)
    try:
        code: int | None = running.process.wait(timeout)
    except subprocess.TimeoutExpired:
        code = None
    finally:
        running.kill()
    if code != 0:
        what = f"exit code {code}" if code is not None else f"no end within {timeout:.0f} s"
        raise RuntimeError(f"llada {words[0]}: {what}: {running.last_line()} ({log})")
    return running
