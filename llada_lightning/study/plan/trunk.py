"""Which shapes a study trains at each budget, and the trunk that serves all budgets of one shape.

A *trunk* is one run at a constant rate that serves every budget of one (objective, shape, seed). Budget C_i of S_i
steps decays over the last D_i of them; its *branch* forks from the trunk at step S_i - D_i. So a trunk costs the steps
to its last fork and all decays, where separate runs would cost the sum of all S_i.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from statistics import geometric_mean
from typing import Literal

from llada_lightning.compute.flops import MAX_BATCH, MAX_STEPS, Convention, TrainingFlops, flops_6nd
from llada_lightning.compute.hardware import Machine
from llada_lightning.compute.rules import DECAY_FRACTION, Rules, Size, significant
from llada_lightning.compute.schedule import WSD, ScheduleError
from llada_lightning.compute.shapes import (
    Shape,
    get_shape,
    named_shapes,
    proposable_shapes,
    propose_shape,
    shape_name,
    swiglu_width,
)  # fmt: skip
from llada_lightning.objectives import get_objective
from llada_lightning.run import Length, Spec, Stream, resolve
from llada_lightning.study.rule_file import FittedRules
from llada_lightning.support.errors import UserError

GRID_STEP = math.sqrt(3)
GRID_ANCHOR = 85e6
"""The grid of sizes, 85M times powers of sqrt(3): a step is a factor of 3 in tokens per parameter at equal 6ND. One
grid for all budgets, objectives and plans, so that shapes come back and a trunk can serve several budgets."""

MIN_SHAPES = 3
"""A parabola has three coefficients."""


def check_positive(option: str, value: float) -> None:
    """Raises UserError unless the value of an option is a finite number above 0."""
    if not (math.isfinite(value) and value > 0):
        raise UserError(f"plan: --{option} {value:g} must be a number above 0")


# --- shapes ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Grid:
    """How shapes are chosen: by default ``points`` sizes around each objective's centre.

    Args:
        points: The number of shapes at each budget.
        centres: The tokens per non-embedding parameter at the centre; by default as in the table of objectives.
        shapes: The names of exactly these shapes, at every budget.
        tokens_per_param: Exactly these ratios, at every budget and for all objectives.
    """

    points: int = 5
    centres: Mapping[str, float] = field(default_factory=dict)
    shapes: Sequence[str | Shape] = ()
    tokens_per_param: Sequence[float] = ()

    def centre(self, objective: str) -> float:
        """The tokens per non-embedding parameter at the centre of an objective."""
        return self.centres.get(objective, get_objective(objective).tokens_per_param)

    def check(self, least: int = MIN_SHAPES) -> None:
        """Raises UserError where a setting makes no grid, of fewer shapes than ``least`` at a budget."""
        if self.shapes and self.tokens_per_param:
            raise UserError("plan: --shapes and --tokens-per-param are both given; give one of them")
        for ratio in self.tokens_per_param:
            check_positive("tokens-per-param", ratio)
        for objective, centre in self.centres.items():
            check_positive(f"centre-{objective}", centre)
        for shape in self.shapes:
            planned_shape(shape)
        if self.points < least:
            needs = f"{least}, which a parabola needs" if least == MIN_SHAPES else f"{least}"
            raise UserError(f"plan: --points {self.points} is below {needs}")


@cache
def grid_shapes() -> tuple[Shape, ...]:
    """The shapes nearest to the sizes of the grid, by rising N, each once."""
    shapes = proposable_shapes()
    least, most = (math.log(end.params_nonembedding / GRID_ANCHOR, GRID_STEP) for end in (shapes[0], shapes[-1]))
    sizes = [GRID_ANCHOR * GRID_STEP**power for power in range(math.ceil(least), math.floor(most) + 1)]
    return tuple(dict.fromkeys(propose_shape(size) for size in sizes))


_DEPTH_WIDTH = re.compile(r"(\d{1,6})x(\d{1,6})", re.ASCII)
"""A shape as the tables print it: blocks x width."""


def planned_shape(name: str | Shape) -> Shape:
    """A shape as it is, or that of a name, of dimensions, or of blocks and width as the tables print them (`4x128`).

    Raises:
        UserError: The name is unknown, or blocks and width are those of no shape that a plan chooses, or of several.
    """
    printed = _DEPTH_WIDTH.fullmatch(name) if isinstance(name, str) else None
    if printed is None:
        return get_shape(name)
    n_layers, width = map(int, printed.groups())
    known = dict.fromkeys([*grid_shapes(), *named_shapes().values()])
    found = [shape for shape in known if (shape.n_layers, shape.d_model) == (n_layers, width)]
    if len(found) == 1:
        return found[0]
    if found:
        whole = f"stands for {len(found)} shapes; name one of {', '.join(map(shape_name, found))}"
    else:
        heads = width // 64 if width and width % 64 == 0 else 1
        own = f"L{n_layers}-d{width}-h{heads}-kv{heads}-ff{swiglu_width(width, 16)}"
        example = own if n_layers and width and width % 2 == 0 else "L2-d64-h2-kv2-ff192"
        whole = f"is no shape that the planner chooses itself; give all dimensions, such as {example}"
    raise UserError(f"plan: --shapes {name} {whole}")


def shapes_at(
    budget: float, objective: str, grid: Grid, stream: Stream, convention: Convention, least: int = MIN_SHAPES
) -> tuple[Shape, ...]:
    """The shapes that are trained with one budget, by rising N.

    Raises:
        UserError: There are fewer different ones than ``least``.
    """

    def distance(ratio: float) -> Callable[[Shape], float]:
        def of(shape: Shape) -> float:
            tokens = budget / stream.flops_per_token(shape, get_objective(objective)).by(convention)
            return abs(math.log(tokens / shape.params_nonembedding / ratio))

        return of

    if grid.shapes:
        chosen = [planned_shape(shape) for shape in grid.shapes]
    elif grid.tokens_per_param:
        chosen = [min(proposable_shapes(), key=distance(ratio)) for ratio in grid.tokens_per_param]
    else:
        chosen = sorted(grid_shapes(), key=distance(grid.centre(objective)))[: grid.points]
    different = sorted(set(chosen), key=lambda shape: shape.params_nonembedding)
    if len(different) < least:
        names = ", ".join(shape_name(shape) for shape in different)
        raise UserError(
            f"plan: {budget:g} FLOPs have {len(different)} shape(s) of {objective} ({names}), and a parabola needs "
            f"{MIN_SHAPES}; give more shapes, or other ratios or budgets"
        )
    return tuple(different)


NOISE_POINTS = 3
"""At so many budgets of an objective further seeds tell the noise and how it changes, if they are not everywhere."""

SeedsAt = Literal["cheap", "all"]
"""Where seeds after the first are run: at ``cheap_points``, or wherever the first one is."""


def cheap_points(served: Mapping[Shape, Sequence[float]]) -> dict[Shape, list[float]]:
    """The middle shape of each of an objective's smallest budgets, with these budgets.

    ``served`` are the budgets of each shape.
    """
    budgets = sorted({budget for own in served.values() for budget in own})[:NOISE_POINTS]
    found: dict[Shape, list[float]] = {}
    for budget in budgets:
        shapes = sorted(
            (shape for shape, own in served.items() if budget in own), key=lambda own: own.params_nonembedding
        )
        found.setdefault(shapes[len(shapes) // 2], []).append(budget)
    return found


# --- trunks ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """How learning rate, batch, warmup and decay follow from size and budget; a number replaces its rule.

    Args:
        lr_rule: The name of a learning rate rule of ``compute.rules``.
        batch_rule: The name of a batch rule of ``compute.rules``.
        lr: The peak learning rate of all runs.
        lr_scale: A factor on the rate for each objective: the rules were fitted to autoregressive models.
        batch: The global batch of all runs, in sequences.
        warmup_steps: The warmup steps of all runs.
        decay_fraction: The share of the steps of a run over which the rate falls.
        fitted: Rules that a tuning study has measured, by objective, in place of the named ones.
    """

    lr_rule: str = "deepseek"
    batch_rule: str = "deepseek"
    lr: float | None = None
    lr_scale: Mapping[str, float] = field(default_factory=dict)
    batch: int | None = None
    warmup_steps: int | None = None
    decay_fraction: float = DECAY_FRACTION
    fitted: Mapping[str, FittedRules] = field(default_factory=dict)

    @property
    def rules(self) -> Rules:
        return Rules(lr=self.lr_rule, batch=self.batch_rule)

    def as_of(self, trunk: Trunk) -> Recipe:
        """The recipe that gives other runs of a trunk's shape its rate, batch and warmup."""
        settings = {"lr": trunk.lr, "batch": trunk.global_batch, "warmup_steps": trunk.warmup_steps}
        return replace(self, lr_scale={trunk.objective: 1.0}, **settings)  # type: ignore[arg-type]

    def check(self) -> None:
        """Raises UserError where a number makes no run."""
        self.rules.check("plan: --rules")
        if self.lr is not None:
            check_positive("lr", self.lr)
        for objective, scale in self.lr_scale.items():
            check_positive(f"lr-scale-{objective}", scale)
        ranges = {"batch": (self.batch, 1, MAX_BATCH), "warmup-steps": (self.warmup_steps, 0, MAX_STEPS)}
        for option, (count, least, most) in ranges.items():
            if count is not None and not least <= count <= most:
                raise UserError(f"plan: --{option} {count} must lie between {least} and {most}")
        if not 0 <= self.decay_fraction < 1:
            raise UserError(f"plan: --decay-fraction {self.decay_fraction:g} must be at least 0 and below 1")


