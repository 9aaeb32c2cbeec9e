"""Fits that are killed with -9 and started again until they are done, and then compared with one that was not."""

from __future__ import annotations

import csv
import os
import random
import signal
import subprocess
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from kill_moments import Aim, Pace, look, wait_for
from llada_lightning.checkpoints.sharded_checkpoints import PARTIAL
from processes import Start, finish, start
from run_state import RunState, differences, read_state
from small_fits import BUDGET_STEPS, STEPS, STEPS_OF_TWO, Corpora, budget_words, fit_words, run_folder

PATIENCE_SECONDS = 60.0
"""How long the processes of a run may outlive one of them."""


@dataclass(frozen=True)
class Cell:
    """A configuration of the matrix. Without a strategy it is one process; `budgets`: a trunk with branches;
    `asynchronous`: checkpoints are written beside training, and the best one is kept, too."""

    objective: str
    workers: int = 0
    mixture: bool = False
    accumulation: int = 1
    strategy: str | None = None
    budgets: bool = False
    wandb: bool = False
    asynchronous: bool = False

    @property
    def name(self) -> str:
        ranks = f"2 {self.strategy}" if self.strategy else None
        others = {"trunk": self.budgets, "wandb": self.wandb, "asynchronous": self.asynchronous}
        parts = [self.objective, ranks, *(name for name, chosen in others.items() if chosen)]
        data = f"{'mixture' if self.mixture else 'single'}, {self.workers} workers, accumulation {self.accumulation}"
        return ", ".join([" ".join(filter(None, parts)), data])

    @property
    def slug(self) -> str:
        return self.name.replace(",", "").replace(" ", "-")

    @property
    def undisturbed(self) -> Cell:
        """The cell whose bits are the same: loader workers, W&B and how checkpoints are written change none."""
        return Cell(self.objective, 0, self.mixture, self.accumulation, self.strategy, self.budgets)

    @property
    def steps(self) -> int:
        """Optimizer steps, a trunk's and its branches' together."""
        if self.budgets:
            decays = [steps // 5 for steps in BUDGET_STEPS]  # the schedule's default share
            return BUDGET_STEPS[-1] - decays[-1] + sum(decays)
        return STEPS if self.strategy is None else STEPS_OF_TWO

    def words(self, corpora: Corpora, root: Path) -> list[str]:
        """`fit` and its arguments."""
        extra = [f"--data.workers={self.workers}"]
        if self.strategy is not None:
            extra += ["--trainer.devices=2", f"--trainer.strategy={self.strategy}", f"--trainer.max_steps={self.steps}"]
        if self.budgets:
            extra += budget_words()
        if self.wandb:
            extra += ["--wandb.project=kills", "--wandb.offline=true"]
        if self.asynchronous:
            extra += ["--run.async_checkpoints=true", "--run.keep_best=true"]
        path = corpora.mixture if self.mixture else corpora.first
        return fit_words(self.objective, path, root, *extra, accumulation=self.accumulation)


def cells() -> list[Cell]:
    """Every objective with every number of workers and both kinds of data, accumulation in turns; two processes of both
    strategies; a trunk with branches; checkpoints beside training; W&B."""
    matrix = [
        Cell(objective, workers, mixture, 3 if (workers + mixture) % 2 else 1)
        for objective in ("arm", "llada")
        for workers in (0, 1, 2)
        for mixture in (False, True)
    ]
    pairs = [
        Cell("arm", 0, strategy="ddp"),
        Cell("llada", 1, True, 3, strategy="ddp"),
        Cell("llada", 0, strategy="fsdp2"),
        Cell("arm", 1, True, 3, strategy="fsdp2"),
    ]
    trunks = [Cell("arm", budgets=True), Cell("llada", 1, budgets=True)]
    return [*matrix, *pairs, *trunks, Cell("llada", asynchronous=True), Cell("llada", wandb=True)]


@dataclass
class Kill:
    """One kill: what it aimed at, what it hit, and what was lost (steps to be trained again)."""

    aim: Aim
    target: str
    seconds: float
    hit: str
    lost: int


@dataclass
class CellReport:
    """What became of a cell.

    Attributes:
        runs: finished runs, each killed some times.
        restarts: starts after a kill.
        different: what differed from the undisturbed run, by key (see ``run_state.differences``).
        findings: what else went wrong.
        left: files under temporary names that are still there when all is done.
    """

    name: str
    kills: list[Kill] = field(default_factory=list)
    runs: int = 0
    restarts: int = 0
    different: dict[str, str] = field(default_factory=dict)
    findings: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)

    @property
    def good(self) -> bool:
        return self.runs > 0 and not self.different and not self.findings

    @property
    def mean_lost(self) -> float:
        return sum(kill.lost for kill in self.kills) / max(1, len(self.kills))

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "mean_steps_lost": self.mean_lost, "good": self.good}


