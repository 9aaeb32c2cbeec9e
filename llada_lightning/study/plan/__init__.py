"""From budgets to a table of runs: shapes, tokens, steps, hyperparameters, FLOPs by every count, memory and hours."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llada_lightning.compute.flops import Convention, TrainingFlops, check_budgets
from llada_lightning.compute.hardware import Machine
from llada_lightning.compute.shapes import MAX_WIDTH, Shape, check_vocabulary, shape_name
from llada_lightning.objectives import COMPARED, get_objective
from llada_lightning.run import MIN_STEPS, Stream
from llada_lightning.settings import check_seed
from llada_lightning.study.plan.comparison import budgets_of, comparison_notes, naming_what_was_lowered, overlap_factor
from llada_lightning.study.plan.trunk import (
    MIN_SHAPES,
    Branch,
    Grid,
    Recipe,
    SeedsAt,
    Trunk,
    cheap_points,
    check_positive,
    plan_trunk,
    shapes_at,
)
from llada_lightning.study.plan.tuning import TuningGrid, tuning_notes, tuning_trunks
from llada_lightning.support.errors import UserError
from llada_lightning.support.printing import shortened

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Grid", "Machine", "Plan", "Recipe", "Stream", "TuningGrid", "plan_study"]

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
    multiplier: float | None = None
    tuning: TuningGrid | None = None
    lowered_by: float = 1.0

    def budgets_of(self, objective: str) -> tuple[float, ...]:
        """The budgets of one objective, ascending."""
        own = {branch.budget for trunk in self.trunks if trunk.objective == objective for branch in trunk.branches}
        return tuple(sorted(own))

    def runs(self) -> list[tuple[Trunk, tuple[Branch, ...]]]:
        """The runs of ``llada fit``: a trunk with all its branches, or, if separate, with each of them alone."""
        if self.separate:
            return [(trunk, (branch,)) for trunk in self.trunks for branch in trunk.branches]
        return [(trunk, trunk.branches) for trunk in self.trunks]

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
            **{name: count for name, count in _counted([branch.flops]).items() if name != "flops_copy"},
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
        """The totals of the study: runs and results, FLOPs computed by each count, what trunks save, data, hours.

        ``saved_flops`` and ``saved_share`` compare with one run for each result, all three FLOP counts together;
        ``tokens_needed`` and ``epochs`` are of the run that needs most data, ``by_objective`` the same of each
        objective; ``wall_hours`` is one run after another.
        """
        executed = [trunk.separate_steps if self.separate else trunk.trunk_steps for trunk in self.trunks]
        counted = _counted([trunk.per_step * steps for trunk, steps in zip(self.trunks, executed, strict=True)])
        separate = math.fsum((trunk.per_step * trunk.separate_steps).flops_total for trunk in self.trunks)
        hours = [self._wall_hours(trunk, steps) for trunk, steps in zip(self.trunks, executed, strict=True)]
        wall_hours = None if None in hours else math.fsum(hour for hour in hours if hour is not None)
        return {
            "runs": len(self.runs()),
            "results": sum(len(trunk.branches) for trunk in self.trunks),
            **counted,
            "saved_flops": separate - counted["flops_total"],
            "saved_share": 1 - counted["flops_total"] / separate,
            **self._data_needed(self.objectives),
            "tokens_present": self.stream.tokens_present,
            "by_objective": {name: self._data_needed([name]) for name in self.objectives},
            "device_hours": None if wall_hours is None else wall_hours * self.machine.devices,
            "wall_hours": wall_hours,
        }

    def _data_needed(self, objectives: Sequence[str]) -> dict[str, float | None]:
        """The tokens and the epochs of that run of some objectives that needs most data."""
        longest = [
            trunk.branches[-1].steps * trunk.global_batch for trunk in self.trunks if trunk.objective in objectives
        ]
        return {"tokens_needed": self.stream.tokens_per_step(max(longest)), "epochs": self.stream.epochs(max(longest))}

    def longest_wall_hours(self) -> float | None:
        """The wall hours of the longest single run; None where nothing tells the speed."""
        hours = [
            self._wall_hours(trunk, branches[0].steps if self.separate else trunk.trunk_steps)
            for trunk, branches in self.runs()
        ]
        return None if None in hours else max(hour for hour in hours if hour is not None)

    # --- warnings ---

    def warnings(self) -> list[str]:
        """What a careful reader of the table would notice, and what our own studies found, one line each."""
        table = self.table()
        return [
            *self._few_steps(table),
            *self._memory(),
            *self._repeated_data(table),
            *(self._lost_centres(table) if self.tuning is None else ()),
            *(comparison_notes(self) if self.tuning is None else tuning_notes(self)),
        ]

    def _few_steps(self, table: pd.DataFrame) -> list[str]:
        few = table[table.steps < MIN_STEPS]
        if few.empty:
            return []
        smaller = "" if few.global_batch.max() == 1 else "a smaller --batch, "
        return [
            f"{len(few)} results have fewer than {MIN_STEPS} steps (the fewest {few.steps.min()}); {smaller}"
            "shorter sequences or larger budgets give more"
        ]

    def _memory(self) -> list[str]:
        found, usable = [], self.machine.memory
        tight = [trunk for trunk in self.trunks if usable is not None and trunk.memory > usable]
        if tight and usable is not None:
            worst = max(tight, key=lambda trunk: trunk.memory)
            found.append(
                f"{len(tight)} trunks do not fit {self.machine.device}: {worst.name} needs "
                f"{worst.memory / _GIB:.0f} GiB of {usable / _GIB:.0f} usable; divide the states among more devices "
                "(--sharded)"
            )
        ratios = [rate.memory_ratio for rate in self.machine.measured or () if rate.memory_ratio is not None]
        if ratios:
            ends = " to ".join(f"{ratio:.2f}" for ratio in dict.fromkeys((min(ratios), max(ratios))))
            found.append(f"the profiles' peak memory is {ends} x what this plan would have estimated for them")
        return found

    def _repeated_data(self, table: pd.DataFrame) -> list[str]:
        found = []
        for name in self.objectives:
            most = get_objective(name).max_epochs
            repeated = table[(table.objective == name) & (table.epochs.astype(float) > (most or 1.0))]
            if not repeated.empty:
                worth = (
                    f"beyond {most:.0f} times new data is worth more (Muennighoff et al. 2023)"
                    if most
                    else f"up to how often repeated data is as good as new for {name} is not known"
                )
                found.append(
                    f"{len(repeated)} results of {name} read the data up to {repeated.epochs.max():.1f} times; {worth}"
                )
        return found

    def _lost_centres(self, table: pd.DataFrame) -> list[str]:
        if self.grid.shapes or self.grid.tokens_per_param:
            return []
        smaller: list[str] = []
        larger: list[str] = []
        for name in self.objectives:
            centre, ratios = self.grid.centre(name), table[table.objective == name].groupby("budget").tokens_per_param
            least, most = ratios.min(), ratios.max()
            for found, which, beyond in (
                (smaller, "most", most[most < centre]),
                (larger, "least", least[least > centre]),
            ):
                if not beyond.empty:
                    ends = " to ".join(dict.fromkeys(f"{budget:g}" for budget in (beyond.index[0], beyond.index[-1])))
                    nearest = min(beyond, key=lambda ratio: abs(math.log(ratio / centre)))
                    found.append(
                        f"{name} at {ends} FLOPs (at {which} {nearest:.3g} tokens per parameter, best expected at "
                        f"{centre:g})"
                    )
        return [
            f"the best shape may be {than} than all that are proposed: {', '.join(found)}; plan {budgets} budgets, or "
            f"give {than} --shapes"
            for than, budgets, found in (("smaller", "larger", smaller), ("larger", "smaller", larger))
            if found
        ]


def _counted(flops: Sequence[TrainingFlops]) -> dict[str, float]:
    """The sum of training FLOPs by each count."""
    counts = ("flops_6nd", "flops_attention", "flops_head", "flops_copy", "flops_total")
    return {count: math.fsum(getattr(own, count) for own in flops) for count in counts}


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
    seeds_at: SeedsAt = "cheap",
    separate: bool = False,
    overlap: bool = False,
    multiplier: float | None = None,
    tuning: TuningGrid | None = None,
) -> Plan:
    """Plans a study: every shape of the grid at every budget, for every objective.

    Args:
        budgets: The training FLOPs of each budget, in any order.
        stream: The vocabulary, the sequence length, and the data if it is known.
        objectives: The names of the objectives; None: `arm` and `llada`.
        grid: How shapes are chosen.
        recipe: How hyperparameters follow.
        machine: The machine that runs it, for memory and hours.
        convention: Which FLOPs a budget counts, and so which are equal between objectives.
        seeds: The seeds. The first one is run everywhere.
        seeds_at: Where the others are run: at the middle shape of each objective's three smallest budgets, or
            everywhere. Of a tuning study they are run everywhere.
        separate: Whether each budget is a run of its own instead of a branch, with the same rates, batches and warmups.
            A tuning study has branches only where rate, batch and shapes are numbers, the same at all budgets.
        overlap: Whether the reference's budgets are lowered to where it has the losses of the other objectives.
        multiplier: The FLOPs of the other objectives over the reference's at equal loss; None: as measured.
        tuning: A grid of rates and batches, instead of one rate and batch for each shape.

    Raises:
        UserError: A budget is below one step, a grid has fewer than three shapes, or a number is out of range.
    """
    grid, recipe, machine = grid or Grid(), recipe or Recipe(), machine or Machine()
    objectives = COMPARED if objectives is None else objectives
    ordered = checked_budgets(budgets)
    for what, values in {"objectives": objectives, "seeds": seeds}.items():
        if not values or len(set(values)) < len(values):
            raise UserError(f"plan: --{what} {shortened(' '.join(map(str, values)))}: give each once, and at least one")
    grid.check(MIN_SHAPES if tuning is None else 1)
    recipe.check()
    machine.check(objectives)
    check_vocabulary("plan: --vocab-size", stream.vocab_size)
    if not 1 <= stream.sequence_length <= MAX_WIDTH:
        raise UserError(f"plan: --sequence-length {stream.sequence_length} must lie between 1 and {MAX_WIDTH}")
    for seed in seeds:
        check_seed("plan: --seeds", seed)
    stream.check()
    if multiplier is not None:
        check_positive("multiplier", multiplier)
    if tuning is not None:
        tuning.check()
    lowered_by = overlap_factor(ordered, objectives, convention, multiplier) if overlap else 1.0
    by_objective = {name: budgets_of(name, ordered, lowered_by) for name in objectives}
    fixed = recipe.lr is not None and recipe.batch is not None and bool(grid.shapes)
    separate = separate or (tuning is not None and not fixed)
    trunks: list[Trunk] = []
    for objective in objectives:
        with naming_what_was_lowered(objective, lowered_by):
            if tuning is not None:
                own_budgets = by_objective[objective]
                for shared in [[budget] for budget in own_budgets] if separate else [own_budgets]:
                    trunks += tuning_trunks(objective, shared, seeds, tuning, grid, stream, recipe, machine, convention)
                continue
            served: dict[Shape, list[float]] = {}
            for budget in by_objective[objective]:
                for shape in shapes_at(budget, objective, grid, stream, convention):
                    served.setdefault(shape, []).append(budget)
            cheap = cheap_points(served)
            for shape in sorted(served, key=lambda shape: shape.params_nonembedding):
                trunk = plan_trunk(objective, shape, seeds[0], served[shape], stream, recipe, machine, convention)
                own = recipe.as_of(trunk)
                trunks.append(trunk)
                for seed in seeds[1:]:
                    repeated = served[shape] if seeds_at == "all" else cheap.get(shape, [])
                    if repeated:
                        trunks.append(plan_trunk(objective, shape, seed, repeated, stream, own, machine, convention))
    return Plan(
        budgets=tuple(sorted({budget for own in by_objective.values() for budget in own})),
        objectives=tuple(objectives),
        stream=stream,
        convention=convention,
        recipe=recipe,
        machine=machine,
        trunks=tuple(trunks),
        grid=grid,
        separate=separate,
        multiplier=multiplier,
        tuning=tuning,
        lowered_by=lowered_by,
    )


def checked_budgets(budgets: Iterable[float]) -> tuple[float, ...]:
    """The budgets of ``--flops`` by rising FLOPs.

    Raises:
        UserError: There is none, one is given twice, or one is no number of FLOPs.
    """
    ordered = sorted(budgets)
    if not ordered:
        raise UserError("plan: --flops holds no budget; give one, such as 1e18")
    check_budgets("plan: --flops", ordered)
    for budget in ordered:
        check_positive("flops", budget)
    for lower, upper in itertools.pairwise(ordered):
        if lower == upper:
            raise UserError(f"plan: --flops {lower:g} is given twice; give each budget once")
    return tuple(ordered)