@dataclass(frozen=True)
class Branch:
    """One budget of a trunk: the result that a separate run of this length would have.

    Args:
        flops: The expected training FLOPs of that run.
    """

    budget: float
    steps: int
    decay_steps: int
    flops: TrainingFlops

    @property
    def fork_step(self) -> int:
        """The trunk's step from which it decays."""
        return self.steps - self.decay_steps


@dataclass(frozen=True)
class Trunk:
    """All budgets of one objective, shape and seed, with the settings that they share.

    Args:
        per_step: The expected training FLOPs of one step, a mean over the steps of the largest budget.
        accumulation: The number of micro-batches of a step on one device.
        memory: The peak memory of one device, in bytes.
        branches: The branches by rising budget.
        start_step: The step of the fork, of a run that was planned before, from which it starts; 0: from the beginning.
        continues: The budgets of each run of the same objective, shape and seed that may have that fork.
        suffix: What is appended to the name, where several trunks have one objective, shape and seed.
    """

    objective: str
    shape: Shape
    seed: int
    lr: float
    global_batch: int
    warmup_steps: int
    per_step: TrainingFlops
    accumulation: int
    memory: float
    branches: tuple[Branch, ...]
    start_step: int = 0
    continues: tuple[tuple[float, ...], ...] = ()
    suffix: str = ""

    @property
    def name(self) -> str:
        return f"{self.objective}-{shape_name(self.shape)}-s{self.seed}{self.suffix}"

    @property
    def size(self) -> Size:
        """The size by which its rules go: that of the geometric mean of its budgets."""
        params = self.shape.params_nonembedding
        flops = geometric_mean([branch.steps for branch in self.branches]) * self.per_step.flops_6nd
        return Size(params, flops / flops_6nd(params, 1), flops)

    @property
    def separate_steps(self) -> int:
        """Steps of one run for each budget."""
        return sum(branch.steps for branch in self.branches)

    @property
    def trunk_steps(self) -> int:
        """Steps from its start to the last fork, and all decays."""
        return self.branches[-1].fork_step - self.start_step + sum(branch.decay_steps for branch in self.branches)


