"""Runs the points of a sweep as processes of this machine: some at once, finished ones skipped, safe to stop.

The sweep keeps no state of its own. A run is done when its folder's ``result.json`` says so, and an unfinished one
resumes from its own checkpoint; so the same command, given again, does what is left.
"""

from __future__ import annotations

import csv
import fcntl
import os
import re
import shlex
import signal
import stat
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Column, Table
from rich.text import Text

from llada_lightning.records import METRICS_FILE, RESULT_FILE, expected_records, has_diverged, is_done, read_records
from llada_lightning.study.sweep import PlannedRun, RunFolder, Sweep, check_unchanged, launch_fit, plan_runs
from llada_lightning.support.errors import UserError
from llada_lightning.support.forks import ForkedProcess
from llada_lightning.support.printing import people_console, visible
from llada_lightning.support.threads import shared_among

Fork = Callable[[list[str], Mapping[str, str], int], ForkedProcess]

_POLL_SECONDS = 0.1
TOLD_SECONDS, _TOLD_SHARE = 30.0, 0.05
"""Off a terminal the progress is told after so many seconds, and after such a share of the time so far."""

_BLOCK_BYTES = 4096
_CONTROL_SEQUENCE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@dataclass(frozen=True)
class FailedRun:
    """A run that failed: its name, why, and the path of its log."""

    name: str
    reason: str
    log: str


@dataclass
class SweepOutcome:
    """What became of a sweep's runs, by name."""

    done: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    """Runs that had finished before."""
    diverged: list[str] = field(default_factory=list)
    """Runs, of those done or skipped, whose loss is not a number: results, and bad ones."""
    failed: list[FailedRun] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    """Runs not started, or stopped half-way, because the sweep was interrupted."""
    interrupted: bool = False

    @property
    def exit_code(self) -> int:
        """0: every run is done; 1: some failed; 130: interrupted."""
        if self.interrupted:
            return 130
        return 1 if self.failed else 0


def run_sweep(
    sweep: Sweep,
    run_folder: RunFolder,
    *,
    jobs: int = 1,
    extra: Sequence[str] = (),
    edited: bool = False,
    launch: Callable[[list[str]], list[str]] = launch_fit,
    fork: Fork | None = None,
    console: Console | None = None,
    grace_seconds: float = 30.0,
) -> SweepOutcome:
    """Runs what is left of a sweep, ``jobs`` runs at once, and continues after a failed run.

    Ctrl-C, SIGTERM and SIGHUP ask the running fits to save and leave, and kill what is left of their process groups
    after ``grace_seconds``, or at once at a second signal. Each run's output is appended to
    ``<study>/logs/<name>.log``. The runs share the processor's cores, unless the user has set the number of threads
    (``support.threads``).

    Args:
        extra: The arguments that are appended to those of every run.
        edited: Whether a change of the file since the study was begun is meant.
        launch: A function from ``fit`` and its arguments to the command that is run.
        fork: A function that starts such a run without a command (``ForkServer.start``), from its arguments, its
            environment, and the file descriptor of its log; by default each run is a process of its own command.
        console: The console of the progress; by default stderr.

    Raises:
        UserError: ``jobs`` is below 1, a run's arguments are refused, or the file was edited (before anything is run).
    """
    if jobs < 1:
        raise UserError(f"sweep: --jobs is {jobs}; it must be at least 1")
    console = console or people_console(stderr=True)
    runs = plan_runs(sweep, run_folder, extra)
    if len(runs) < len(sweep.points):
        console.print(f"{len(sweep.points)} points describe {len(runs)} different runs; each is run once")
    for study in dict.fromkeys(run.folder.parent for run in runs):
        if added := check_unchanged(sweep, study, edited=edited):
            console.print(f"{added} runs are new in the file since the study was begun")
    runner = _Runner(runs, jobs, launch, fork, console)
    try:
        with _signals_interrupt(), runner.display():
            runner.run()
    except KeyboardInterrupt:
        runner.outcome.interrupted = True
        console.print("stopping: running fits save their checkpoints (again to kill them) …")
    finally:
        with _signals_interrupt():
            runner.stop(grace_seconds)
    return runner.outcome


# --- running ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Job:
    run: PlannedRun
    process: subprocess.Popen[bytes] | ForkedProcess
    started: float

    def kill_group(self) -> None:
        """Ends what the run has left behind, such as workers of its loader."""
        if isinstance(self.process, ForkedProcess):
            self.process.kill_group()
            return
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)


