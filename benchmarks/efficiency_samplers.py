"""The samplers of the efficiency study, and how fast each of them writes (paper, Appendix B.7, Figure 5)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from llada_lightning.checkpoints.language_model import LanguageModel
from llada_lightning.generation.sampler import generate
from llada_lightning.support.errors import UserError


@dataclass(frozen=True)
class Sampler:
    """One way to write answers.

    Args:
        objective: whose sampler it is.
        family: samplers that differ in their steps alone share it.
        steps: of the whole answer; None where a threshold, or the length, decides.
        exact: family of the sampler that this one should agree with, at the same steps; None where it stands alone.
        options: of ``generate``.
    """

    objective: str
    family: str
    steps: int | None = None
    exact: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.family if self.steps is None else f"{self.family}, {self.steps} steps"


@dataclass(frozen=True)
class Timing:
    """What a sampler wrote, and how long it took.

    Args:
        answers: ids of each whole answer, whatever ended within it.
        seconds: of each batch.
        forward_passes: of the model, mean over the batches.
    """

    answers: list[list[int]]
    seconds: list[float]
    forward_passes: float

    @property
    def tokens_per_second(self) -> list[float]:
        """Of each batch, every token of its answers counted."""
        tokens = sum(map(len, self.answers)) / len(self.seconds)
        return [tokens / seconds for seconds in self.seconds]


def study_samplers(
    length: int, steps: Sequence[int], block_length: int, threshold: float, remasking: str
) -> list[Sampler]:
    """Pure diffusion, blocks with and without caches, confidence thresholds; `arm` without and with its cache.

    Raises:
        UserError: the blocks do not divide the length, or the steps do not divide into blocks.
    """
    if length % block_length:
        raise UserError(f"--block-length: {block_length} does not divide length {length}; give one that does")
    blocks, steps = length // block_length, sorted(set(steps))
    uneven = next((count for count in steps if count < 1 or count % blocks), None)
    if uneven is not None:
        raise UserError(f"--steps: {uneven} do not divide into {blocks} blocks; give multiples of {blocks}")
    in_blocks, by_threshold = f"llada, blocks of {block_length}", f"llada, blocks, threshold {threshold:g}"
    cut: dict[str, Any] = {"block_length": block_length, "remasking": remasking}
    sure = {"block_length": block_length, "threshold": threshold}
    return [
        *(Sampler("llada", "llada, pure diffusion", count, options={"remasking": remasking}) for count in steps),
        *(Sampler("llada", in_blocks, count, options=cut) for count in steps),
        *(
            Sampler("llada", f"llada, blocks, {cache} cache", count, in_blocks, {**cut, "cache": cache})
            for cache in ("prefix", "dual")
            for count in steps
        ),
        Sampler("llada", by_threshold, options=sure),
        Sampler("llada", f"{by_threshold}, dual cache", None, by_threshold, {**sure, "cache": "dual"}),
        Sampler("arm", "arm, no cache", options={"cache": "none"}),
        Sampler("arm", "arm, cache", None, "arm, no cache", {"cache": "kv"}),
    ]


def unending(lm: LanguageModel) -> LanguageModel:
    """The same model, for which no token ends an answer: every sampler then writes the whole length."""
    return replace(lm, eos_token_id=-1, end_token_ids=())


def time_samplers(
    models: Mapping[str, LanguageModel],
    samplers: Sequence[Sampler],
    batches: Sequence[list[Any]],
    *,
    length: int,
    temperature: float,
    seed: int,
) -> dict[str, Timing]:
    """Every sampler's answers to the same prompts, by the sampler's name.

    Each sampler first writes one answer to warm up. Then the batches go in turns: all samplers write the first, then
    all the second, so that a machine that slows down does so for all of them.

    Args:
        models: of each objective.
        batches: of prompts, ids or texts, all of one size.
    """
    writers = {objective: unending(lm) for objective, lm in models.items()}
    wanted: dict[str, Any] = {"length": length, "temperature": temperature, "seed": seed}
    for sampler in samplers:
        generate(writers[sampler.objective], batches[0][:1], steps=sampler.steps, **wanted, **sampler.options)
    results: dict[str, list[Any]] = {sampler.name: [] for sampler in samplers}
    for number, prompts in enumerate(batches):
        for sampler in samplers:
            first = number * len(batches[0])
            results[sampler.name].append(
                generate(
                    writers[sampler.objective], prompts, steps=sampler.steps, first=first, **wanted, **sampler.options
                )
            )
    return {
        name: Timing(
            answers=[answer for result in done for answer in result.tokens],
            seconds=[result.seconds for result in done],
            forward_passes=sum(result.forward_passes for result in done) / len(done),
        )
        for name, done in results.items()
    }


def agreement(answers: Sequence[Sequence[int]], others: Sequence[Sequence[int]]) -> float:
    """The share of tokens that are equal, place by place, in answers of one length."""
    return float((torch.tensor(answers) == torch.tensor(others)).double().mean())
