"""A tuning study: a grid of learning rates and batches at every budget, around what the rules give.

`llada curves --rules` fits a quadratic in (log rate, log batch) to the losses of each budget. It has six coefficients,
which three rates and three batches determine.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from llada_lightning.compute.flops import Convention
from llada_lightning.compute.hardware import Machine
from llada_lightning.compute.rules import significant
from llada_lightning.compute.shapes import Shape
from llada_lightning.objectives import get_objective
from llada_lightning.run import Stream
from llada_lightning.study.plan.comparison import no_common_loss
from llada_lightning.study.plan.trunk import Grid, Recipe, Trunk, check_positive, plan_trunk, shapes_at
from llada_lightning.support.errors import UserError

if TYPE_CHECKING:
    from llada_lightning.study.plan import Plan

RATES = (0.354, 0.707, 1.41, 2.83)
"""Four rates, each twice the one before, whose middle is 1."""

BATCHES = (0.5, 1.0, 2.0)

MIN_GRID = 3
"""A parabola has three coefficients; so has a law of two, with something left to judge it by."""


@dataclass(frozen=True)
class TuningGrid:
    """The grid of a tuning study.

    Args:
        rates: Factors on the learning rate that the rule and the objective's own factor give.
        batches: Factors on the batch that the rule gives.
    """

    rates: Sequence[float] = RATES
    batches: Sequence[float] = BATCHES

    def check(self) -> None:
        """Raises UserError where a factor makes no run, or is given twice."""
        for option, factors in {"tune-rates": self.rates, "tune-batches": self.batches}.items():
            for factor in factors:
                check_positive(option, factor)
            if not factors or len(set(factors)) < len(factors):
                given = " ".join(f"{factor:g}" for factor in factors)
                raise UserError(f"plan: --{option} {given}: give each factor once, and at least one")


def centre_scale(name: str, recipe: Recipe) -> float:
    """The factor on the rule's rate around which an objective is tuned: as it is given, or its own of the table.

    That of the table was measured with the rule `deepseek`.
    """
    by_its_own = recipe.lr is None and name not in recipe.fitted and recipe.lr_rule in ("deepseek", "lone")
    return recipe.lr_scale.get(name, get_objective(name).lr_scale if by_its_own else 1.0)


def tuning_trunks(
    objective: str,
    budgets: Sequence[float],
    seeds: Sequence[int],
    tuning: TuningGrid,
    grid: Grid,
    stream: Stream,
    recipe: Recipe,
    machine: Machine,
    convention: Convention,
) -> Iterator[Trunk]:
    """The runs of one objective at budgets that share them, each a trunk: by shape, batch, rate and seed.

    Several budgets share their runs where the shapes are given, so that they are the same at all of them.

    Raises:
        UserError: A run would be below one step, or warmup and decay do not fit.
    """

    def planned(shape: Shape, seed: int, how: Recipe) -> Trunk:
        return plan_trunk(objective, shape, seed, budgets, stream, how, machine, convention)

    for shape in shapes_at(budgets[0], objective, grid, stream, convention, least=1):
        centre = planned(shape, seeds[0], replace(recipe, lr_scale={objective: centre_scale(objective, recipe)}))
        quantum = machine.devices * (machine.micro_batch or 1)
        for batch in _batches(centre.global_batch // quantum, tuning.batches):
            for rate in sorted({significant(centre.lr * factor) for factor in tuning.rates}):
                how = replace(recipe, lr=rate, lr_scale={}, batch=batch * quantum)
                for seed in seeds:
                    yield replace(planned(shape, seed, how), suffix=f"-lr{rate:g}-b{how.batch}")


def _batches(centre: int, factors: Sequence[float]) -> list[int]:
    """Factors of a batch as whole numbers; where the least would be below 1, the whole grid moves up to begin there."""
    lift = max(1.0, 1 / (min(factors) * centre))
    return sorted({max(1, round(centre * factor * lift)) for factor in factors})


def tuning_notes(plan: Plan) -> Iterator[str]:
    """What a reader of a tuning plan should know, one line each."""
    for name in plan.objectives:
        own = [trunk for trunk in plan.trunks if trunk.objective == name]
        if len(plan.budgets_of(name)) < MIN_GRID:
            yield (
                f"{name} is tuned at {len(plan.budgets_of(name))} budget(s); a law needs {MIN_GRID}: `llada curves "
                "--rules` gives optima without a law, unless these runs extend a study"
            )
        for budget in plan.budgets_of(name):
            here = [trunk for trunk in own if any(branch.budget == budget for branch in trunk.branches)]
            rates, batches = {trunk.lr for trunk in here}, {trunk.global_batch for trunk in here}
            if len(rates) < MIN_GRID or len(batches) == MIN_GRID - 1:
                yield (
                    f"{name} at {budget:.3g} FLOPs has {len(rates)} rates and {len(batches)} batches; a quadratic "
                    f"needs {MIN_GRID} rates, and {MIN_GRID} batches or one, unless these runs extend a study"
                )
        yield from no_common_loss(plan, name)
