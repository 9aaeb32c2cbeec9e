"""A run as a sequence of fits: one fit, or a trunk of constant rate from which each budget's decay branches off.

Order and noise are functions of the ordinal, and up to its decay a run does not know its budget. So a branch is the run
that would have been made for its budget alone with the same rate and warmup, step by step, and goes by that run's name;
what the budgets share is trained once. (Rate and warmup that are not given follow from all budgets together.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from llada_lightning.checkpoints.run_folder import (
    BRANCHES,
    CHECKPOINTS,
    checkpoint_of_step,
    content_hash,
    require_whole,
    saved_identity,
    saved_step,
    whole_checkpoint,
)
from llada_lightning.compute.schedule import WSD
from llada_lightning.data.datamodule import LanguageDataModule
from llada_lightning.identity import check_history, check_identity
from llada_lightning.support.errors import UserError
from llada_lightning.training.configuration import as_namespace, identity, run_name


@dataclass(frozen=True)
class Phase:
    """One fit of a run.

    Args:
        title: The words that the progress line adds to the objective and the shape.
        folder: The folder of its `metrics.csv` and its `checkpoints/`.
        schedule: The resolved schedule of the learning rate.
        first_step: The step at which it starts from another phase's checkpoint; 0 for a trunk and for a run of one fit.
        last_step: The step at which it ends.
        val_check_interval: The number of micro-batches between validations. A branch has none before its end.
        identity: The identity of the run that it is a part of.
        run: The name of the result at its end; None where it ends in none.
        parent: The checkpoint of another run, or of the trunk, that it starts from.
        forks: The steps whose checkpoints are kept because branches start there.
    """

    title: str
    folder: Path
    schedule: WSD
    first_step: int
    last_step: int
    val_check_interval: int
    identity: dict[str, Any]
    run: str | None
    parent: Path | None = None
    forks: frozenset[int] = frozenset()

    @property
    def checkpoints(self) -> Path:
        return self.folder / CHECKPOINTS

    def start(self) -> Path | None:
        """The checkpoint to resume from: its own last whole one, else its parent."""
        return self._own() or self.foreign_parent

    def damaged(self) -> dict[Path, str]:
        """Its own checkpoints behind the last whole one, and what is wrong with them."""
        return whole_checkpoint(self.checkpoints)[1]

    def _own(self) -> Path | None:
        return whole_checkpoint(self.checkpoints)[0]

    @property
    def foreign_parent(self) -> Path | None:
        """Its parent; None where that is one of its own checkpoints, of which the last one counts anyway."""
        own = self.parent is not None and self.parent.parent.resolve() == self.checkpoints.resolve()
        return None if own else self.parent

    def is_passed(self) -> bool:
        """Whether a trunk has been trained to this phase's end before."""
        own = self._own()
        return self.run is None and own is not None and saved_step(own) >= self.last_step

    def check_start(self, never: bool) -> None:
        """Refuse to resume from a checkpoint of another run.

        Args:
            never: Whether any checkpoint of its own is refused.

        Raises:
            UserError: names what differs.
        """
        own = self._own()
        if never and (own is not None or self.damaged()):
            raise UserError(f"run.resume: never given, but {self.folder} has checkpoints; delete it, or resume: auto")
        if own is not None:
            check_identity(saved_identity(own), self.identity)
        if self.is_passed() and not checkpoint_of_step(self.checkpoints, self.last_step).exists():
            raise UserError(
                f"budget.flops: the trunk in {self.folder} has passed step {self.last_step}, where a new budget would "
                "have branched off; choose another --run.name"
            )
        if own is None and self.foreign_parent is not None and self.foreign_parent.exists():
            require_whole(self.foreign_parent)
        if self.foreign_parent is not None and not self.first_step:  # a branch's parent is yet to be made
            step = saved_step(self.foreign_parent)
            check_history(saved_identity(self.foreign_parent), self.identity, step)
            if step > self.last_step or (step == self.last_step and self.run is None):
                raise UserError(
                    f"ckpt_path: '{self.parent}' is at step {step}, and a budget ends or branches off at step "
                    f"{self.last_step}; leave that budget out"
                )

    def parent_hash(self) -> str | None:
        """``content_hash`` of the checkpoint of another run, or of the trunk, that it started from; None: of none."""
        return None if self.foreign_parent is None else content_hash(self.foreign_parent)

    def apply(self, config: Namespace) -> None:
        """Set, in place, what of a run's configuration is this phase's."""
        config.model.init_args.schedule = as_namespace(self.schedule)
        config.trainer.max_steps = self.last_step
        config.trainer.val_check_interval = self.val_check_interval


def phases_of(config: Namespace, data: LanguageDataModule, schedules: Sequence[WSD], folder: Path) -> list[Phase]:
    """The fits of a resolved configuration, in the order in which they are run: smallest budget first.

    Args:
        config: The resolved configuration.
        data: The data module.
        schedules: The schedule of each budget, shortest first.
        folder: The folder of the run.

    Raises:
        UserError: a budget's decay is shorter than a step.
    """
    if len(schedules) == 1:
        return [_whole(config, data, schedules[0], folder)]
    forks = [fork_step(schedule) for schedule in schedules]
    given = Path(config.ckpt_path) if config.ckpt_path else None
    trunk = replace(schedules[-1], total_steps=forks[-1], decay_steps=0)
    trunk_identity = identity(config, data, trunk)
    phases = []
    for schedule, fork in zip(schedules, forks, strict=True):
        assert schedule.total_steps is not None
        if fork == schedule.total_steps:
            raise UserError(
                f"model.schedule: the decay of {schedule.total_steps} steps is shorter than one; several budgets need "
                "a decay: raise decay_fraction"
            )
        phases += [
            Phase(
                title="trunk",
                folder=folder,
                schedule=trunk,
                first_step=0,
                last_step=fork,
                val_check_interval=config.trainer.val_check_interval,
                identity=trunk_identity,
                run=None,
                parent=given,
                forks=frozenset(forks),
            ),
            Phase(
                title=f"branch {schedules.index(schedule) + 1} of {len(schedules)}",
                folder=folder / BRANCHES / str(schedule.total_steps),
                schedule=schedule,
                first_step=fork,
                last_step=schedule.total_steps,
                val_check_interval=(schedule.total_steps + 1) * config.trainer.accumulate_grad_batches,
                identity=identity(config, data, schedule),
                run=run_name(config, data, [schedule]),
                parent=checkpoint_of_step(folder / CHECKPOINTS, fork),
            ),
        ]
    return phases


def fork_step(schedule: WSD) -> int:
    """The step at which a run's decay begins."""
    assert schedule.total_steps is not None and schedule.decay_steps is not None
    return schedule.total_steps - schedule.decay_steps


def _whole(config: Namespace, data: LanguageDataModule, schedule: WSD, folder: Path) -> Phase:
    assert schedule.total_steps is not None
    name = run_name(config, data, [schedule])
    given = Path(config.ckpt_path) if config.ckpt_path else None
    return Phase(
        title="",
        folder=folder,
        schedule=schedule,
        first_step=0,
        last_step=schedule.total_steps,
        val_check_interval=config.trainer.val_check_interval,
        identity=identity(config, data, schedule),
        run=name,
        parent=given,
    )
