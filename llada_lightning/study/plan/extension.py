"""Studies that grow: budgets and seeds that join a planned sweep, and files that are not overwritten once edited.

A sweep file says in its head by which commands it was made, and holds the SHA-256 of its own text and of the table
beside it. So an edit is noticed, and the plan can be made again from its commands. A budget that joins a trunk becomes
a run of its own, which starts from the trunk's checkpoints (``budget.trunks``): the runs of before stay as they are,
word for word, and keep their names, their numbers and their results.
"""

from __future__ import annotations

import hashlib
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from llada_lightning.compute.shapes import Shape, shape_name
from llada_lightning.settings import check_seed
from llada_lightning.study.plan import Plan, checked_budgets
from llada_lightning.study.plan.comparison import budgets_of
from llada_lightning.study.plan.trunk import Branch, SeedsAt, Trunk, cheap_points, plan_trunk, planned_shape, shapes_at
from llada_lightning.support.errors import UserError
from llada_lightning.support.files import is_there
from llada_lightning.support.printing import listed, shortened

MADE_BY, APPENDED_BY = "# made by: ", "# appended by: "
_SEAL = re.compile(r"^# sha256: ([0-9a-f]{64}) of this file without this line(?:, ([0-9a-f]{64}) of its table)?$", re.M)


# --- files that were edited ------------------------------------------------------------------------------------------


def sealed(text: str, table: str | None = None) -> str:
    """A text whose head names the SHA-256 of the rest, and of the table beside it: the line ends its first comments."""
    beside = "" if table is None else f", {_sha256(table)} of its table"
    line = f"# sha256: {_sha256(text)} of this file without this line{beside}"
    lines = text.split("\n")
    end = next(number for number, own in enumerate(lines) if not own.startswith("#"))
    return "\n".join([*lines[:end], line, *lines[end:]])


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def is_unedited(text: str) -> bool:
    """Whether a text is what :func:`sealed` gave."""
    seal = _SEAL.search(text)
    return seal is not None and _sha256(text[: seal.start()] + text[seal.end() + 1 :]) == seal[1]


def check_replaceable(texts: Mapping[Path, str], sweep: Path) -> None:
    """Refuse to overwrite what was edited, is no file of a plan, or holds runs that were appended and would be lost.

    Args:
        texts: The new text of each file. One of them is the sweep, another its table, the third may be a job array.
        sweep: The path of the sweep.

    Raises:
        UserError: Names the file.
    """
    seal = _SEAL.search(_read(sweep) or "")
    for path, text in texts.items():
        old = _read(path) if is_there(path) else text
        is_table = path == sweep.with_suffix(".csv")
        same = old is not None and (_sha256(old) == (seal and seal[2]) if is_table else is_unedited(old))
        if old != text and not same:
            raise UserError(
                f"plan: '{shortened(path)}' was edited since it was planned, or is no file of this version's plan; "
                "choose another name, or give --force to overwrite it"
            )
    old = _read(sweep) or ""
    if old.count(f"\n{APPENDED_BY}") > texts[sweep].count(f"\n{APPENDED_BY}"):
        raise UserError(
            f"plan: '{shortened(sweep)}' holds runs that --append has added, which this plan leaves out; choose "
            "another name, or give --force to overwrite it"
        )


def _read(path: Path) -> str | None:
    """The text of a file with plain line ends; None: there is none, or it cannot be read as text."""
    try:
        return path.read_text(encoding="utf-8") if path.is_file() else None
    except (OSError, ValueError):
        return None


# --- commands in the head of a sweep ---------------------------------------------------------------------------------


