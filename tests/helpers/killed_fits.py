"""Fits and commands in processes of their own that are killed at a chosen or at any moment."""

from __future__ import annotations

import csv
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from helpers.run_state import RunState, phases
from llada_lightning.checkpoints.run_folder import PARTIAL
from llada_lightning.records import VALIDATION_FILE
from processes import Start
from small_fits import BUDGET_STEPS, STEPS, STEPS_OF_TWO, VALIDATION_STEPS, Corpora, budget_words, fit_words

AIMS = ("life", "save", "training", "validation", "result")
"""`life`: any moment of a run's life, start-up included; `training`: after the first step of this start; the others
while a checkpoint, a validation or the result is being made."""
PATIENCE_SECONDS = 60.0
"""How long the processes of a run may outlive one of them."""


@dataclass(frozen=True)
class Cell:
    """A configuration of a fit: one process without a strategy, else two; ``budgets``: a trunk with branches;
    ``asynchronous``: checkpoints are written beside training, and the best one is kept, too."""

    objective: str
    workers: int = 0
    mixture: bool = False
    accumulation: int = 1
    strategy: str | None = None
    budgets: bool = False
    wandb: bool = False
    asynchronous: bool = False

    def __str__(self) -> str:
        others = [name for name in ("mixture", "budgets", "wandb", "asynchronous") if getattr(self, name)]
        numbers = [f"workers{self.workers}", f"accumulation{self.accumulation}"]
        return "-".join([self.objective, *([self.strategy] if self.strategy else []), *others, *numbers])

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


@dataclass(frozen=True)
class Undisturbed:
    """A finished run that nobody disturbed: its folder, its state, and the seconds that it took."""

    folder: Path
    state: RunState
    seconds: float


def cells() -> list[Cell]:
    """The two objectives of the paper with every number of workers and both kinds of data, accumulation in turns; two
    processes of both strategies; a trunk with branches; checkpoints beside training; W&B. The others with each once."""
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
    others = [
        cell
        for objective, strategy in (("block", "ddp"), ("uniform", "fsdp2"))
        for cell in (Cell(objective, 2, True, 3), Cell(objective, strategy=strategy), Cell(objective, budgets=True))
    ]
    return [*matrix, *pairs, *trunks, Cell("llada", asynchronous=True), Cell("llada", wandb=True), *others]


def wait_for(aim: str, run: Start, folder: Path, seconds: float, rng: random.Random) -> bool:
    """Wait until the moment has come.

    Args:
        aim: One of ``AIMS``.
        run: The fit, just started.
        folder: The folder of the run.
        seconds: The seconds that an undisturbed run takes.
        rng: The generator of the delays.

    Returns:
        False where the run ended before.
    """
    if aim == "life":
        return _pass(run, rng.random() * seconds)
    if aim == "result":
        before = _written_at(folder / VALIDATION_FILE)
        return until(run, lambda: _written_at(folder / VALIDATION_FILE) != before)
    # A share of what is left, so that the next kills fall into the run, too.
    if not (until(run, lambda: _newest(folder)[0] > run.began_at) and _pass(run, rng.random() * seconds / 10)):
        return False
    if aim == "save":
        return until(run, lambda: bool(half_saved(folder))) and _pass(run, 0.004 * rng.random())
    if aim == "validation":
        before_it = VALIDATION_STEPS - 1
        soon = until(run, lambda: _last_step(_newest(folder)[1]) % VALIDATION_STEPS == before_it)
        return soon and _pass(run, 0.1 * rng.random())
    return True


def kill(run: Start, rank: int | None) -> None:
    """SIGKILL to all processes of a run, or first to one rank, which the others must not outlive for long."""
    pid = None if rank is None else run.rank(rank)
    if pid is not None:
        os.kill(pid, 9)
        assert not run.outlived(PATIENCE_SECONDS), f"processes outlived rank {rank} by {PATIENCE_SECONDS:.0f} s"
    run.kill()


def until(run: Start, seen: Callable[[], bool]) -> bool:
    """Wait until something is seen; False where the run ended before."""
    while not seen():
        if run.ended:
            return False
        time.sleep(0.001)
    return True


def half_saved(folder: Path) -> list[Path]:
    """Checkpoints, of all phases, that are being written or removed."""
    return [path for phase in phases(folder).values() for path in (phase / "checkpoints").glob(f"*{PARTIAL}")]


def _pass(run: Start, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    return until(run, lambda: time.monotonic() >= deadline)


def _newest(folder: Path) -> tuple[float, Path]:
    """The metrics.csv, of all phases, that was written last, and when."""
    return max((_written_at(phase / "metrics.csv"), phase / "metrics.csv") for phase in phases(folder).values())


def _last_step(metrics: Path) -> int:
    with metrics.open(newline="") as file:
        return max((int(row["step"] or 0) for row in csv.DictReader(file)), default=0)


def _written_at(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
