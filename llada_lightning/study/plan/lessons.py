"""A plan's table for people, at most 100 columns wide, and what our own studies say of such a plan."""

from __future__ import annotations

import math
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from llada_lightning.compute.shapes import format_count, get_shape
from llada_lightning.objectives import REFERENCE, Objective, get_objective
from llada_lightning.study.plan.outputs import describe_totals
from llada_lightning.study.plan.plan import Plan

WIDTH = 100


def print_plan(plan: Plan, console: Console) -> None:
    """The runs by objective and budget, then totals and warnings; of several seeds the first is shown."""
    console.width = WIDTH  # a narrower terminal wraps; cut figures would say nothing
    console.print(plan_table(plan))
    if len(seeds := list(dict.fromkeys(trunk.seed for trunk in plan.trunks))) > 1:
        console.print(f"each of these with the seeds {', '.join(map(str, seeds))}", soft_wrap=True)
    for line in describe_totals(plan):
        console.print(line, soft_wrap=True, markup=False, highlight=False)
    for line in [*plan.warnings(), *lessons(plan)]:
        console.print(f"note: {line}", soft_wrap=True, markup=False, highlight=False)


def lessons(plan: Plan) -> list[str]:
    """What our own studies found that bears on a plan, one line each: tuned learning rates, and losses in common."""
    objectives = [get_objective(name) for name in plan.objectives]
    return [line for objective in objectives for line in (*_rate(plan, objective), *_common_loss(plan, objective))]


def _rate(plan: Plan, objective: Objective) -> list[str]:
    recipe, name, tuned = plan.recipe, objective.name, objective.lr_scale
    scaled = recipe.lr_scale.get(name, 1.0) != 1.0
    if tuned == 1.0 or recipe.lr is not None or recipe.lr_rule != "deepseek" or scaled:
        return []
    return [
        f"{name}'s best learning rate was about {tuned:g} times the rule's {objective.lr_scale_source}: "
        f"--lr-scale-{name} {tuned:g}"
    ]


def _common_loss(plan: Plan, objective: Objective) -> list[str]:
    measured = objective.multipliers.get(plan.convention, ())
    if not measured or REFERENCE not in plan.objectives:
        return []
    name, least, most = objective.name, plan.budgets[0], plan.budgets[-1]
    _, multiplier, source = min(measured, key=lambda own: abs(math.log(own[0] / most)))
    missing = multiplier * least / most
    if missing <= 1:
        return []
    return [
        f"these budgets may share no loss: they span a factor of {most / least:.3g}, and {name} needs about "
        f"{multiplier:g} times {REFERENCE}'s FLOPs for {REFERENCE}'s loss ({source}). A factor of {missing:.2g} is "
        f"missing: plan {REFERENCE} from {least / missing:.2g} or {name} up to {most * missing:.2g} FLOPs "
        "(--objectives)"
    ]


def plan_table(plan: Plan) -> Table:
    """The plan of its first seed. Runs have numbers: rows with the same one are served by one trunk."""
    table = Table(box=SIMPLE_HEAD, padding=0, pad_edge=False)
    for name, side in {
        "N": "right", "shape": "left", "tokens": "right", "per N": "right", "steps": "right", "batch": "right",
        "lr": "right", "warmup": "right", "decay": "right", "total": "right", "epochs": "right", "GiB": "right",
        "hours": "right", "run": "right",
    }.items():  # fmt: skip
        table.add_column(name, justify=side, no_wrap=True)  # type: ignore[arg-type]
    rows = plan.table()
    rows = rows[rows.seed == rows.seed.iloc[0]]
    numbers = {name: number for number, name in enumerate(dict.fromkeys(rows.trunk), start=1)}
    for (objective, budget), group in rows.groupby(["objective", "budget"], sort=False):
        table.add_section()
        table.add_row(str(objective), f"{budget:.3g} FLOPs", style="bold")
        for row in group.to_dict("records"):
            table.add_row(*_cells(row), str(numbers[row["trunk"]]))
    return table


def _cells(row: dict[str, Any]) -> list[str]:
    shape = get_shape(row["shape"])
    return [
        format_count(row["params_nonembedding"]),
        f"{shape.n_layers}x{shape.d_model}",
        format_count(row["tokens"]),
        _ratio(row["tokens_per_param"]),
        str(row["steps"]),
        str(row["global_batch"]),
        f"{row['lr']:.1e}",
        str(row["warmup_steps"]),
        str(row["decay_steps"]),
        f"{row['flops_total']:.1e}",
        _number(row["epochs"], ".2g"),
        f"{row['memory_gib']:.1f}",
        _number(row["wall_hours"], ".3g"),
    ]


def _ratio(value: float) -> str:
    return f"{value:.3g}" if value < 999.5 else f"{value:.0f}"


def _number(value: float | None, form: str) -> str:
    return "n/a" if value is None or math.isnan(value) else format(value, form)
