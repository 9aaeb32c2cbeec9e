"""From budgets to a table of runs: shapes, tokens, steps, hyperparameters, FLOPs by every count, memory and hours."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from llada_lightning.compute.flops import Convention, check_budgets
from llada_lightning.compute.hardware import Machine
from llada_lightning.compute.shapes import MAX_WIDTH, Shape, check_vocabulary, shape_name
from llada_lightning.objectives import OBJECTIVES, get_objective
from llada_lightning.run import MIN_STEPS, Stream
from llada_lightning.settings import check_seed
from llada_lightning.study.plan.grid import Grid, shapes_at
from llada_lightning.study.plan.trunk import Branch, Recipe, Trunk, plan_trunk
from llada_lightning.support.errors import UserError
from llada_lightning.support.printing import shortened

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Grid", "Machine", "Plan", "Recipe", "Stream", "plan_study"]

_GIB = 2**30


@dataclass(frozen=True)
class Plan:
    """A study before it is run: what :func:`plan_study` gives."""

    budgets: tuple[float, ...]
    objectives: tuple[str, ...]
    stream: Stream
    convention: Convention
    recipe: Recipe
    machine: Machine
    trunks: tuple[Trunk, ...]
    grid: Grid
    separate: bool

    def runs(self) -> list[tuple[Trunk, tuple[Branch, ...]]]:
        """The runs of ``llada fit``: a trunk with all its branches, or, if separate, with each of them alone."""
        if self.separate:
            return [(trunk, (branch,)) for trunk in self.trunks for branch in trunk.branches]
        return [(trunk, trunk.branches) for trunk in self.trunks]

    def executed(self, trunk: Trunk) -> int:
        """Steps that are computed for a trunk's budgets."""
        return trunk.separate_steps if self.separate else trunk.trunk_steps

    def table(self) -> pd.DataFrame:
        """One row for each objective, shape, budget and seed.

        FLOPs, hours and tokens are those of the result's own steps, as a separate run would need them; ``memory_gib``
        is of one device, ``epochs`` the passes over the data, ``trunk`` the run that serves the budget.
        """
        import pandas as pd  # takes half a second: `llada plan --help` needs none of it

        return pd.DataFrame([self._row(trunk, branch) for trunk in self.trunks for branch in trunk.branches])

    def _row(self, trunk: Trunk, branch: Branch) -> dict[str, Any]:
        shape, stream = trunk.shape, self.stream
        tokens = branch.steps * stream.tokens_per_step(trunk.global_batch)
        flops = trunk.per_step * branch.steps
        wall_hours = self._wall_hours(trunk, branch.steps)
        return {
            "objective": trunk.objective,
            "shape": shape_name(shape),
            "budget": branch.budget,
            "params_nonembedding": shape.params_nonembedding,
            "params_total": shape.params_total(stream.vocab_size),
            "tokens": tokens,
            "tokens_per_param": tokens / shape.params_nonembedding,
            "steps": branch.steps,
            "global_batch": trunk.global_batch,
            "global_batch_tokens": trunk.global_batch * stream.sequence_length,
            "accumulation": trunk.accumulation,
            "lr": trunk.lr,
            "warmup_steps": trunk.warmup_steps,
            "decay_steps": branch.decay_steps,
            "flops_6nd": flops.flops_6nd,
            "flops_attention": flops.flops_attention,
            "flops_head": flops.flops_head,
            "flops_total": flops.flops_total,
            "epochs": stream.epochs(branch.steps * trunk.global_batch),
            "memory_gib": trunk.memory / _GIB,
            "device_hours": None if wall_hours is None else wall_hours * self.machine.devices,
            "wall_hours": wall_hours,
            "seed": trunk.seed,
            "trunk": f"{trunk.name}-{branch.budget:g}" if self.separate else trunk.name,
        }

    def _wall_hours(self, trunk: Trunk, steps: int) -> float | None:
        flops = trunk.per_step * steps
        seconds = self.machine.seconds(trunk.objective, trunk.shape.params_nonembedding, flops.flops_total)
        return None if seconds is None else seconds / 3600

    def totals(self) -> dict[str, Any]:
        """Of the whole study: runs and results, FLOPs computed by each count, what trunks save, data, hours.

        ``saved_flops`` and ``saved_share`` compare with one run for each result, all three FLOP counts together;
        ``tokens_needed`` and ``epochs`` are of the run that needs most data; ``wall_hours`` is one run after another.
        """
        executed = [trunk.per_step * self.executed(trunk) for trunk in self.trunks]
        separate = math.fsum((trunk.per_step * trunk.separate_steps).flops_total for trunk in self.trunks)
        computed = math.fsum(flops.flops_total for flops in executed)
        longest = [(trunk.branches[-1].steps, trunk.global_batch) for trunk in self.trunks]
        passes = [self.stream.epochs(steps * batch) for steps, batch in longest]
        hours = [self._wall_hours(trunk, self.executed(trunk)) for trunk in self.trunks]
        wall_hours = None if None in hours else math.fsum(hour for hour in hours if hour is not None)
        return {
            "runs": len(self.runs()),
            "results": sum(len(trunk.branches) for trunk in self.trunks),
            "flops_6nd": math.fsum(flops.flops_6nd for flops in executed),
            "flops_attention": math.fsum(flops.flops_attention for flops in executed),
            "flops_head": math.fsum(flops.flops_head for flops in executed),
            "flops_total": computed,
            "saved_flops": separate - computed,
            "saved_share": 1 - computed / separate,
            "tokens_needed": max(steps * self.stream.tokens_per_step(batch) for steps, batch in longest),
            "tokens_present": self.stream.tokens_present,
            "epochs": max((count for count in passes if count is not None), default=None),
            "device_hours": None if wall_hours is None else wall_hours * self.machine.devices,
            "wall_hours": wall_hours,
        }

    def warnings(self) -> list[str]:
        """What a careful reader of the table would notice, one line each."""
        table = self.table()
        return [
            *self._few_steps(table),
            *self._tight_memory(),
            *self._measured_memory(),
            *self._repeated_data(table),
            *self._lost_centres(table),
        ]

    def _few_steps(self, table: pd.DataFrame) -> list[str]:
        few = table[table.steps < MIN_STEPS]
        if few.empty:
            return []
        return [
            f"{len(few)} results have fewer than {MIN_STEPS} steps (the fewest {few.steps.min()}); a smaller --batch, "
            "shorter sequences or larger budgets give more"
        ]

    def _tight_memory(self) -> list[str]:
        usable = self.machine.memory
        tight = [] if usable is None else [trunk for trunk in self.trunks if trunk.memory > usable]
        if not tight or usable is None:
            return []
        worst = max(tight, key=lambda trunk: trunk.memory)
        return [
            f"{len(tight)} trunks do not fit {self.machine.device}: {worst.name} needs {worst.memory / _GIB:.0f} GiB "
            f"of {usable / _GIB:.0f} usable; divide the states among more devices (--sharded)"
        ]

    def _measured_memory(self) -> list[str]:
        found = [rate.memory_ratio for rate in self.machine.measured or () if rate.memory_ratio is not None]
        if not found:
            return []
        ends = " to ".join(f"{ratio:.2f}" for ratio in dict.fromkeys((min(found), max(found))))
        return [f"the profiles' peak memory is {ends} x what this plan would have estimated for them"]

    def _repeated_data(self, table: pd.DataFrame) -> list[str]:
        found = []
        for name in self.objectives:
            most = get_objective(name).max_epochs
            repeated = table[(table.objective == name) & (table.epochs.astype(float) > (most or math.inf))]
            if not repeated.empty:
                found.append(
                    f"{len(repeated)} results of {name} read the data up to {repeated.epochs.max():.1f} times; beyond "
                    f"{most:.0f} times new data is worth more (Muennighoff et al. 2023)"
                )
        return found

    def _lost_centres(self, table: pd.DataFrame) -> list[str]:
        if self.grid.shapes or self.grid.tokens_per_param:
            return []
        found = []
        for objective, budget in itertools.product(self.objectives, self.budgets):
            ratios = table[(table.objective == objective) & (table.budget == budget)].tokens_per_param
            centre = self.grid.centre(objective)
            if not ratios.min() <= centre <= ratios.max():
                side = f"above {ratios.max():.3g}" if centre > ratios.max() else f"below {ratios.min():.3g}"
                found.append(
                    f"{budget:g} FLOPs of {objective}: the centre, {centre:g} tokens per parameter, lies {side}, "
                    "out of reach of the shapes that are proposed; so may the minimum"
                )
        return found

    def longest_wall_hours(self) -> float | None:
        """Of the longest single run."""
        hours = [
            self._wall_hours(trunk, branches[0].steps if self.separate else trunk.trunk_steps)
            for trunk, branches in self.runs()
        ]
        return None if None in hours else max(hour for hour in hours if hour is not None)


