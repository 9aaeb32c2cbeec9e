"""A training step on random tokens, ours or as released: forward, backward, clipping and AdamW."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch
from lightning import Trainer
from torch import Tensor

from llada_lightning.compute.shapes import Shape
from llada_lightning.objectives.batches import TrainingBatch, bucketed, scored_positions
from llada_lightning.objectives.forward_process import mask_probability, mask_ratio, random_mask
from llada_lightning.support.errors import UserError
from llada_lightning.training import ArmModule, LladaModule
from llada_lightning.training.callbacks.profile import milliseconds, stopwatch
from llada_lightning.training.language_module import LanguageModule
from llada_lightning.training.machine import Speed, resolve_speed
from llada_lightning.training.step_graphs import StepGraphs
from released_loop import released_arm_loss, released_llada_loss

LEARNING_RATE, CLIP = 1e-4, 1.0
FIRST_LOSSES = 3
"""Steps whose losses are compared between variants."""


@dataclass(frozen=True)
class Variant:
    """A way to compute a training step.

    Attributes:
        name: in the table.
        released: all logits and the loss as in ``released_loop``; ``speed`` must be the plain one.
        speed: of the module, as far as it does not follow from the machine.
        bf16: under autocast, as bf16-mixed; else fp32.
        fused: one kernel for AdamW.
        reference: others are compared with it; where there are several, with the first that was measured.
    """

    name: str
    released: bool = False
    speed: Speed = field(default_factory=lambda: Speed(loss="plain", compile=False))
    bf16: bool = False
    fused: bool = False
    reference: bool = False


@dataclass(frozen=True)
class Workload:
    """What is trained, and where. Of the vocabulary the last word is [MASK], the one before EOS."""

    objective: str
    shape: Shape
    vocab_size: int
    sequence_length: int
    micro_batch: int
    device: torch.device

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.micro_batch * self.sequence_length

    def module(self) -> LanguageModule:
        """Without weights yet; [MASK] has a logit, as released."""
        module_class = {"arm": ArmModule, "llada": LladaModule}[self.objective]
        mask_id, eos_id = self.vocab_size - 1, self.vocab_size - 2
        return module_class(vars(self.shape), self.vocab_size, mask_id, eos_id, compat="llada")

    def model(self, speed: Speed) -> LanguageModule:
        """The module with the same weights each time, built on the device."""
        module = self.module()
        module.speed = speed
        with self.device:
            module.configure_model()
        return module.to(self.device)  # which it now knows to be its own

    def batches(self, count: int, seed: int = 0) -> list[TrainingBatch]:
        """Random words, masked as in pre-training."""
        rng = np.random.default_rng(seed)
        return [self._batch(rng, seed, first=number * self.micro_batch) for number in range(count)]

    def _batch(self, rng: np.random.Generator, seed: int, first: int) -> TrainingBatch:
        ordinals_B = np.arange(first, first + self.micro_batch)
        p_B = mask_probability(mask_ratio(seed, ordinals_B))
        masked_BL = torch.from_numpy(random_mask(seed, ordinals_B, p_B, self.sequence_length))
        scored_M, scored = scored_positions(masked_BL)
        tokens_BL = rng.integers(0, self.vocab_size - 2, (self.micro_batch, self.sequence_length))
        return TrainingBatch(
            tokens_BL=torch.from_numpy(tokens_BL).to(self.device),
            attention_mask_BL=None,
            masked_BL=masked_BL.to(self.device),
            p_B=torch.from_numpy(p_B).float().to(self.device),
            ordinals_B=torch.from_numpy(ordinals_B),
            scored_M=scored_M.to(self.device),
            scored=scored,
            denominator=float(self.tokens),
            global_tokens=self.tokens,
        )


class Steps:
    """The steps of a variant, one after the other, over the same few batches again and again.

    Attributes:
        losses: of the first steps, nats a token.
    """

    def __init__(self, variant: Variant, workload: Workload, batches: list[TrainingBatch]) -> None:
        self.variant, self.workload, self.batches = variant, workload, batches
        trainer = trainer_of(variant, workload)
        self.module = workload.model(resolve_speed(variant.speed, workload.shape, trainer, training=True)[0])
        self.optimizer = adamw(self.module, variant.fused)
        self.graphs: StepGraphs | None = None
        if variant.speed.graph:
            self.module.trainer = trainer  # it says that there is one process
            masks = self.module.facts.masks
            most = bucketed(max(int(batch.scored) for batch in batches) if masks else workload.tokens)
            self.graphs = StepGraphs(self.module, self.optimizer, CLIP, 1, most)
        self.done = 0
        self._losses: list[Tensor] = []

    @property
    def losses(self) -> list[float]:
        return [float(loss) for loss in self._losses]

    def step(self) -> None:
        """One step, without waiting for the device."""
        batch = self.batches[self.done % len(self.batches)]
        with torch.autocast(self.workload.device.type, torch.bfloat16, enabled=self.variant.bf16):
            loss = self.loss(batch) if self.graphs is None else self.graphs.loss(batch)
        self.done += 1
        if self.graphs is None:
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.module.parameters(), CLIP)
            self.optimizer.step()
            self.optimizer.zero_grad()
        elif loss is None:
            raise RuntimeError(f"the step could not be recorded: {self.graphs.refusal}")
        else:
            self.graphs.update([loss], self.done)
        if len(self._losses) < FIRST_LOSSES:
            self._losses.append(loss.detach())

    def loss(self, batch: TrainingBatch) -> Tensor:
        module = self.module
        if not self.variant.released:
            return module.training_loss(batch)
        if module.objective == "arm":
            assert module.eos_token_id is not None
            return released_arm_loss(module.model, batch.tokens_BL, module.eos_token_id)
        assert module.mask_token_id is not None
        return released_llada_loss(module.model, batch.tokens_BL, batch.masked_BL, batch.p_B, module.mask_token_id)

    def timed(self, steps: int) -> list[float]:
        """Seconds of each of some more steps: of the clock, on a GPU between events in its queue."""
        now = stopwatch(self.workload.device)
        marks = [now()]
        for _ in range(steps):
            self.step()
            marks.append(now())
        synchronise(self.workload.device)
        return [milliseconds(start, end) / 1e3 for start, end in pairwise(marks)]


def adamw(module: LanguageModule, fused: bool) -> torch.optim.AdamW:
    """With decay on matrices only, as ours has it; not fused it is what torch gives by default."""
    settings, parameters = module.optimizer_settings, list(module.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups, lr=LEARNING_RATE, betas=settings.betas, eps=settings.eps, fused=True if fused else None
    )


def trainer_of(variant: Variant, workload: Workload) -> Trainer:
    """A trainer of one device that trains nothing: settings follow from it."""
    return Trainer(
        accelerator="gpu" if workload.device.type == "cuda" else workload.device.type,
        devices=1,
        precision="bf16-mixed" if variant.bf16 else "32-true",
        logger=False,
        enable_checkpointing=False,
    )


def obstacle(variant: Variant, workload: Workload) -> str | None:
    """Why a variant cannot run on this machine, in a few words; None: nothing is known."""
    if variant.speed.graph and workload.device.type != "cuda":
        return "graphs need a CUDA device"
    try:
        resolved, lines = resolve_speed(variant.speed, workload.shape, trainer_of(variant, workload), training=True)
    except UserError as error:
        return str(error).split(" given, but ")[-1]
    return None if resolved.compile == variant.speed.compile else lines[0]


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