class References:
    """Undisturbed runs: each made once, and read once, whoever asks first."""

    def __init__(self, folder: Path, corpora: Corpora, environment: dict[str, str]) -> None:
        self.folder, self.corpora, self.environment = folder, corpora, environment
        self._guard = threading.Lock()
        self._locks: dict[Cell, threading.Lock] = {}
        self._found: dict[Cell, tuple[RunState, Pace]] = {}

    def run_of(self, cell: Cell) -> Path:
        """The folder of a cell's undisturbed run."""
        return run_folder(self.folder / cell.undisturbed.slug)

    def get(self, cell: Cell) -> tuple[RunState, Pace]:
        """The undisturbed run's state, and its pace.

        Raises:
            RuntimeError: it did not end well.
        """
        cell = cell.undisturbed
        with self._guard:
            lock = self._locks.setdefault(cell, threading.Lock())
        with lock:
            if cell not in self._found:
                root = self.folder / cell.slug
                run = finish(cell.words(self.corpora, root), self.folder / f"{cell.slug}.log", self.environment)
                self._found[cell] = read_state(run_folder(root)), pace_of(run_folder(root), run.seconds)
            return self._found[cell]


def temporary_files(folder: Path) -> list[str]:
    """Names of hidden and of half-written files below a folder that is not being written to; W&B's are its own."""
    files = [path for path in folder.rglob("*") if "wandb" not in path.parts and path.name != ".metadata"]
    return sorted(path.name for path in files if path.name.startswith(".") or path.name.endswith(PARTIAL))


def pace_of(folder: Path, seconds: float) -> Pace:
    """A run's pace from its record of seconds, and all that it took."""
    with (folder / "metrics.csv").open(newline="") as file:
        training = float(list(csv.DictReader(file))[-1]["seconds"])
    return Pace(startup=max(0.0, seconds - training), training=training)


class CellKiller:
    """Kills a configuration's run as often as wanted, and compares what it ends with.

    Args:
        cell: the configuration.
        wanted: what the kills are to aim at, in order.
        references: for the undisturbed run.
        folder: for the cell's runs and logs.
        seed: of all choices.
        advance: called after each kill.
    """

    def __init__(
        self, cell: Cell, wanted: list[Aim], references: References, folder: Path, seed: int,
        advance: Callable[[], None],
    ) -> None:  # fmt: skip
        self.cell, self.left, self.references, self.folder, self.advance = (
            cell,
            list(wanted),
            references,
            folder,
            advance,
        )
        self.rng = random.Random(f"{seed} {cell.name}")
        self.report = CellReport(cell.name)

    def run(self) -> CellReport:
        """A run that ends before its next kill is compared, and another one is begun."""
        state, pace = self.references.get(self.cell)
        while not self.report.findings and (self.left or self.report.runs == 0):
            root = self.folder / f"{self.cell.slug}-{self.report.runs}"
            if self._ended_well(root, pace):
                self.report.runs += 1
                self.report.different |= differences(read_state(run_folder(root)), state)
                self.report.left += temporary_files(root)
        return self.report

    def _ended_well(self, root: Path, pace: Pace) -> bool:
        folder, words, log = run_folder(root), self.cell.words(self.references.corpora, root), root.with_suffix(".log")
        while True:
            run = start(words, log, self.references.environment)
            try:
                share_left = 1 - look(folder).saved / self.cell.steps
                if self.left and wait_for(self.left[0], run, folder, pace, share_left, self.rng):
                    self._kill(run, folder)
                    continue
                with suppress(subprocess.TimeoutExpired):
                    run.process.wait(600)
            finally:
                run.kill()
            if run.process.returncode:
                self.report.findings.append(f"exit code {run.process.returncode}: {run.last_line()} ({log})")
            return run.process.returncode == 0

    def _kill(self, run: Start, folder: Path) -> None:
        """Kill all, or of two ranks one; the other must not live on for long."""
        seconds, target = run.seconds, "all"
        if self.cell.strategy is not None and len(self.report.kills) % 2:
            number = self.rng.randrange(2)
            pid = run.rank(number)
            if pid is not None:
                target = f"rank {number}"
                os.kill(pid, signal.SIGKILL)
                if run.outlived(PATIENCE_SECONDS):
                    said = f"{len(run.members())} processes outlived {target} by {PATIENCE_SECONDS:.0f} s"
                    self.report.findings.append(f"{said} (killed {seconds:.1f} s after the start)")
        run.kill()
        sight = look(folder)
        kill = Kill(self.left.pop(0), target, round(seconds, 2), sight.moment(run.began_at), sight.lost)
        self.report.kills.append(kill)
        self.report.restarts += 1
        self.advance()