def plan_study(
    budgets: Iterable[float],
    stream: Stream,
    *,
    objectives: Sequence[str] | None = None,
    grid: Grid | None = None,
    recipe: Recipe | None = None,
    machine: Machine | None = None,
    convention: Convention = "6nd",
    seeds: Sequence[int] = (0,),
    separate: bool = False,
) -> Plan:
    """Plans a study: every shape of the grid at every budget, for every objective.

    Args:
        budgets: The training FLOPs of each budget, in any order.
        stream: The vocabulary, the sequence length, and the data if it is known.
        objectives: The names of the objectives; None: all of the table.
        grid: How shapes are chosen.
        recipe: How hyperparameters follow.
        machine: The machine that runs it, for memory and hours.
        convention: Which FLOPs a budget counts, and so which are equal between objectives.
        seeds: The seeds. There is a run for each of them.
        separate: Whether each budget is a run of its own instead of a branch, with the same rates, batches and warmups.

    Raises:
        UserError: names what does not fit: a budget below one step, fewer than three shapes, numbers out of range.
    """
    grid, recipe, machine = grid or Grid(), recipe or Recipe(), machine or Machine()
    objectives = list(OBJECTIVES) if objectives is None else objectives
    ordered = _checked_budgets(budgets)
    for what, values in {"objectives": objectives, "seeds": seeds}.items():
        if not values or len(set(values)) < len(values):
            raise UserError(f"plan: --{what} {shortened(' '.join(map(str, values)))}: give each once, and at least one")
    grid.check()
    recipe.check()
    machine.check(objectives)
    check_vocabulary("plan: --vocab-size", stream.vocab_size)
    if not 1 <= stream.sequence_length <= MAX_WIDTH:
        raise UserError(f"plan: --sequence-length {stream.sequence_length} must lie between 1 and {MAX_WIDTH}")
    for seed in seeds:
        check_seed("plan: --seeds", seed)
    stream.check()
    trunks = []
    for objective in objectives:
        served: dict[Shape, list[float]] = {}
        for budget in ordered:
            for shape in shapes_at(budget, objective, grid, stream, convention):
                served.setdefault(shape, []).append(budget)
        for shape in sorted(served, key=lambda shape: shape.params_nonembedding):
            for seed in seeds:
                trunks.append(plan_trunk(objective, shape, seed, served[shape], stream, recipe, machine, convention))
    return Plan(
        ordered, tuple(objectives), stream, convention, recipe, machine, tuple(trunks), grid=grid, separate=separate
    )


def _checked_budgets(budgets: Iterable[float]) -> tuple[float, ...]:
    ordered = sorted(budgets)
    if not ordered:
        raise UserError("plan: --flops holds no budget; give one, such as 1e18")
    check_budgets("plan: --flops", ordered)
    for budget in ordered:
        if not (math.isfinite(budget) and budget > 0):
            raise UserError(f"plan: --flops {budget:g} must be a number above 0")
    for lower, upper in pairwise(ordered):
        if lower == upper:
            raise UserError(f"plan: --flops {lower:g} is given twice; give each budget once")
    return tuple(ordered)
