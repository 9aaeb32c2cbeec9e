"""A plan's table for people, at most 100 columns wide, and what our own studies say of such a plan."""

from __future__ import annotations

import math
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from llada_lightning.compute.flops import Convention
from llada_lightning.compute.shapes import format_count, get_shape
from llada_lightning.study.plan.files import describe_totals
from llada_lightning.study.plan.plan import Plan

WIDTH = 100

TUNED_RATE = 0.3
"""The factor of the rule's learning rate that both studies of docs/study.md took for ``llada``."""

MULTIPLIERS: dict[Convention, list[tuple[float, float, str]]] = {
    "6nd": [
        (5e13, 38, "docs/study.md, H100, 6ND, at 5e13 FLOPs of llada"),
        (6e19, 20, "the published table, 6ND, at 6e19 FLOPs of llada"),
    ],
    "total": [(1.4e14, 20, "docs/study.md, H100, 6ND + attention + head, at 1.4e14 FLOPs of llada")],
}
"""Measured compute multipliers: FLOPs of ``llada``, multiplier, where it was read off. Each is its study's least."""


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
    """What our own studies found that bears on a plan, one line each: ``llada``'s rate, and losses in common."""
    return [*_rate(plan), *_common_loss(plan)]


def _rate(plan: Plan) -> list[str]:
    recipe = plan.recipe
    scaled = recipe.lr_scale.get("llada", 1.0) != 1.0
    if "llada" not in plan.objectives or recipe.lr is not None or recipe.lr_rule != "deepseek" or scaled:
        return []
    return [
        "llada's best learning rate was about 0.3 times the rule's in both of our studies (0.31 on the H100, "
        f"0.25 to 0.5 on two cores; docs/study.md): --lr-scale-llada {TUNED_RATE}"
    ]


def _common_loss(plan: Plan) -> list[str]:
    if set(plan.objectives) != {"arm", "llada"}:
        return []
    least, most = plan.budgets[0], plan.budgets[-1]
    _, multiplier, source = min(MULTIPLIERS[plan.convention], key=lambda own: abs(math.log(own[0] / most)))
    missing = multiplier * least / most
    if missing <= 1:
        return []
    return [
        f"these budgets may share no loss: they span a factor of {most / least:.3g}, and llada needs about "
        f"{multiplier:g} times arm's FLOPs for arm's loss ({source}). A factor of {missing:.2g} is missing: plan arm "
        f"from {least / missing:.2g} or llada up to {most * missing:.2g} FLOPs (--objectives)"
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
