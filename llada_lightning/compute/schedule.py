"""The Warmup-Stable-Decay schedule with any number of plateaus (paper, Sec. 2.2; Hu et al. 2024).

A schedule comes from the configuration alone, so that a resumed run and a run on other devices have the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

from llada_lightning.compute.rules import DECAY_FRACTION, WARMUP_FRACTION, WarmupRule, lone_warmup, study_warmup
from llada_lightning.support.errors import UserError


class ScheduleError(UserError):
    """The parts of a schedule do not fit into its run."""


@dataclass
class Plateau:
    """A constant rate that replaces the one before it.

    Args:
        lr: The rate.
        from_tokens: The number of training tokens after which it holds.
    """

    lr: float
    from_tokens: float


@dataclass
class WSD:
    """Linear warmup from 0, plateaus, linear decay at the end.

    Warmup and decay are given in steps or as a share of all steps. Where both are given, the steps hold. What is null
    is filled in when the length of the run is known, and the resolved configuration shows it.

    Args:
        lr: The rate after the warmup; null: by the rule of `rules.lr`.
        warmup_fraction: The share of the steps that warm up; null: by the rule of `rules.warmup`.
        warmup_steps: The number of steps that warm up.
        plateaus: The later rates, in their order.
        decay_fraction: The share of the steps over which the rate falls to `final_lr`.
        decay_tokens: The number of tokens over which the rate falls.
        decay_steps: The number of steps over which the rate falls.
        final_lr_fraction: The rate at the end of the decay, as a share of `lr`.
        final_lr: The rate at the end of the decay.
        total_steps: The number of steps of the run. It follows from the budget.
        tokens_per_step: The expected number of tokens of a global batch. It follows from the data.
    """

    lr: float | None = None
    warmup_fraction: float | None = None
    warmup_steps: int | None = None
    plateaus: list[Plateau] = field(default_factory=list)
    decay_fraction: float = DECAY_FRACTION
    decay_tokens: float | None = None
    decay_steps: int | None = None
    final_lr_fraction: float = 0.1
    final_lr: float | None = None
    total_steps: int | None = None
    tokens_per_step: float | None = None

    def resolve(self, total_steps: int, tokens_per_step: float, default_lr: float, warmup: int | None = None) -> WSD:
        """The same schedule with every null filled in.

        Args:
            total_steps: The length of the run.
            tokens_per_step: The (expected) tokens of a global batch.
            default_lr: The rate of a schedule that sets none.
            warmup: The warmup steps of a schedule that sets none; None: the share of all steps.

        Raises:
            UserError: Warmup, plateaus and decay do not fit into the run, in this order.
        """
        lr = default_lr if self.lr is None else self.lr
        self._check_numbers()
        fraction = WARMUP_FRACTION if self.warmup_fraction is None else self.warmup_fraction
        warmup_steps = self.warmup_steps
        if warmup_steps is None:
            warmup_steps = round(fraction * total_steps) if warmup is None else warmup
        decay_steps = self.decay_steps
        if decay_steps is None:
            in_tokens = self.decay_tokens
            decay_steps = round(self.decay_fraction * total_steps if in_tokens is None else in_tokens / tokens_per_step)
        final_lr = self.final_lr_fraction * lr if self.final_lr is None else self.final_lr
        resolved = replace(
            self,
            lr=lr,
            warmup_fraction=fraction,
            warmup_steps=warmup_steps,
            decay_steps=decay_steps,
            final_lr=final_lr,
            total_steps=total_steps,
            tokens_per_step=tokens_per_step,
        )
        resolved._check()
        return resolved

    def resolve_all(
        self, lengths: list[int], tokens_per_step: float, default_lr: float, rule: WarmupRule = study_warmup
    ) -> list[WSD]:
        """One schedule for each length (ascending), alike until the decay; their warmup follows from all lengths.

        Args:
            lengths: The number of steps of each run.
            tokens_per_step: The (expected) tokens of a global batch.
            default_lr: The rate of a schedule that sets none.
            rule: The rule of the warmup. A share that is set is the share of all steps; of several lengths the one that
                :func:`study_warmup` gives.

        Raises:
            UserError: As :meth:`resolve`.
        """
        given = self.warmup_fraction
        warmup = rule(lengths) if given is None else lone_warmup(lengths, given)
        return [self.resolve(length, tokens_per_step, default_lr, warmup) for length in lengths]

    def agrees(self, other: WSD, last_step: int) -> bool:
        """Whether two resolved schedules give the same rates up to ``last_step``: both are linear between knots."""
        knots = {0, last_step}
        for schedule in (self, other):
            assert schedule.warmup_steps is not None
            assert schedule.total_steps is not None and schedule.decay_steps is not None
            starts = [schedule.warmup_steps, schedule.total_steps - schedule.decay_steps, schedule.total_steps]
            starts += [schedule.first_step(plateau) for plateau in schedule.plateaus]
            knots |= {start + side for start in starts for side in (-1, 0, 1)}
        return all(self.at(step) == other.at(step) for step in knots if 0 <= step <= last_step)

    def at(self, step: int) -> float:
        """The rate of optimizer step ``step``, counted from 0; of a resolved schedule."""
        assert self.lr is not None and self.warmup_steps is not None and self.decay_steps is not None
        assert self.final_lr is not None and self.total_steps is not None
        if step < self.warmup_steps:
            return self.lr * step / self.warmup_steps
        plateau_lr = self.lr
        for plateau in self.plateaus:
            if step >= self.first_step(plateau):
                plateau_lr = plateau.lr
        into_decay = step - (self.total_steps - self.decay_steps)
        if into_decay <= 0 or not self.decay_steps:
            return plateau_lr
        return plateau_lr + (self.final_lr - plateau_lr) * min(1.0, into_decay / self.decay_steps)

    def first_step(self, plateau: Plateau) -> int:
        """The first step that begins with ``from_tokens`` tokens processed."""
        assert self.tokens_per_step is not None
        return math.ceil(plateau.from_tokens / self.tokens_per_step)

    def _check_numbers(self) -> None:
        named = {key: value for key, value in vars(self).items() if isinstance(value, (int, float))}
        for i, plateau in enumerate(self.plateaus):
            named |= {f"plateaus.{i}.{key}": value for key, value in vars(plateau).items()}
        for key, value in named.items():
            if not math.isfinite(value) or value < 0:
                raise UserError(f"model.schedule.{key}: {value} must be a finite number of at least 0")

    def _check(self) -> None:
        assert self.warmup_steps is not None and self.decay_steps is not None and self.total_steps is not None
        knots = [self.warmup_steps, *(self.first_step(p) for p in self.plateaus), self.total_steps - self.decay_steps]
        if knots != sorted(knots):
            raise ScheduleError(
                f"model.schedule: warmup ends at step {knots[0]}, "
                + (f"plateaus start at {', '.join(map(str, knots[1:-1]))}, " if self.plateaus else "")
                + f"the decay at {knots[-1]} of {self.total_steps} steps; they must follow one another: shorten them"
            )


def schedule_from(values: dict[str, Any]) -> WSD:
    """The schedule of plain values, as a configuration or a checkpoint holds them."""
    return WSD(**{**values, "plateaus": [Plateau(**plateau) for plateau in values["plateaus"]]})