def read_commands(path: Path) -> tuple[list[str], list[list[str]]]:
    """The command that made a planned sweep, and those that have appended to it, each after ``llada plan``.

    Raises:
        UserError: The file cannot be read, was edited, or is no planned sweep.
    """
    text = _read(path)
    if text is None:
        raise UserError(f"plan: --append '{shortened(path)}' cannot be read; give a sweep that llada plan has written")
    if not is_unedited(text):
        raise UserError(
            f"plan: --append '{shortened(path)}' was edited since it was planned, or is no sweep of this version's "
            "plan; append to one as llada plan wrote it, or plan a new one by --out"
        )
    lines = text.split("\n")
    [made] = [line for line in lines if line.startswith(MADE_BY)]
    appended = [line.removeprefix(APPENDED_BY) for line in lines if line.startswith(APPENDED_BY)]
    return shlex.split(made.removeprefix(MADE_BY))[2:], [shlex.split(line)[2:] for line in appended]


# --- plans that grow -------------------------------------------------------------------------------------------------


def extend(
    plan: Plan,
    budgets: Sequence[float],
    seeds: Sequence[int],
    seeds_at: SeedsAt = "cheap",
    shapes: Sequence[str] = (),
) -> Plan:
    """A plan with further budgets and seeds: the runs of before in their order, and the new ones behind them.

    A shape that the plan has keeps its rate, batch and warmup. Its new budgets become runs that start from the fork
    before them, so one run serves all budgets of its shape and seed that lie beyond the last fork.

    Args:
        plan: The plan.
        budgets: The training FLOPs of the new budgets, for the seeds that are run everywhere. A plan that lowers the
            reference's budgets lowers these by the same factor.
        seeds: The new seeds.
        seeds_at: Where the new seeds are run: at the middle shape of each objective's three smallest budgets, or at
            all points, those of the new budgets included.
        shapes: The names of the shapes that the new budgets and seeds are for. Without any, new budgets have the shapes
            that the plan gives them, and new seeds are for every shape. A shape that is new to the plan may have
            budgets that the plan has for others.

    Raises:
        UserError: A budget or a seed is there already, or does not fit.
    """
    if plan.tuning is not None:
        raise UserError(
            "plan: --append to a tuning study; plan another one with other --flops, --tune-rates or --tune-batches for "
            "the same --study (runs that both have are not repeated)"
        )
    added = checked_budgets(budgets) if budgets else ()
    of_each = {objective: budgets_of(objective, added, plan.lowered_by) for objective in plan.objectives}
    old_seeds = list(dict.fromkeys(trunk.seed for trunk in plan.trunks))
    points = {seed: _points(plan, seed) for seed in (*old_seeds, *seeds)}
    everywhere = [seed for seed in old_seeds if points[seed] == points[old_seeds[0]]]
    given = tuple(sorted({_shape_of(plan, name) for name in shapes}, key=lambda shape: shape.params_nonembedding))
    if len(set(seeds)) < len(seeds):
        raise UserError(f"plan: --seeds {shortened(' '.join(map(str, seeds)))}: give each once")
    for seed in seeds:
        check_seed("plan: --seeds", seed)
    if not added and not seeds:
        raise UserError("plan: --append adds nothing; give --flops, --seeds or both")
    trunks: list[Trunk] = []
    lacking: set[float] = set()
    for objective in plan.objectives:
        served: dict[Shape, list[float]] = {}
        for budget, own in zip(added, of_each[objective], strict=True):
            for shape in given or shapes_at(own, objective, plan.grid, plan.stream, plan.convention):
                served.setdefault(shape, []).append(own)
                lacking |= {budget for seed in everywhere if (objective, shape, own) not in points[seed]}
        for shape in sorted(served, key=lambda shape: shape.params_nonembedding):
            for seed in everywhere:
                if new := [own for own in served[shape] if (objective, shape, own) not in points[seed]]:
                    trunks += _parts(plan, objective, shape, seed, new)
        every: dict[Shape, set[float]] = {shape: set(own) for shape, own in served.items()}
        for trunk in plan.trunks:
            if trunk.objective == objective:
                every.setdefault(trunk.shape, set()).update(branch.budget for branch in trunk.branches)
        of_seeds = {shape: sorted(own) for shape, own in every.items() if not given or shape in given}
        of_seeds = of_seeds if seeds_at == "all" else cheap_points(of_seeds)
        for shape in sorted(of_seeds, key=lambda shape: shape.params_nonembedding):
            for seed in seeds:
                if new := [own for own in of_seeds[shape] if (objective, shape, own) not in points[seed]]:
                    trunks += _parts(plan, objective, shape, seed, new)
    of_shapes = f" for --shapes {shortened(' '.join(shapes))}" if shapes else ""
    present = [f"--flops {budget:g}" for budget in added if budget not in lacking]
    added_seeds = {trunk.seed for trunk in trunks} - set(everywhere)
    present += [f"--seeds {seed}" for seed in seeds if points[seed] and seed not in added_seeds]
    if present:
        raise UserError(f"plan: {present[0]} is in the sweep already{of_shapes}; leave it out")
    if not trunks:
        raise UserError(f"plan: the sweep has no run{of_shapes}, to which --seeds would add; add budgets by --flops")
    every_budget = {*plan.budgets, *(budget for own in of_each.values() for budget in own)}
    return replace(plan, budgets=tuple(sorted(every_budget)), trunks=(*plan.trunks, *trunks))


