"""A run as a sequence of fits: one fit, or a trunk of constant rate from which each budget's decay branches off.

Order and noise are functions of the ordinal, and up to its decay a run does not know its budget. So a branch is the run
that would have been made for its budget alone with the same rate and warmup, step by step, and goes by that run's name;
what the budgets share is trained once. (Rate and warmup that are not given follow from all budgets together.)

To resume is to start such a fit from its own last whole checkpoint (:meth:`Phase.start`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from llada_lightning.checkpoints.run_folder import (
    BRANCHES,
    CHECKPOINTS,
    CONFIG,
    checkpoint_of_step,
    content_hash,
    last_checkpoint,
    require_whole,
    saved_identity,
    saved_step,
    whole_checkpoint,
)
from llada_lightning.compute.schedule import WSD
from llada_lightning.data.loading import LanguageDataModule
from llada_lightning.identity import HASH_DIGITS, check_history, check_identity, differences, identity_hash
from llada_lightning.records import read_records
from llada_lightning.run import Run, resolve
from llada_lightning.support.errors import UserError
from llada_lightning.support.reading import read_yaml
from llada_lightning.support.signals import say
from llada_lightning.training.configuration import as_parsed, identity
from llada_lightning.training.configuration import run_name as name_of
from llada_lightning.training.record import describe_result


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
        result: The schedule of that result: of a milestone, which ends a fit that has not decayed, another one.
        continues: Whether the run continues from its end: it is a part of a trunk, or ends at a milestone.
        parent: The checkpoint of another run, or of the trunk, that it starts from.
        forks: The steps whose checkpoints are kept: branches, or runs of larger budgets, start there, or a milestone is
            there.
    """

    title: str
    folder: Path
    schedule: WSD
    first_step: int
    last_step: int
    val_check_interval: int
    identity: dict[str, Any]
    run: str | None
    result: WSD
    continues: bool = False
    parent: Path | None = None
    forks: frozenset[int] = frozenset()

    @property
    def checkpoints(self) -> Path:
        return self.folder / CHECKPOINTS

    @property
    def foreign_parent(self) -> Path | None:
        """Its parent; None where that is one of its own checkpoints, of which the last one counts anyway."""
        own = self.parent is not None and self.parent.parent.resolve() == self.checkpoints.resolve()
        return None if own else self.parent

    def start(self) -> Path | None:
        """The checkpoint to resume from: its own last whole one, else its parent."""
        return whole_checkpoint(self.checkpoints)[0] or self.foreign_parent

    def is_passed(self) -> bool:
        """Whether a trunk has been trained to this phase's end before."""
        own, _ = whole_checkpoint(self.checkpoints)
        return self.run is None and own is not None and saved_step(own) >= self.last_step

    def check_start(self, never: bool) -> dict[Path, str]:
        """Refuse to resume from a checkpoint of another run, with every difference, or from any (``never``).

        Returns:
            Its own checkpoints behind the last whole one, and what is wrong with them.
        """
        own, damaged = whole_checkpoint(self.checkpoints)
        if never and (own is not None or damaged):
            raise UserError(f"run.resume: never given, but {self.folder} has checkpoints; delete it, or resume: auto")
        if own is not None:
            fix = "restore these settings, or start a new --run.name"
            check_identity(saved_identity(own), self.identity, own, fix)
        if own is not None and self.continues and self.run is not None and saved_step(own) > self.last_step:
            raise UserError(
                f"budget.milestones: the run in {self.folder} has passed step {self.last_step}, where a new milestone "
                "would have been; leave it out, or choose another --run.name"
            )
        if self.is_passed() and not checkpoint_of_step(self.checkpoints, self.last_step).exists():
            raise UserError(
                f"budget.flops: the trunk in {self.folder} has passed step {self.last_step}, where a new budget would "
                "have branched off; choose another --run.name"
            )
        parent = self.foreign_parent
        if own is None and parent is not None and parent.exists():
            require_whole(parent)
        if parent is not None and not self.first_step:  # a branch's parent is yet to be made
            step = saved_step(parent)
            fix = "restore these settings, or leave --ckpt_path out"
            check_history(saved_identity(parent), self.identity, step, parent, fix)
            if step > self.last_step or (step == self.last_step and self.run is None):
                raise UserError(
                    f"ckpt_path: '{parent}' is at step {step}, and a budget or milestone ends or branches off at step "
                    f"{self.last_step}; leave it out"
                )
        return damaged

    def parent_hash(self) -> str | None:
        """``content_hash`` of the checkpoint of another run, or of the trunk, that it started from; None: of none."""
        return None if self.foreign_parent is None else content_hash(self.foreign_parent)

    def apply(self, config: Namespace) -> None:
        """Set, in place, what of a run's configuration is this phase's."""
        config.model.init_args.schedule = as_parsed(self.schedule)
        config.trainer.max_steps = self.last_step
        config.trainer.val_check_interval = self.val_check_interval


