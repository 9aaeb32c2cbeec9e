"""Trunks: what each (objective, shape, seed) of a plan is trained with, and how its budgets share one run.

A *trunk* is one run at a constant rate that serves every budget of one (objective, shape, seed). Budget C_i of S_i
steps decays over the last D_i of them; its *branch* forks from the trunk at step S_i - D_i. So a trunk costs the steps
to its last fork and all decays, where separate runs would cost the sum of all S_i.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from llada_lightning.compute.flops import MAX_BATCH, MAX_STEPS, Convention, Objective, TrainingFlops, steps_for_budget
from llada_lightning.compute.hardware import Machine
from llada_lightning.compute.rules import (
    DECAY_FRACTION,
    BatchRule,
    LearningRateRule,
    batch_tokens,
    learning_rate,
    warmup_steps,
)
from llada_lightning.compute.shapes import Shape, shape_name
from llada_lightning.run import Stream
from llada_lightning.support.errors import UserError

MIN_STEPS = 50
"""A rule's batch is halved until the smallest budget has so many steps, as far as halving goes."""


@dataclass(frozen=True)
class Recipe:
    """How learning rate, batch, warmup and decay follow from size and budget; a number replaces its rule.

    Args:
        lr_rule, batch_rule: names of ``compute.rules``.
        lr: peak learning rate of all runs.
        lr_scale: of each objective, times the rule's or the given rate: the rules were fitted to autoregressive models.
        batch: global batch of all runs, in sequences.
        warmup_steps: of all runs.
        decay_fraction: share of a run's steps over which the rate falls.
    """

    lr_rule: LearningRateRule = "deepseek"
    batch_rule: BatchRule = "deepseek"
    lr: float | None = None
    lr_scale: Mapping[Objective, float] = field(default_factory=dict)
    batch: int | None = None
    warmup_steps: int | None = None
    decay_fraction: float = DECAY_FRACTION

    def check(self) -> None:
        """Refuse numbers that make no run.

        Raises:
            UserError: names the setting.
        """
        rates = {"lr": self.lr, **{f"lr-scale-{objective}": scale for objective, scale in self.lr_scale.items()}}
        for option, rate in rates.items():
            if rate is not None and not (math.isfinite(rate) and rate > 0):
                raise UserError(f"plan: --{option} {rate:g} must be a number above 0")
        ranges = {"batch": (self.batch, 1, MAX_BATCH), "warmup-steps": (self.warmup_steps, 0, MAX_STEPS)}
        for option, (count, least, most) in ranges.items():
            if count is not None and not least <= count <= most:
                raise UserError(f"plan: --{option} {count} must lie between {least} and {most}")
        if not 0 <= self.decay_fraction < 1:
            raise UserError(f"plan: --decay-fraction {self.decay_fraction:g} must be at least 0 and below 1")


@dataclass(frozen=True)
class Branch:
    """One budget of a trunk: the result that a separate run of this length would have."""

    budget: float
    steps: int
    decay_steps: int

    @property
    def fork_step(self) -> int:
        """The trunk's step from which it decays."""
        return self.steps - self.decay_steps


@dataclass(frozen=True)
class Trunk:
    """All budgets of one objective, shape and seed, with the settings that they share.

    Args:
        per_step: (expected) training FLOPs of one step.
        accumulation: micro-batches of a step on one device.
        memory: peak bytes of one device.
        branches: by rising budget.
    """

    objective: Objective
    shape: Shape
    seed: int
    lr: float
    global_batch: int
    warmup_steps: int
    per_step: TrainingFlops
    accumulation: int
    memory: float
    branches: tuple[Branch, ...]

    @property
    def name(self) -> str:
        return f"{self.objective}-{shape_name(self.shape)}-s{self.seed}"

    @property
    def separate_steps(self) -> int:
        """Steps of one run for each budget."""
        return sum(branch.steps for branch in self.branches)

    @property
    def trunk_steps(self) -> int:
        """Steps to the last fork, and all decays."""
        return self.branches[-1].fork_step + sum(branch.decay_steps for branch in self.branches)


def plan_trunk(
    objective: Objective,
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
        UserError: a budget is below one step, two make the same steps, or warmup and decay do not fit.
    """
    per_token = stream.flops_per_token(shape, objective)
    tokens = math.exp(math.fsum(map(math.log, budgets)) / len(budgets)) / per_token.by(convention)
    flops = tokens * per_token.flops_6nd
    batch = recipe.batch or _batch_by_rule(
        recipe, stream, machine, tokens, flops, budgets[0] / per_token.by(convention)
    )
    per_step = stream.tokens_per_step(batch)
    if budgets[0] < per_token.by(convention) * per_step:
        raise UserError(
            f"plan: --flops {budgets[0]:g} does not pay for one step of {objective} {shape_name(shape)}, which costs "
            f"{per_token.by(convention) * per_step:.3g} (batch {batch}); raise it, or choose smaller shapes or batches"
        )
    steps = [steps_for_budget(budget, per_token, per_step, convention) for budget in budgets]
    branches = tuple(
        Branch(budget, count, round(recipe.decay_fraction * count))
        for budget, count in zip(budgets, steps, strict=True)
    )
    warmup = warmup_steps(steps) if recipe.warmup_steps is None else recipe.warmup_steps
    _check_branches(branches, warmup, f"{objective} {shape_name(shape)}")
    rate = recipe.lr or learning_rate(recipe.lr_rule, shape.params_nonembedding, tokens, flops)
    accumulation = machine.accumulation(shape, stream.vocab_size, stream.sequence_length, batch)
    micro_batch = batch // machine.devices // accumulation
    return Trunk(
        objective=objective,
        shape=shape,
        seed=seed,
        lr=_rounded(rate * recipe.lr_scale.get(objective, 1.0)),
        global_batch=batch,
        warmup_steps=warmup,
        per_step=per_token * per_step,
        accumulation=accumulation,
        memory=machine.memory_of(shape, stream.vocab_size, stream.sequence_length, micro_batch),
        branches=branches,
    )


def _rounded(value: float) -> float:
    """To three significant digits: a rule is not known better, and people read it."""
    return float(f"{value:.3g}")


def _batch_by_rule(
    recipe: Recipe, stream: Stream, machine: Machine, tokens: float, flops: float, fewest_tokens: float
) -> int:
    """Sequences of a global batch: the rule's, at the nearest power of two times what the devices take at least."""
    quantum = machine.devices * (machine.micro_batch or 1)
    wanted = batch_tokens(recipe.batch_rule, tokens, flops) / stream.tokens_per_step(1)
    doublings = max(0, round(math.log2(wanted / quantum)))
    while doublings and fewest_tokens / stream.tokens_per_step(quantum * 2**doublings) < MIN_STEPS:
        doublings -= 1
    return quantum * 2**doublings


def _check_branches(branches: Sequence[Branch], warmup: int, who: str) -> None:
    for lower, upper in pairwise(branches):
        if lower.steps == upper.steps:
            raise UserError(
                f"plan: --flops {lower.budget:g} and {upper.budget:g} are both {lower.steps} steps of {who}; "
                "space them further apart, or lower the batch"
            )
    if warmup > branches[0].fork_step:
        raise UserError(
            f"plan: {who} warms up for {warmup} steps and would decay from step {branches[0].fork_step} of "
            f"{branches[0].steps}; lower --warmup-steps or --decay-fraction"
        )