def _shape_of(plan: Plan, name: str) -> Shape:
    """The shape of a name: one of the plan, where the name is blocks x width as its table prints them, comes first."""
    own = {trunk.shape for trunk in plan.trunks if trunk.shape.depth_by_width == name}
    if len(own) > 1:
        names = listed(sorted(map(shape_name, own)))
        raise UserError(f"plan: --shapes {name} stands for {len(own)} shapes of the sweep; name one of {names}")
    return own.pop() if own else planned_shape(name)


def _points(plan: Plan, seed: int) -> set[tuple[str, Shape, float]]:
    """The objective, shape and budget of each result of a seed."""
    own = [trunk for trunk in plan.trunks if trunk.seed == seed]
    return {(trunk.objective, trunk.shape, branch.budget) for trunk in own for branch in trunk.branches}


def _trunk(plan: Plan, objective: str, shape: Shape, seed: int, budgets: Sequence[float]) -> Trunk:
    """A trunk of its own, with the rate, batch and warmup that its shape has in the plan."""
    known = next((own for own in plan.trunks if (own.objective, own.shape) == (objective, shape)), None)
    recipe = plan.recipe if known is None else plan.recipe.as_of(known)
    return plan_trunk(objective, shape, seed, budgets, plan.stream, recipe, plan.machine, plan.convention)


def _parts(plan: Plan, objective: str, shape: Shape, seed: int, budgets: Sequence[float]) -> list[Trunk]:
    """The runs of new budgets of one shape and seed: one for each fork from which some of them start."""
    new = _trunk(plan, objective, shape, seed, budgets)
    earlier = [own for own in plan.trunks if (own.objective, own.shape, own.seed) == (objective, shape, seed)]
    lengths = {branch.steps: branch.budget for own in earlier for branch in own.branches}
    for branch in new.branches:
        if branch.steps in lengths:
            raise UserError(
                f"plan: --flops {branch.budget:g} makes as many steps of {new.name} as {lengths[branch.steps]:g}, "
                "which the sweep has; space them further apart"
            )
    if plan.separate:
        return [new]
    starts: dict[int, list[Branch]] = {}
    for branch in new.branches:
        starts.setdefault(max(_forks(earlier, branch.fork_step), default=0), []).append(branch)
    return [_part(new, earlier, start, branches) for start, branches in starts.items()]


def _part(trunk: Trunk, earlier: Sequence[Trunk], start: int, branches: Sequence[Branch]) -> Trunk:
    before = [own for own in earlier if _forks([own], branches[0].fork_step)]
    continues = tuple(tuple(branch.budget for branch in own.branches) for own in before)
    return replace(trunk, branches=tuple(branches), start_step=start, continues=continues)


def _forks(trunks: Iterable[Trunk], before: int) -> list[int]:
    """The forks of some trunks below a step."""
    return [branch.fork_step for own in trunks for branch in own.branches if branch.fork_step < before]
