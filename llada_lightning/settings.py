"""The settings of a run beside its model, data and trainer: the budget, the folder, the guard and the logs."""

from __future__ import annotations

from dataclasses import dataclass, field
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

_NOT_IN_NAMES = frozenset('<>"|?*\\')
"""Characters that some file systems refuse in a name, and that shells, pages and patterns of files read as markup."""

_NAME_BYTES = 240
"""Longest name of a folder: file systems take 255 bytes, and a sweep's log of a run has its name with an ending."""


def check_seed(name: str, seed: int | None) -> None:
    """Refuse a seed that the random generators do not take.

    Raises:
        UserError: Names the setting and the seed.
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
        UserError: Names the setting and the name.
    """
    for part in given.split("/") if nested else [given]:
        if part in NOT_RUNS or part.startswith("."):
            reason = "such names are those of hidden folders and of folders of other programs"
        elif not part or "/" in part:
            several = ", or several with one '/' between them" if nested else ""
            reason = f"it must be the name of a folder{several}"
        elif not part.isprintable():
            reason = "it must not contain control characters or line breaks"
        elif found := _NOT_IN_NAMES.intersection(part):
            reason = f"the name of a folder must not contain {' '.join(sorted(found))}"
        elif len(part.encode()) > _NAME_BYTES:
            reason = f"it is longer than {_NAME_BYTES} bytes"
        else:
            continue
        raise UserError(f"{name}: '{shortened(given)}' given; {reason}; choose another name")


@dataclass
class Budget:
    """What a run may spend. The length of the run follows from it.

    Args:
        flops: The training FLOPs, or an ascending list of them. A list makes one trunk at a constant rate, and a branch
            that decays for each budget. null: `trainer.max_steps` gives the length.
        tokens: The number of training tokens, instead of FLOPs.
        convention: Which FLOPs the budget counts: `6nd`, or `total` with attention and output head.
        milestones: The points on the way, ascending, at which a result is recorded without a decay. They count what the
            budget counts: FLOPs, or tokens.
        trunks: The budgets, a list for each, of runs in the same study that are alike in everything else. The run
            starts from the latest of their checkpoints from which a branch of theirs starts and which it would have
            reached itself, or from the beginning where there is none.
    """

    flops: float | list[float] | None = None
    tokens: float | None = None
    convention: Convention = "6nd"
    milestones: list[float] = field(default_factory=list)
    trunks: list[list[float]] = field(default_factory=list)


@dataclass
class Place:
    """Where a run is kept, `<root>/<study>/<name>/`, and which checkpoints stay there.

    Args:
        study: The folder that the runs of one question share.
        name: The name of the run. null: the objective, the shape, the length and a hash of the configuration.
        root: The folder of all studies.
        resume: `auto` resumes from the last checkpoint; `never` refuses a folder that has one.
        checkpoint_every_steps: The number of steps between checkpoints. null: ten checkpoints in a run, and one every
            1,000 steps at least.
        checkpoint_every_minutes: The longest time between checkpoints, in minutes. null: only the steps count.
        keep_checkpoints: The number of last checkpoints that are kept.
        keep_best: Whether the checkpoint with the lowest validation loss is kept, too, with a link to it,
            `checkpoints/best.ckpt`.
        keep_fork: Whether the checkpoint of the step at which the decay begins is written and kept, too, so that a run
            of a larger budget can start from it (`budget.trunks`). A run of several budgets keeps its own in any case.
        parent: The checkpoint from which the run starts. It follows from `budget.trunks`.
        policies: The decoding policies under which the validation sequences are measured as well, at the end of each
            budget, at milestones, and by `validate`: a mapping from names to the tokens that a step reveals, such as
            `{confidence: 1}`. They are no part of the run's identity.
        async_checkpoints: Whether checkpoints are written while training continues, from a copy in memory. Sharded
            checkpoints cannot be.
    """

    study: str = "default"
    name: str | None = None
    root: str = "runs"
    resume: Literal["auto", "never"] = "auto"
    checkpoint_every_steps: int | None = None
    checkpoint_every_minutes: float | None = None
    keep_checkpoints: int = 2
    keep_best: bool = False
    keep_fork: bool = False
    parent: str | None = None
    policies: dict[str, int] = field(default_factory=dict)
    async_checkpoints: bool = False

    @property
    def folder(self) -> Path:
        assert self.name is not None
        return expanded(self.root) / self.study / self.name


@dataclass
class Guard:
    """What to do about losses and gradients that are not usable. An update whose loss or gradient is not finite is
    always skipped.

    Args:
        spikes: What to do about a loss far above those of the last 100 updates: `skip` the update, `report` it, or
            `ignore` it.
        spike_zscore: The distance above the median that makes a spike, in robust standard deviations.
        patience: The number of updates skipped in a row that ends the run.
    """

    spikes: Literal["ignore", "report", "skip"] = "report"
    spike_zscore: float = 30.0
    patience: int = 20


@dataclass
class Profile:
    """A profile of some steps, in the run's folder `profile/`. It is no part of the run's identity.

    Args:
        steps: The number of steps to record; 0: none. Of several budgets, the steps before the first decay are
            profiled.
        after: The number of steps that pass before recording begins, so that warming up and compiling are not measured.
    """

    steps: int = 0
    after: int = 10


@dataclass
class Wandb:
    """Logging to Weights & Biases. `metrics.csv` is written in any case.

    Args:
        project: The name of the project. null: no logging to W&B, unless an agent of a sweep started this run.
        entity: The user or team.
        group: The group of runs. null: the study.
        offline: Whether to log to a folder that is synchronised later.
    """

    project: str | None = None
    entity: str | None = None
    group: str | None = None
    offline: bool = False