def plan_trunk(
    objective: str,
    shape: Shape,
    seed: int,
    budgets: Sequence[float],
    stream: Stream,
    recipe: Recipe,
    machine: Machine,
    convention: Convention,
) -> Trunk:
    """The trunk of these budgets, which rise; its rules are evaluated at their geometric mean.

    Raises:
        UserError: A budget is below one step, two budgets make the same steps, or warmup and decay do not fit.
    """
    scale, fitted = recipe.lr_scale.get(objective, 1.0), recipe.fitted.get(objective)
    spec = Spec(
        objective=get_objective(objective),
        shape=shape,
        stream=stream,
        length=Length(flops=tuple(budgets), convention=convention, setting="plan: --flops"),
        global_batch=recipe.batch,
        schedule=WSD(
            lr=None if recipe.lr is None else significant(recipe.lr * scale),
            warmup_steps=recipe.warmup_steps,
            decay_fraction=recipe.decay_fraction,
        ),
        rules=recipe.rules,
        lr_scale=scale,
        batch_quantum=machine.devices * (machine.micro_batch or 1),
        lr_rule=None if fitted is None else fitted.lr,
        batch_rule=None if fitted is None else fitted.batch,
    )
    try:
        run = resolve(spec)
    except ScheduleError as error:
        problem = str(error).partition(": ")[2]
        raise UserError(f"plan: {spec.who}: {problem} by --warmup-steps or --decay-fraction") from error
    first = run.schedules[0]
    assert first.lr is not None and first.warmup_steps is not None
    accumulation = machine.accumulation(shape, stream.vocab_size, stream.sequence_length, run.global_batch)
    micro_batch = run.global_batch // machine.devices // accumulation
    return Trunk(
        objective=objective,
        shape=shape,
        seed=seed,
        lr=first.lr,
        global_batch=run.global_batch,
        warmup_steps=first.warmup_steps,
        per_step=run.per_step,
        accumulation=accumulation,
        memory=machine.memory_of(shape, stream.vocab_size, stream.sequence_length, micro_batch),
        branches=tuple(
            Branch(budget, steps, schedule.decay_steps or 0, run.per_step_until(steps) * steps)
            for budget, steps, schedule in zip(budgets, run.steps, run.schedules, strict=True)
        ),
    )
