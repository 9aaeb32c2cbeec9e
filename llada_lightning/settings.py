"""Settings of a run beside model, data and trainer: its budget, its place, its second log."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from llada_lightning.compute.flops import Convention
from llada_lightning.support.errors import UserError
from llada_lightning.support.files import expanded
from llada_lightning.support.printing import shortened

MAX_SEED = 2**32 - 1
"""Largest seed that NumPy, and so Lightning, takes."""

MAX_PROCESSES = 256
"""Most processes that one command starts of a kind on a machine: workers of a loader, or ranks on its CPU."""

NOT_RUNS = frozenset({"checkpoints", "logs", "wandb", "__pycache__"})
"""Names of folders beside and within runs, which are never runs."""

_NAME_BYTES = 240
"""Longest name of a folder: file systems take 255 bytes, and a sweep's log of a run has its name with an ending."""


def check_seed(name: str, seed: int | None) -> None:
    """Refuse a seed that the random generators do not take.

    Raises:
        UserError: names the setting and the seed.
    """
    if seed is not None and not 0 <= seed <= MAX_SEED:
        raise UserError(f"{name}: {seed} given; it must lie between 0 and {MAX_SEED}")


def check_folder_name(name: str, given: str, *, nested: bool = False) -> None:
    """Refuse a name of a run or study whose results would not be found, or would hide others'.

    Args:
        name: The name of the setting, for messages.
        given: The name of the folder.
        nested: Whether it may be several folders, one within the other, with `/` between them.

    Raises:
        UserError: names the setting and the name.
    """
    for part in given.split("/") if nested else [given]:
        if part in NOT_RUNS or part.startswith("."):
            reason = "such names are those of hidden folders and of folders of other programs"
        elif not part or "/" in part:
            reason = "it must be the name of a folder"
        elif not part.isprintable():
            reason = "it must not contain control characters or line breaks"
        elif len(part.encode()) > _NAME_BYTES:
            reason = f"it is longer than {_NAME_BYTES} bytes"
        else:
            continue
        raise UserError(f"{name}: '{shortened(given)}' given; {reason}; choose another name")


@dataclass
class Budget:
    """What a run may spend; its length follows from it.

    Args:
        flops: training FLOPs, or an ascending list of them: one trunk of constant rate, and for each budget a branch
            that decays; null: `trainer.max_steps` decides the length.
        tokens: training tokens instead of FLOPs.
        convention: which FLOPs the budget counts: 6ND, or the total with attention and head.
    """

    flops: float | list[float] | None = None
    tokens: float | None = None
    convention: Convention = "6nd"


@dataclass
class Run:
    """Where a run lives: `<root>/<study>/<name>/`.

    Args:
        study: the folder that runs of one question share.
        name: null: objective, shape, length and a hash of the configuration.
        root: the folder of all studies.
        resume: auto goes on from the last checkpoint; never refuses a folder that has one.
        checkpoint_every_steps: null: ten times a run, and at least every 1000 steps.
        checkpoint_every_minutes: null: steps alone decide; else a checkpoint is written after so long at the latest.
        keep_checkpoints: the last ones to keep.
        keep_best: keep the one with the lowest validation loss, too; `checkpoints/best.ckpt` is a link to it.
        async_checkpoints: write checkpoints beside training, from a copy in memory; not those in shards.
    """

    study: str = "default"
    name: str | None = None
    root: str = "runs"
    resume: Literal["auto", "never"] = "auto"
    checkpoint_every_steps: int | None = None
    checkpoint_every_minutes: float | None = None
    keep_checkpoints: int = 2
    keep_best: bool = False
    async_checkpoints: bool = False

    @property
    def folder(self) -> Path:
        assert self.name is not None
        return expanded(self.root) / self.study / self.name


@dataclass
class Guard:
    """What to do about bad numbers. An update with a loss or gradient that is not finite is skipped in any case.

    Args:
        spikes: a loss far above those of the last 100 updates: skip its update, report it, or do not look.
        spike_zscore: how far: robust standard deviations above their median.
        patience: updates skipped in a row that end the run.
    """

    spikes: Literal["ignore", "report", "skip"] = "report"
    spike_zscore: float = 30.0
    patience: int = 20


@dataclass
class Profile:
    """Where a step's time goes: a trace, a page and a picture in the run's `profile/`; never part of its identity.

    Args:
        steps: to record; 0: none. Of several budgets the way to the first one's decay is profiled.
        after: steps passed first, so that warming up and compiling are not measured.
    """

    steps: int = 0
    after: int = 10


@dataclass
class Wandb:
    """Weights & Biases; metrics.csv is written in any case.

    Args:
        project: null: no W&B, unless an agent of a sweep started this run.
        entity: user or team.
        group: null: the study.
        offline: log to a folder, to be synchronised later.
    """

    project: str | None = None
    entity: str | None = None
    group: str | None = None
    offline: bool = False