class _Runner:
    def __init__(
        self,
        runs: list[PlannedRun],
        jobs: int,
        launch: Callable[[list[str]], list[str]],
        fork: Fork | None,
        console: Console,
    ) -> None:
        self.outcome = SweepOutcome(
            skipped=[run.name for run in runs if is_done(run.folder)],
            diverged=[run.name for run in runs if has_diverged(run.folder)],
        )
        self.waiting = deque(run for run in runs if not is_done(run.folder))
        self.running: list[_Job] = []
        self.total, self.cost = len(runs), sum(run.cost for run in self.waiting)
        self.jobs, self.launch, self.fork, self.console = jobs, launch, fork, console
        self.environment = {"PYTHONUNBUFFERED": "1", **shared_among(jobs)}
        self.cost_done = 0.0
        self.started = self.told = time.monotonic()

    def run(self) -> None:
        if self.outcome.skipped:
            self.console.print(f"{len(self.outcome.skipped)} of {self.total} runs were done before")
        while self.waiting or self.running:
            while len(self.running) < self.jobs and (run := self._next()) is not None:
                self.waiting.remove(run)
                self._start(run)
            self._tell()
            for job in self._ended():
                self.running.remove(job)
                self._settle(job)

    def _next(self) -> PlannedRun | None:
        """The first waiting run that need not wait for the end of the run whose trunk it continues."""
        busy = {job.run.trunk for job in self.running}
        return next((run for run in self.waiting if not (run.continues and run.trunk in busy)), None)

    def _start(self, run: PlannedRun) -> None:
        run.log.parent.mkdir(parents=True, exist_ok=True)
        with run.log.open("ab") as log:
            try:
                # The run inherits the lock with its output: it lasts as long as the run, even if this sweep is killed.
                fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._fail(run, "another process is running it")
                return
            command = self.launch(run.arguments)
            log.write(f"$ {shlex.join(command)}\n".encode())
            log.flush()
            self.running.append(_Job(run, self._process(run, command, log), time.monotonic()))
        self.console.print(f"started  {run.name}, log: {run.log}", style="dim", highlight=False, soft_wrap=True)

    def _process(self, run: PlannedRun, command: list[str], log: BinaryIO) -> subprocess.Popen[bytes] | ForkedProcess:
        if self.fork is not None:
            return self.fork(run.arguments, self.environment, log.fileno())
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=self.environment,
            start_new_session=True,
        )

    def _ended(self) -> list[_Job]:
        if self.running:
            with suppress(subprocess.TimeoutExpired):
                self.running[0].process.wait(_POLL_SECONDS)
        return [job for job in self.running if job.process.poll() is not None]

    def _settle(self, job: _Job) -> None:
        self.cost_done += job.run.cost
        code = job.process.returncode
        assert code is not None
        if code == 0 and is_done(job.run.folder):
            self.outcome.done.append(job.run.name)
            elapsed = format_seconds(time.monotonic() - job.started)
            word, style = "done     ", "green"
            if has_diverged(job.run.folder):
                self.outcome.diverged.append(job.run.name)
                word, style = "diverged ", "yellow"
            self._say(word, style, f"{job.run.name}  {elapsed}")
            return
        job.kill_group()
        self._fail(job.run, _reason(job.run.folder, code, last_line(job.run.log)))

    def _fail(self, run: PlannedRun, reason: str) -> None:
        self.outcome.failed.append(FailedRun(run.name, reason, str(run.log)))
        self._say("failed  ", "red", f"{run.name}: {reason}")

    def _say(self, word: str, style: str, rest: str) -> None:
        self.console.print(Text.assemble((word, style), visible(rest)))

    def stop(self, grace_seconds: float) -> None:
        """Asks the running fits to leave, and ends them if they do not in time or at a second signal."""
        deadline = time.monotonic() + grace_seconds
        try:
            for job in self.running:
                job.process.terminate()  # the fit alone: without its workers it could not end its step
            for job in self.running:
                job.process.wait(max(0.0, deadline - time.monotonic()))
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            pass
        finally:
            for job in self.running:
                job.kill_group()
                job.process.wait()
            left = [job.run for job in self.running if not is_done(job.run.folder)] + list(self.waiting)
            self.outcome.left = [run.name for run in left]
            self.running.clear()

    # --- progress ---

    @contextmanager
    def display(self) -> Iterator[None]:
        """The study's progress, drawn while the block runs, on a terminal only."""
        if not self.console.is_terminal:
            yield
            return
        with Live(get_renderable=self._picture, console=self.console, refresh_per_second=2, transient=True):
            yield

    def _tell(self) -> None:
        """The progress as lines where it is not drawn, the less often the longer the sweep takes."""
        now = time.monotonic()
        if self.console.is_terminal or now - self.told < max(TOLD_SECONDS, _TOLD_SHARE * (now - self.started)):
            return
        self.told = now
        rows, spent = self._states()
        for row in rows:
            self.console.print(Text("  ".join(row), "dim"), soft_wrap=True)
        counts, times = self._counts(spent)
        self.console.print(counts, *times, sep="  ", highlight=False, soft_wrap=True)

    def _picture(self) -> Group:
        jobs = Table.grid("", "", Column(style="dim"), "", padding=(0, 2))
        rows, spent = self._states()
        for row in rows:
            jobs.add_row(*row)
        counts, times = self._counts(spent)
        study = Table.grid(padding=(0, 2))
        study.add_row(counts, ProgressBar(total=self.cost, completed=spent, width=30), *times)
        return Group(jobs, study)

    def _states(self) -> tuple[list[tuple[str, str, str, str]], float]:
        """A row for each running fit, and the cost that has been spent by all."""
        rows, spent = [], self.cost_done
        for job in list(self.running):
            share = budget_share(job.run)
            spent += share * job.run.cost
            state = describe_state(share, latest_metrics(job.run.folder))
            rows.append(("running", job.run.name, state, format_seconds(time.monotonic() - job.started)))
        return rows, spent

    def _counts(self, spent: float) -> tuple[Text, tuple[str, str]]:
        """How many runs are settled; the time that has passed, and that is left."""
        elapsed, failed = time.monotonic() - self.started, len(self.outcome.failed)
        settled = len(self.outcome.done) + len(self.outcome.skipped)
        counts = Text.assemble(
            (f"{settled}/{self.total} runs", "bold"), (f", {failed} failed" if failed else "", "red")
        )
        left = f"about {format_seconds(elapsed * (self.cost / spent - 1))} left" if spent else ""
        return counts, (f"{format_seconds(elapsed)} elapsed", left)