def phases_of(
    config: Namespace,
    data: LanguageDataModule,
    schedules: Sequence[WSD],
    folder: Path,
    milestones: Sequence[WSD] = (),
) -> list[Phase]:
    """The fits of a resolved configuration, in the order in which they are run.

    Args:
        config: The resolved configuration.
        data: The data module.
        schedules: The schedule of each budget, shortest first.
        folder: The folder of the run.
        milestones: The schedule of each milestone, shortest first (:class:`run.Run`).
    """
    start = config.ckpt_path or config.run.parent
    given = Path(start) if start else None

    def phase(schedule: WSD, last_step: int | None, title: str = "", **others: Any) -> Phase:
        assert last_step is not None
        given_interval = config.trainer.val_check_interval
        values = {"folder": folder, "first_step": 0, "val_check_interval": given_interval, "result": schedule, **others}
        known = identity(config, data, schedule)
        return Phase(title=title, schedule=schedule, last_step=last_step, identity=known, **values)

    def up_to(milestone: WSD, number: int, schedule: WSD, kept: frozenset[int]) -> Phase:
        title = f"to milestone {number} of {len(milestones)}"
        named, own = name_of(config, data, [milestone]), {"result": milestone, "continues": True}
        return phase(schedule, milestone.total_steps, title, run=named, parent=given, forks=kept, **own)

    stops = frozenset(milestone.total_steps or 0 for milestone in milestones)
    numbered = list(enumerate(milestones, 1))
    if len(schedules) == 1:
        [schedule] = schedules
        kept = stops | {fork_step(schedule)} if config.run.keep_fork else stops
        before = [up_to(milestone, number, schedule, kept) for number, milestone in numbered]
        named = name_of(config, data, schedules)
        return [*before, phase(schedule, schedule.total_steps, run=named, parent=given, forks=kept)]
    forks = [fork_step(schedule) for schedule in schedules]
    trunk = replace(schedules[-1], total_steps=forks[-1], decay_steps=0)
    kept = frozenset(forks) | stops
    phases = []
    for number, (schedule, fork) in enumerate(zip(schedules, forks, strict=True), 1):
        length = schedule.total_steps
        assert length is not None
        if fork == length:
            raise UserError(
                f"model.schedule: the decay of {length} steps is shorter than one; several budgets need a decay: raise "
                "decay_fraction"
            )
        while numbered and (numbered[0][1].total_steps or 0) <= fork:
            reached, milestone = numbered.pop(0)
            phases.append(up_to(milestone, reached, trunk, kept))
        phases += [
            phase(trunk, fork, "trunk", run=None, parent=given, forks=kept, continues=True),
            phase(
                schedule,
                length,
                f"branch {number} of {len(schedules)}",
                folder=folder / BRANCHES / str(length),
                first_step=fork,
                val_check_interval=(length + 1) * config.trainer.accumulate_grad_batches,
                run=name_of(config, data, [schedule]),
                parent=checkpoint_of_step(folder / CHECKPOINTS, fork),
            ),
        ]
    return phases


def fork_step(schedule: WSD) -> int:
    """The step at which a run's decay begins."""
    assert schedule.total_steps is not None and schedule.decay_steps is not None
    return schedule.total_steps - schedule.decay_steps


