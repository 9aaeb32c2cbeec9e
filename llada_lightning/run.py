"""A run: what it is asked to be, what follows from that, and the name by which it is known.

:func:`resolve` is the only place where a budget becomes steps, and where rate, batch, warmup and decay follow from
their rules: a plan lists resolved runs, `llada fit` executes one, and a sweep counts what they cost. The identity of a
run is all that makes its weights what they are; its hash is in the run's name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from statistics import geometric_mean

from llada_lightning.compute.flops import (
    MASK_EPS,
    Convention,
    TrainingFlops,
    check_budgets,
    check_steps,
    expected_length,
    flops_6nd,
    steps_for_budget,
)
from llada_lightning.compute.rules import (
    BATCH_RULES,
    LONE_BATCH,
    RANGES,
    WARMUP_RULES,
    BatchRule,
    LearningRateRule,
    Range,
    Rules,
    Size,
    learning_rate,
)
from llada_lightning.compute.schedule import WSD
from llada_lightning.compute.shapes import Shape, shape_name
from llada_lightning.objectives import Objective
from llada_lightning.objectives.densities import Density
from llada_lightning.support.errors import UserError


@dataclass(frozen=True)
class Source:
    """One corpus of a mixture.

    Args:
        weight: The share of the sequences that it gives, relative to the weights of the other sources.
        sequences: The number of training sequences that it holds.
    """

    weight: float
    sequences: int


@dataclass(frozen=True)
class DataFacts:
    """What prepared data is known to hold, at one sequence length.

    Args:
        vocab_size: The number of vocabulary entries of the tokenizer.
        sources: The sources of the mixture, or the only one.
        tokenizer: The fingerprint of the tokenizer; None: not known.
    """

    vocab_size: int
    sources: tuple[Source, ...]
    tokenizer: str | None = None


def sequences_read(
    present: Sequence[int], weights: Sequence[float], sequence_length: int, train_tokens: int | None
) -> list[int]:
    """The number of training sequences that are read of each source: its share of ``train_tokens``, at least one.

    Args:
        present: The number of sequences that each source holds.
        weights: The weight of each source.
        sequence_length: The number of tokens of a sequence, L.
        train_tokens: The number of distinct tokens that may be read; None: all of them.
    """
    if train_tokens is None:
        return list(present)
    wanted, total = train_tokens / sequence_length, sum(weights)
    shares = [max(1, round(wanted * weight / total)) for weight in weights]
    return [min(share, held) for share, held in zip(shares, present, strict=True)]


def check_block_length(setting: str, block_length: int, sequence_length: int) -> None:
    """Refuse blocks that do not divide the sequence.

    Raises:
        UserError: Names the setting and the nearest lengths that do.
    """
    if block_length >= 1 and sequence_length % block_length == 0:
        return
    divisors = [length for length in range(1, sequence_length + 1) if sequence_length % length == 0]
    below = max((length for length in divisors if length < block_length), default=1)
    above = min((length for length in divisors if length > block_length), default=sequence_length)
    nearest = f"{below}" if below == above else f"{below} or {above}"
    raise UserError(
        f"{setting}: {block_length} given, which does not divide sequences of {sequence_length}; give {nearest}"
    )


@dataclass(frozen=True)
class Stream:
    """The stream of sequences that all objectives train on. The defaults are those of ``llada fit``.

    Args:
        vocab_size: The number of vocabulary entries of the embedding and the output head.
        sequence_length: The number of tokens of a full sequence, L.
        random_length_share: The share of the sequences that are cut to a random length.
        mask_eps: The smallest mask probability of the forward process.
        sources: The corpora; none where the data is not known.
        tokens_per_sequence: The expected tokens of a sequence; None: of L and the share of random lengths.
        attended_length: The length whose attention a token costs on average; None: L.
        response_share: The share of the tokens that the forward process may mask.
        density: The density of the mask ratio; None: uniform.
        block_length: The number of tokens of a block, for objectives that predict in blocks; None: their default.
    """

    vocab_size: int
    sequence_length: int = 256
    random_length_share: float = 0.01
    mask_eps: float = MASK_EPS
    sources: tuple[Source, ...] = field(default=())
    tokens_per_sequence: float | None = None
    attended_length: int | None = None
    response_share: float = 1.0
    density: Density | None = None
    block_length: int | None = None

    def check(self) -> None:
        """Refuse what ``llada fit`` would refuse.

        Raises:
            UserError: Names the setting.
        """
        if not 0 <= self.random_length_share <= 1:
            raise UserError(f"plan: random_length_share {self.random_length_share:g} must lie between 0 and 1")
        if not 0 < self.mask_eps < 1:
            raise UserError(f"plan: mask_eps {self.mask_eps:g} must lie between 0 and 1")
        if self.block_length is not None:
            check_block_length("plan: --block-length", self.block_length, self.sequence_length)

    def flops_per_token(self, shape: Shape, objective: Objective, steps: int | None = None) -> TrainingFlops:
        """The expected training FLOPs of one token of an objective, a mean over the first ``steps`` steps of a run.

        The steps matter where the density of the mask ratio changes with them. None: a run without an end.
        """
        attended = self.attended_length or self.sequence_length
        return objective.flops_per_token(
            shape,
            self.vocab_size,
            attended,
            self.mask_eps,
            self.response_share,
            self.mean_ratio(steps),
            self.block_length,
        )

    def mean_ratio(self, steps: int | None = None) -> float | None:
        """The mean mask ratio of the first ``steps`` steps; None: that of the uniform density."""
        return None if self.density is None else self.density.mean_until(steps)

    def tokens_per_step(self, global_batch: float) -> float:
        """The expected tokens of a step, whose global batch is given in sequences."""
        each = self.tokens_per_sequence
        return global_batch * (
            expected_length(self.sequence_length, self.random_length_share) if each is None else each
        )

    def epochs(self, sequences: float) -> float | None:
        """How often a number of sequences reads the source that it repeats most; None where the data is not known."""
        total = sum(source.weight for source in self.sources)
        passes = [sequences * source.weight / total / source.sequences for source in self.sources]
        return max(passes, default=None)

    @property
    def tokens_present(self) -> int | None:
        """Training tokens of all sources together; None where the data is not known."""
        return sum(source.sequences for source in self.sources) * self.sequence_length if self.sources else None


MIN_STEPS = 50
"""The least steps of the smallest budget: a batch by rule is halved until there are as many, as far as halving goes."""


@dataclass(frozen=True)
class Length:
    """How long a run is to train. Exactly one of the first three is given.

    Args:
        flops: The training FLOPs of each budget, ascending.
        tokens: The number of training tokens.
        steps: The number of optimizer steps.
        convention: Which FLOPs a budget counts.
        setting: The name of the setting, for messages.
        milestones: The points, in FLOPs or tokens as the length is given, at which it leaves a result without a decay.
    """

    flops: tuple[float, ...] = ()
    tokens: float | None = None
    steps: int | None = None
    convention: Convention = "6nd"
    setting: str = "budget.flops"
    milestones: tuple[float, ...] = ()


@dataclass(frozen=True)
class Spec:
    """What a run is asked to be.

    Args:
        objective: The training objective.
        shape: The dimensions of the Transformer.
        stream: What is known of the training data.
        length: How long it is to train.
        global_batch: The sequences of an optimizer step; None: by rule.
        schedule: The learning rate's schedule as it is given.
        rules: The rules of what is not given.
        lr_scale: A factor on the learning rate that the rule gives.
        batch_quantum: The batch that a rule gives is a power of two times this number of sequences.
        lr_rule: A rule of the learning rate in place of the named one.
        batch_rule: A rule of the global batch in place of the named one.
    """

    objective: Objective
    shape: Shape
    stream: Stream
    length: Length
    global_batch: int | None = None
    schedule: WSD = field(default_factory=WSD)
    rules: Rules = field(default_factory=Rules)
    lr_scale: float = 1.0
    batch_quantum: int = 1
    lr_rule: LearningRateRule | None = None
    batch_rule: BatchRule | None = None

    @property
    def who(self) -> str:
        """The objective and the shape, for messages."""
        return f"{self.objective.name} {shape_name(self.shape)}"

    @property
    def per_token(self) -> TrainingFlops:
        """The expected training FLOPs of one token."""
        return self.per_token_until(None)

    def per_token_until(self, steps: int | None) -> TrainingFlops:
        """The expected training FLOPs of one token, a mean over the first ``steps`` steps (``Stream``)."""
        return self.stream.flops_per_token(self.shape, self.objective, steps)


@dataclass(frozen=True)
class Run:
    """A resolved run: one fit, or a trunk whose budgets each end in a branch of their own.

    Args:
        spec: What it was asked to be.
        global_batch: The sequences of an optimizer step.
        schedules: The resolved schedule of each budget, shortest first.
        milestones: The schedule of each milestone, shortest first: that of a run of its length that does not decay.
    """

    spec: Spec
    global_batch: int
    schedules: tuple[WSD, ...]
    milestones: tuple[WSD, ...] = ()

    @property
    def steps(self) -> tuple[int, ...]:
        """The optimizer steps of each budget, ascending."""
        return tuple(schedule.total_steps or 0 for schedule in self.schedules)

    @property
    def tokens_per_step(self) -> float:
        """The expected tokens of an optimizer step."""
        return self.spec.stream.tokens_per_step(self.global_batch)

    @property
    def per_step(self) -> TrainingFlops:
        """The expected training FLOPs of an optimizer step: a mean over the steps of the longest budget."""
        return self.per_step_until(self.steps[-1])

    def per_step_until(self, steps: int) -> TrainingFlops:
        """The expected training FLOPs of an optimizer step: a mean over the first ``steps`` of them."""
        return self.spec.per_token_until(steps) * self.tokens_per_step

    def described(self) -> str:
        """One line for people: steps, batch, learning rate and warmup, each with the rule that it comes from."""
        spec, schedule = self.spec, self.schedules[0]

        def source(given: float | None, rule: str) -> str:
            return f"rule {rule}" if given is None else "as set"

        warmup = spec.schedule.warmup_fraction if spec.schedule.warmup_steps is None else spec.schedule.warmup_steps
        count = len(self.milestones)
        milestones = f", {count} milestone{'s' * (count > 1)}" if count else ""
        used = [(spec.rules.batch, spec.global_batch), (spec.rules.lr, spec.schedule.lr)]
        rules, size = dict.fromkeys(rule for rule, given in used if given is None), _size(spec, self.global_batch)
        outside = [rule for rule in rules if RANGES.get(rule, Range()).outside(size)]
        far = f"; outside of the range that {' and '.join(outside)} was fitted on" if outside else ""
        sequences = f"{self.global_batch:,} sequence{'s' * (self.global_batch > 1)}"
        return (
            f"run: {' and '.join(f'{steps:,}' for steps in self.steps)} steps of {sequences} "
            f"({source(spec.global_batch, spec.rules.batch)}), the first {schedule.warmup_steps:,} warm up "
            f"({source(warmup, spec.rules.warmup)}), learning rate {schedule.lr:.4g} "
            f"({source(spec.schedule.lr, spec.rules.lr)}){milestones}{far}"
        )


def resolve(spec: Spec) -> Run:
    """What follows from a specification: batch, steps, rate, warmup and decay of every budget.

    Raises:
        UserError: A budget is below one step, two budgets make the same steps, the schedule does not fit, or a
            milestone does not lie on the way.
    """
    batch = spec.global_batch or _batch_by_rule(spec)
    lengths = _lengths(spec, batch)
    per_step = spec.stream.tokens_per_step(batch)
    of_steps = [length * flops_6nd(spec.shape.params_nonembedding, per_step) for length in lengths]
    size = _size(spec, batch, geometric_mean(of_steps))
    rate = learning_rate(spec.lr_rule or spec.rules.lr, size, spec.lr_scale)
    schedules = spec.schedule.resolve_all(lengths, per_step, rate, WARMUP_RULES[spec.rules.warmup])
    return Run(spec, batch, tuple(schedules), _milestones(spec, batch, schedules))


def _size(spec: Spec, batch: float, flops_of_steps: float = math.nan) -> Size:
    """The size by which the rules go, at a global batch in sequences."""
    length, per_token = spec.length, spec.per_token
    if length.flops:
        budget = math.exp(math.fsum(map(math.log, length.flops)) / len(length.flops))
        tokens = budget / per_token.by(length.convention)
    elif length.tokens is not None:
        tokens = length.tokens
    else:
        assert length.steps is not None
        tokens = length.steps * spec.stream.tokens_per_step(batch)
    return Size(spec.shape.params_nonembedding, tokens, tokens * per_token.flops_6nd, flops_of_steps)


def _batch_by_rule(spec: Spec) -> int:
    """The sequences of a global batch: the rule's, rounded to a power of two times the quantum."""
    rule = spec.batch_rule or BATCH_RULES[spec.rules.batch]
    if rule is None:
        return LONE_BATCH
    per_sequence = spec.stream.tokens_per_step(1)
    wanted = rule(_size(spec, LONE_BATCH)) / per_sequence
    if spec.length.steps is not None:  # a larger batch makes a longer run, whose batch is larger: to its fixed point
        for _ in range(50):
            wanted = rule(_size(spec, wanted)) / per_sequence
    doublings = max(0, round(math.log2(wanted / spec.batch_quantum)))
    if spec.length.steps is None:
        fewest = spec.length.tokens or spec.length.flops[0] / spec.per_token.by(spec.length.convention)
        while doublings and fewest / spec.stream.tokens_per_step(spec.batch_quantum * 2**doublings) < MIN_STEPS:
            doublings -= 1
    return spec.batch_quantum * 2**doublings


