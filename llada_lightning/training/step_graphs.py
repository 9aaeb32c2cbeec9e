"""Optimizer steps as CUDA graphs: forward and backward pass are one launch, clipping, guard and update another.

A graph reads and writes at fixed addresses (``model.graphs``), so

- every tensor of a batch is copied to a fixed place first, and the scored positions are padded to a fixed count;
- what changes from step to step is a tensor: the rate, the number of scored positions, the verdict of the guard;
- gradients stay at their place, and are zeroed after an update.

A micro-batch that no graph holds goes the ordinary way, operation by operation, into the same gradients.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor

from llada_lightning.model.graphs import Graph, PassGraphs, new_graphs
from llada_lightning.objectives.batches import TrainingBatch
from llada_lightning.support.errors import UserError
from llada_lightning.support.signals import say
from llada_lightning.training.machine import Speed

if TYPE_CHECKING:
    from llada_lightning.data.loading import LanguageDataModule
    from llada_lightning.training.language_module import LanguageModule

KINDS = 4
"""The largest number of kinds of micro-batch that a run records: padded or not, masked by document or not."""

_ON_HOST = ("scored", "denominator")
"""Numbers of a batch that its loss is computed from."""


class StepGraphs:
    """The optimizer steps of a run, recorded as graphs when they are first made.

    Args:
        module: The module that is trained.
        optimizer: Its fused AdamW.
        clip: The largest norm of a gradient; None or 0: none.
        micro_batches: The number of micro-batches of a step.
        most_scored: The number of scored positions that those of a micro-batch are padded to, a multiple of ``BUCKET``.

    Attributes:
        replayed: The number of micro-batches that a graph held.
        too_many: The number of those that had more scored positions than ``most_scored``.
        of_other_kinds: The number of those of a kind that was not recorded: because there were ``KINDS`` already, or
            because it cannot be.
        refusal: Why a kind could not be recorded; None where each could.
    """

    def __init__(
        self,
        module: LanguageModule,
        optimizer: torch.optim.Optimizer,
        clip: float | None,
        micro_batches: int,
        most_scored: int,
    ) -> None:
        self._module, self._optimizer, self._clip = module, optimizer, clip
        self._micro_batches, self._most_scored = micro_batches, most_scored
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._device = module.device
        self._new_graph = new_graphs()
        self._kinds: dict[tuple[Any, ...], tuple[TrainingBatch, Graph] | None] = {}
        self.replayed = self.too_many = self.of_other_kinds = 0
        self.refusal: str | None = None
        self._rates = [self._number(0.0) for _ in optimizer.param_groups]
        self._losses_A = torch.full((micro_batches,), torch.nan, device=self._device)
        for parameter in self._parameters:
            parameter.grad = torch.zeros_like(parameter)
        module.train_levels.at_once = True
        self._update = self._new_graph()
        # A loss that is no number skips the update: weights, moments, step counts and the guard's window stay.
        self._update.record(self._updated, self._updated)
        module.model.pass_graphs = PassGraphs(self._new_graph)  # those of validations

    def loss(self, batch: TrainingBatch) -> Tensor | None:
        """Add the gradient of a micro-batch; returns its loss, without a gradient, or None where no graph holds it."""
        if int(batch.scored) > self._most_scored:
            self.too_many += 1
            return None
        kind = tuple((name, tuple(value.shape)) for name, value in self._tensors(batch) if name != "scored_M")
        if kind not in self._kinds:
            self._kinds[kind] = self._recorded(batch) if len(self._kinds) < KINDS else None
        held = self._kinds[kind]
        if held is None:
            self.of_other_kinds += 1
            return None
        self.replayed += 1
        self._fill(held[0], batch)
        return held[1].replay().clone()

    def update(self, losses: list[Tensor], step: int) -> None:
        """Clip, judge and update with the gradients added so far, and zero them.

        Args:
            losses: () of each micro-batch of the step.
            step: The number of steps, this one included.
        """
        for rate, group in zip(self._rates, self._optimizer.param_groups, strict=True):
            rate.fill_(group["lr"])
        self._losses_A.copy_(torch.stack(losses))
        self._module.guard.note(step, self._update.replay().clone())

    def end(self) -> None:
        """Leave the module as it was, and say in one line what went the ordinary way, if anything did."""
        self._module.train_levels.at_once, self._module.model.pass_graphs = False, None
        ordinary = self.too_many + self.of_other_kinds
        if not ordinary:
            return
        why = [f"{self.too_many:,} had more than {self._most_scored:,} scored positions"] if self.too_many else []
        if self.of_other_kinds:
            why.append(f"{self.of_other_kinds:,} were of a kind that was not recorded")
        why += [] if self.refusal is None else [f"CUDA said: {self.refusal}"]
        say(f"note: {ordinary:,} of {ordinary + self.replayed:,} micro-batches ran without a graph: {'; '.join(why)}")

    # --- the two pieces of work ---------------------------------------------------------------------------------------

    def _recorded(self, batch: TrainingBatch) -> tuple[TrainingBatch, Graph] | None:
        """The fixed batch and the graph of a new kind of micro-batch."""
        places: dict[str, Any] = {name: torch.empty_like(value) for name, value in self._tensors(batch)}
        places["scored_M"] = batch.scored_M.new_zeros(self._most_scored)
        places |= {"scored": batch.scored_M.new_zeros(()), "denominator": torch.ones((), device=self._device)}
        fixed = batch._replace(**places)
        self._fill(fixed, batch)

        def work() -> Tensor:
            loss = self._module.training_loss(fixed)
            with torch.autocast(self._device.type, enabled=False):
                (loss / self._micro_batches).backward()
            return loss.detach()

        def trial() -> None:
            with self._module.train_levels.undone(self._device), self._gradients_aside():
                work()

        graph = self._new_graph()
        try:
            graph.record(work, trial)
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError as error:  # an operation that waits for the device
            self.refusal = _first_line(error)
            return None
        return fixed, graph

    @torch.no_grad()
    def _updated(self) -> Tensor:
        """(5,) the verdict of the guard on the step that was made."""
        optimizer: Any = self._optimizer
        verdict = self._module.judged(self._losses_A, self._clip)
        optimizer.found_inf = verdict[-1]
        with self._rates_as_tensors():
            optimizer.step()
        torch._foreach_zero_([p.grad for p in self._parameters])
        return verdict

    def _tensors(self, batch: TrainingBatch) -> list[tuple[str, Tensor]]:
        fields = batch._asdict().items()
        return [(name, value) for name, value in fields if isinstance(value, Tensor) and name not in _ON_HOST]

    def _fill(self, fixed: TrainingBatch, batch: TrainingBatch) -> None:
        """Copy a batch to the fixed places of its kind."""
        for name, value in self._tensors(batch):
            place = getattr(fixed, name)
            if name == "scored_M":
                place[len(value) :].zero_()
                place = place[: len(value)]
            place.copy_(value)
        for name in _ON_HOST:
            getattr(fixed, name).fill_(getattr(batch, name))

    def _number(self, value: float) -> Tensor:
        """A rate as the fused update reads it: in float32 on a CUDA device."""
        dtype = torch.float32 if self._device.type == "cuda" else torch.float64
        return torch.full((), value, dtype=dtype, device=self._device)

    @contextmanager
    def _gradients_aside(self) -> Iterator[None]:
        """Gradients of what happens within are thrown away."""
        kept = [parameter.grad for parameter in self._parameters]
        for parameter in self._parameters:
            parameter.grad = None
        try:
            yield
        finally:
            for parameter, grad in zip(self._parameters, kept, strict=True):
                parameter.grad = grad

    @contextmanager
    def _rates_as_tensors(self) -> Iterator[None]:
        """Within, the optimizer reads its rates from the device. A checkpoint has numbers, as of every run."""
        groups = self._optimizer.param_groups
        kept = [{"lr": group["lr"], "capturable": group["capturable"]} for group in groups]
        for group, rate in zip(groups, self._rates, strict=True):
            group.update(lr=rate, capturable=self._device.type == "cuda")
        try:
            yield
        finally:
            for group, before in zip(groups, kept, strict=True):
                group.update(before)


def recorded_steps(
    module: LanguageModule, optimizer: torch.optim.Optimizer, clip: float | None, micro_batches: int, most_scored: int
) -> StepGraphs | None:
    """The graphs of a run; None, with a line that says why, where its update cannot be recorded."""
    try:
        return StepGraphs(module, optimizer, clip, micro_batches, most_scored)
    except torch.cuda.OutOfMemoryError:
        raise
    except RuntimeError as error:
        module.train_levels.at_once = False
        optimizer.zero_grad()
        say(f"note: speed.graph: CUDA could not record the update ({_first_line(error)}); going on without graphs")
        return None


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split("\n")[0].split())


def why_not_graphed(
    module: LanguageModule, data: LanguageDataModule, trainer: Any, profiled: bool = False
) -> str | None:
    """Why the steps of a run cannot be graphs; None where they can.

    Args:
        module: The module that is trained.
        data: The data that it is trained on.
        trainer: The trainer.
        profiled: Whether steps of the run are profiled, which tells the parts of a step apart.
    """
    if trainer.strategy.root_device.type != "cuda":
        return "no CUDA device trains"
    if trainer.world_size > 1 or not isinstance(trainer.strategy, SingleDeviceStrategy):
        return "the strategy is for several processes"
    if not data.static_shapes:
        return "the micro-batches have different lengths"
    if module.optimizer_settings.name != "adamw":
        return f"{module.optimizer_settings.name} is no fused AdamW"
    if module.builds_own_optimizer:
        return "the module builds an optimizer of its own"
    if module.open_attention_steps:
        return "open_attention_steps changes the attention from step to step"
    if trainer.precision == "16-mixed":
        return "16-mixed scales the loss from step to step"
    return "steps are profiled by their parts" if profiled else None


def with_graphs(speed: Speed, reason: str | None, training: bool) -> Speed:
    """Settings of speed with ``graph`` decided, and with it ``last_block``.

    Args:
        speed: The settings.
        reason: What :func:`why_not_graphed` says.
        training: Whether the command trains.

    Raises:
        UserError: Graphs are asked for where there can be none, or what needs them.
    """
    if training and speed.graph and reason is not None:
        raise UserError(f"speed.graph: true given, but {reason}; leave it out")
    graph = training and speed.graph is not False and reason is None
    if speed.last_block == "scored" and speed.compile and not graph:
        raise UserError(
            "speed.last_block: scored given, but blocks are compiled for a fixed number of positions, which steps as "
            "graphs have; leave it out, or give --speed.compile=false"
        )
    return replace(speed, graph=graph, last_block=speed.last_block or ("scored" if graph else "whole"))
