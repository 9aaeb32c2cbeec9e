"""When to kill a fit: at any moment of its life, or while something is being written or validated."""

from __future__ import annotations

import os
import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from llada_lightning.checkpoints.run_folder import CHECKPOINTS, checkpoints_by_step
from llada_lightning.checkpoints.sharded_checkpoints import PARTIAL
from llada_lightning.records import RESULT_FILE, VALIDATION_FILE
from processes import Start
from run_state import phases
from small_fits import VALIDATION_STEPS

Aim = Literal["life", "training", "save", "validation", "result"]
"""`life`: uniformly over what is left of the run's life, start-up included; `training`: after its first step; the
others while a checkpoint, a validation or the result is being made."""

ORDER: tuple[Aim, ...] = ("life", "save", "training", "validation", "save", "training", "life", "save")


@dataclass(frozen=True)
class Pace:
    """How long a fit of this configuration takes without a kill: seconds before its first step, and of its steps."""

    startup: float
    training: float


@dataclass(frozen=True)
class Sight:
    """What a run's folder shows, all phases together.

    Attributes:
        saved: steps that are in whole checkpoints.
        lost: steps of which there are rows but no checkpoint.
        newest: the last step of the metrics.csv that was written last; 0 without one.
        row_at: when that was; all times are the clock's, in seconds, 0 for what is not there.
        saving: whether a checkpoint is half-written, or half-removed.
        validated_at: when the validation was written that a result follows.
        result_at: when the result was written.
    """

    saved: int
    lost: int
    newest: int
    row_at: float
    saving: bool
    validated_at: float
    result_at: float

    def moment(self, began_at: float) -> str:
        """What a run that was started at ``began_at`` is doing; `validation` includes the step before it."""
        if self.row_at <= began_at:
            return "start-up"
        if self.saving:
            return "save"
        if max(self.validated_at, self.result_at) > began_at:
            return "result" if self.validated_at > self.result_at else "after a result"
        return "validation" if self.newest % VALIDATION_STEPS == VALIDATION_STEPS - 1 else "training"


def aims(kills: int, cell: int) -> list[Aim]:
    """What the kills of a cell aim at: a turn through all, begun at another place in each cell; in every second cell
    the last one is at the result."""
    chosen = [ORDER[(cell + number) % len(ORDER)] for number in range(kills)]
    return [*chosen[:-1], "result"] if kills > 1 and cell % 2 else chosen


def wait_for(aim: Aim, run: Start, folder: Path, pace: Pace, share_left: float, rng: random.Random) -> bool:
    """Wait until the moment has come.

    Args:
        aim: the moment.
        run: the fit, just started.
        folder: of the run.
        pace: of its configuration.
        share_left: of the run's steps.
        rng: for the delays.

    Returns:
        False where the run ended before.
    """
    if aim == "life":
        return _sleep(run, rng.random() * (pace.startup + pace.training * share_left))
    if aim == "result":
        before = _written_at(folder / VALIDATION_FILE)
        ended = _until(run, lambda: _written_at(folder / VALIDATION_FILE) != before)
        return ended and _sleep(run, 0.002 * rng.random())
    # A share of what is left, so that the next ones fall into the run, too.
    delay = rng.random() * pace.training * share_left / 3
    if not (_until(run, lambda: _newest_rows(folder)[1] > run.began_at, every=0.02) and _sleep(run, delay)):
        return False
    if aim == "save":
        return _until(run, lambda: bool(half_saved(folder))) and _sleep(run, 0.004 * rng.random())
    if aim == "validation":
        soon = _until(run, lambda: look(folder).moment(run.began_at) == "validation", every=0.005)
        return soon and _sleep(run, 0.1 * rng.random())
    return True


def look(folder: Path) -> Sight:
    """What the folder of a run shows now."""
    saved = lost = 0
    for phase in phases(folder).values():
        steps = _steps(phase)
        if steps:
            last = max(checkpoints_by_step(phase / CHECKPOINTS), default=steps[0] - 1)
            saved += max(0, last - steps[0] + 1)
            lost += max(0, steps[-1] - last)
    newest, row_at = _newest_rows(folder)
    return Sight(
        saved=saved,
        lost=lost,
        newest=(_steps(newest) or [0])[-1],
        row_at=row_at,
        saving=bool(half_saved(folder)),
        validated_at=_written_at(folder / VALIDATION_FILE),
        result_at=_written_at(folder / RESULT_FILE),
    )


def half_saved(folder: Path) -> list[Path]:
    """Checkpoints, of all phases, that are being written or removed."""
    return [path for phase in phases(folder).values() for path in (phase / CHECKPOINTS).glob(f"*{PARTIAL}")]


def _newest_rows(folder: Path) -> tuple[Path, float]:
    """The phase whose metrics.csv was written last, and when."""
    written = {phase: _written_at(phase / "metrics.csv") for phase in phases(folder).values()}
    return max(written.items(), key=lambda item: item[1])


def _steps(phase: Path) -> list[int]:
    try:
        text = (phase / "metrics.csv").read_text()
    except OSError:
        return []
    return [int(number) for number in re.findall(r"^(\d+),.*\n", text, flags=re.MULTILINE)]


def _written_at(path: Path) -> float:
    try:
        return os.stat(path).st_mtime
    except OSError:
        return 0.0


def _until(run: Start, seen: Callable[[], bool], every: float = 0.0005) -> bool:
    while not seen():
        if run.ended:
            return False
        time.sleep(every)
    return True


def _sleep(run: Start, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        if run.ended:
            return False
        time.sleep(min(left, 0.05))
    return not run.ended