def _lengths(spec: Spec, batch: int) -> list[int]:
    """The optimizer steps of each budget, ascending."""
    length, per_step = spec.length, spec.stream.tokens_per_step(batch)
    name = length.setting
    if length.steps is not None:
        check_steps(name, length.steps, length.steps)
        return [length.steps]
    if length.tokens is not None:
        steps = round(length.tokens / per_step)
        check_steps(name, length.tokens, steps)
        if length.tokens < per_step:
            raise UserError(
                f"{name}: {length.tokens:g} is below one step of {per_step:.0f} tokens; raise it, or lower the "
                "global batch"
            )
        return [steps]
    check_budgets(name, length.flops)

    def steps_of(flops: float) -> int:
        def count(steps: int | None) -> int:
            of_a_token = spec.per_token_until(steps)
            return steps_for_budget(flops, of_a_token, per_step, length.convention, name, spec.who)

        return _settled(count)

    lengths = [steps_of(flops) for flops in length.flops]
    for (lower, fewer), (higher, more) in pairwise(zip(length.flops, lengths, strict=True)):
        if more <= fewer:
            raise UserError(
                f"{name}: {lower:g} and {higher:g} make {fewer} and {more} steps of {spec.who}; several budgets must "
                "ascend by a step each: space them further apart, or lower the batch"
            )
    return lengths