@contextmanager
def _signals_interrupt() -> Iterator[None]:
    """SIGTERM and SIGHUP raise KeyboardInterrupt within the block, as Ctrl-C does (in the main thread only)."""

    def interrupt(_number: int, _frame: Any) -> None:
        raise KeyboardInterrupt

    signals = (signal.SIGTERM, signal.SIGHUP) if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.signal(number, interrupt) for number in signals}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _reason(folder: Path, code: int, line: str) -> str:
    if code == 0:
        with suppress(UserError):
            records, budgets = read_records(folder), expected_records(folder)
            if records and len(records) < budgets:
                return f"ended with {len(records)} of {budgets} results"
            states = {str(record.get("status")) for record in records}
            return f"ended with status {', '.join(sorted(states))}" if states else f"ended without a {RESULT_FILE}"
    what = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
    if code == -signal.SIGKILL:
        what += ", as the system does where memory runs out; then give fewer --jobs"
    return f"{line} ({what})" if line else what


# --- what a running fit shows ----------------------------------------------------------------------------------------


def last_line(path: Path) -> str:
    """The last line of a log that says anything, without colours."""
    lines = _CONTROL_SEQUENCE.sub("", _block(path, at_end=True)).replace("\r", "\n").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def latest_metrics(folder: Path) -> dict[str, str]:
    """The newest row of a run's ``metrics.csv``, or of its branches', without its empty cells; nothing before one."""
    written = [path for path in _metrics_files(folder) if path.exists()]
    return _metrics_row(max(written, key=lambda path: path.stat().st_mtime)) if written else {}


def budget_share(run: PlannedRun) -> float:
    """The share of its cost that a running fit has spent, trunk and branches together; 0 where it cannot be known."""
    column, spent = "flops_6nd" if run.convention == "6nd" else "flops_total", 0.0
    with suppress(KeyError, ValueError, OSError):
        for path in _metrics_files(run.folder):
            spent += float(_metrics_row(path).get(column, 0.0))
            if path.parent != run.folder and spent:  # a branch's count begins with its trunk's
                spent -= float(_metrics_row(path, first=True)[column])
    return min(1.0, spent / run.cost) if run.cost > 1 else 0.0


def _metrics_files(folder: Path) -> list[Path]:
    return [folder / METRICS_FILE, *sorted(folder.glob(f"branches/*/{METRICS_FILE}"))]


def _metrics_row(path: Path, *, first: bool = False) -> dict[str, str]:
    """The last row, or the first: its cells that hold something; none of a row that is being written."""
    header, rows = _rows(_block(path))[:1], _rows(_block(path, at_end=not first))
    if not header or len(rows) < 2:  # no row yet
        return {}
    cells = rows[1] if first else rows[-1]
    if len(cells) != len(header[0]):
        return {}
    return {name: value for name, value in zip(header[0], cells, strict=True) if value}


def _rows(text: str) -> list[list[str]]:
    with suppress(csv.Error):
        return [row for row in csv.reader(text.splitlines()) if row]
    return []


def _block(path: Path, *, at_end: bool = False) -> str:
    """The first or the last 4096 bytes of a file; nothing of what is no regular file or cannot be read."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:  # a pipe must not hang
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                return ""
            file.seek(max(0, status.st_size - _BLOCK_BYTES) if at_end else 0)
            return file.read(_BLOCK_BYTES).decode("utf-8", errors="replace")
    except OSError:
        return ""


def describe_state(share: float, metrics: dict[str, str]) -> str:
    """A running fit in words: ``62%  step 1200  3.214 nats/token  7,400 tokens/s``."""
    if not metrics:
        return "starting"
    words = [f"{share:.0%}"] if share else []
    words.append(f"step {metrics.get('step', '?')}")
    with suppress(KeyError, ValueError):
        words.append(f"{float(metrics['train_nats_per_token']):.3f} nats/token")
    with suppress(KeyError, ValueError):
        words.append(f"surrogate loss {float(metrics['train_surrogate']):.3f}")
    with suppress(KeyError, ValueError):
        words.append(f"{float(metrics['tokens_per_second']):,.0f} tokens/s")
    return "  ".join(words)


def format_seconds(seconds: float) -> str:
    """58s, 3m 20s, 5h 07m."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    return f"{whole // 3600}h {whole % 3600 // 60:02d}m"