def trunk_checkpoint(config: Namespace, data: LanguageDataModule, run: Run, folder: Path) -> Path | None:
    """The checkpoint from which ``budget.trunks`` let a run start: of the latest fork before its own first one.

    A run that has begun keeps the one with which it began, which its config.yaml names as ``run.parent``.

    Returns:
        None: The run starts from its first step, or what it began with has been removed since.
    """
    if not run.spec.length.flops:
        raise UserError("budget.trunks: given without budget.flops, which say what the run adds; leave it out")
    if (folder / CONFIG).is_file():
        begun = read_yaml(folder / CONFIG)
        place = begun.get("run") if isinstance(begun, dict) else None
        parent = place.get("parent") if isinstance(place, dict) else None
        return Path(parent) if isinstance(parent, str) and Path(parent).exists() else None
    first, found = fork_step(run.schedules[0]), []
    for budgets in config.budget.trunks:
        if not budgets:
            raise UserError("budget.trunks: [] holds no budget; give those of a run, such as [1e12, 2e12]")
        length = replace(run.spec.length, flops=tuple(budgets), milestones=(), setting="budget.trunks")
        schedules = resolve(replace(run.spec, length=length, global_batch=run.global_batch)).schedules
        checkpoints = folder.parent / name_of(config, data, schedules) / CHECKPOINTS
        forks = [fork for fork in map(fork_step, schedules) if fork < first]
        found += [(fork, checkpoint_of_step(checkpoints, fork)) for fork in forks]
    return max(((fork, path) for fork, path in found if path.exists()), default=(0, None))[1]


class RunIsDone(SystemExit):
    """The run of a command is done: there is nothing to do, and the command ends with exit code 0."""

    def __init__(self, folder: Path) -> None:
        super().__init__(0)
        self.folder = folder


def _differences_of(record: Mapping[str, Any], phases: Sequence[Phase], folder: Path) -> list[str]:
    """The settings in which a record's run differs from the nearest of the phases; none where no checkpoint tells."""
    branch = folder / BRANCHES / str(record.get("steps"))
    checkpoint = last_checkpoint((branch if branch.is_dir() else folder) / CHECKPOINTS)
    try:
        saved = {} if checkpoint is None else saved_identity(checkpoint)
    except UserError:  # damaged
        return []
    if not str(record.get("run")).endswith(identity_hash(saved)[:HASH_DIGITS]):  # of a trunk, or of another program
        return []
    return min((differences(saved, phase.identity) for phase in phases if phase.run is not None), key=len)


def check_run(phases: Sequence[Phase], folder: Path, run_name: str, never: bool) -> None:
    """Refuse a folder of another run, or one that a phase cannot start in; raise :class:`RunIsDone` where all is done.

    ``never`` refuses checkpoints of its own, too.
    """
    records = read_records(folder)
    names = {phase.run for phase in phases if phase.run is not None}
    done = {record["run"] for record in records}
    ends = {phase.run for phase in phases if not phase.continues}
    # A milestone that is no longer asked for stays in the folder of its run.
    left_out = {record["run"] for record in records if record.get("decay_steps") == 0 and done & ends}
    if others := [record for record in records if record["run"] not in names | left_out]:
        apart = next(filter(None, (_differences_of(record, phases, folder) for record in others)), [])
        settings, restore = (f" of other settings ({'; '.join(apart)}):", "restore them, ") if apart else ("", "")
        raise UserError(
            f"run.name: {folder} holds the finished run{settings} {others[0].get('run')}, not {run_name}; {restore}"
            "choose another --run.name, or leave it out"
        )
    if names <= done:
        for record in records:
            say(f"{folder} is done ({describe_result(record)}); nothing to do")
        raise RunIsDone(folder)
    damaged: dict[Path, str] = {}
    for phase, following in zip_longest(phases, phases[1:]):
        if phase.run in done or (phase.run is None and following.run in done):
            continue
        damaged |= phase.check_start(never)
    for checkpoint, found in damaged.items():
        say(f"warning: {checkpoint} is damaged ({found}); the run resumes from before it")