def _settled(count: Callable[[int | None], int]) -> int:
    """The number of steps that a function of that number gives back.

    What a step costs depends on how many there are with a curriculum only; else the second call gives what the first
    gave.
    """
    steps = count(None)
    for _ in range(50):
        before, steps = steps, count(steps)
        if steps == before:
            break
    return steps


def _milestones(spec: Spec, batch: int, schedules: Sequence[WSD]) -> tuple[WSD, ...]:
    """The schedule of each milestone, ascending: of the run that ends there, at the rate that it has come to."""
    length, per_step, last = spec.length, spec.stream.tokens_per_step(batch), schedules[-1]
    name = "budget.milestones"
    if not length.milestones:
        return ()
    if length.steps is not None:
        raise UserError(f"{name}: given without a budget in FLOPs or tokens; give --budget.flops or --budget.tokens")
    check_budgets(name, length.milestones)
    assert last.total_steps is not None and last.decay_steps is not None
    decays = last.total_steps - last.decay_steps

    def of_a_token(steps: int | None) -> float:
        return spec.per_token_until(steps).by(length.convention) if length.flops else 1.0

    found: list[WSD] = []
    for given in length.milestones:
        step = _settled(lambda steps, given=given: round(given / of_a_token(steps) / per_step))  # type: ignore[misc]
        if step < 1:
            where = f"step 0 of {per_step * of_a_token(1):.4g} {'FLOPs' if length.flops else 'tokens'} each; raise it"
        elif step >= last.total_steps:
            where = f"step {step}, and the last budget ends at step {last.total_steps}; leave it out"
        elif step > decays:
            where = f"step {step}, within the last decay, from step {decays} on; leave it out, or shorten the decay"
        elif found and step <= (found[-1].total_steps or 0):
            where = f"step {step}, not behind the one before it; milestones must ascend by a step each"
        elif step in [schedule.total_steps for schedule in schedules]:
            where = f"step {step}, where a budget ends, too; leave it out, or move it"
        else:
            passed = [plateau for plateau in last.plateaus if last.first_step(plateau) < step]
            found.append(replace(last, total_steps=step, decay_steps=0, plateaus=passed))
            continue
        raise UserError(f"{name}: {given:g} is at {where}")
    return tuple(found)
