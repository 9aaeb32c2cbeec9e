"""Data of known entropy: a Markov source that is sampled by counter, and modules that are trained on it a little."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from llada_lightning.data.datasets import TrainingDataset, ValidationDataset
from llada_lightning.objectives import noise
from llada_lightning.objectives.batches import ValidationBatch
from llada_lightning.objectives.uniform import with_training_noise
from llada_lightning.training.language_module import LanguageModule

WORDS, EOS, MASK = 4, 4, 5
SHAPE = {"n_layers": 2, "d_model": 32, "n_heads": 2, "n_kv_heads": 2, "d_ff": 64}
BATCH = 64


@dataclass(frozen=True)
class MarkovSource:
    """A source of order 1, in the place of the token stream of a corpus.

    Args:
        next_VV: (V, V) the distribution of the next word given a word.
        sequence_length: The number of words of a sequence, which begins in the stationary distribution.
        seed: The seed of the sequences.
    """

    next_VV: npt.NDArray[np.float64]
    sequence_length: int
    seed: int

    @property
    def first(self) -> npt.NDArray[np.float64]:
        """(V,) the stationary distribution."""
        return np.linalg.matrix_power(self.next_VV, 1 << 12)[0]

    @property
    def entropy(self) -> float:
        """Of a sequence, in nats."""
        first_V = self.first
        of_next_V = -(self.next_VV * np.log(self.next_VV)).sum(axis=1)
        return float(-(first_V * np.log(first_V)).sum() + (self.sequence_length - 1) * (first_V * of_next_V).sum())

    def tokens(self, ordinals: list[int]) -> Tensor:
        """(B, L) int64, each sequence a pure function of its ordinal."""
        uniform_BL = np.stack(
            [noise.uniform(self.seed, noise.Purpose.FACTS, n, self.sequence_length) for n in ordinals]
        )
        states_BL = np.empty(uniform_BL.shape, dtype=np.int64)
        p_BV = np.broadcast_to(self.first, (len(ordinals), len(self.next_VV)))
        for place in range(self.sequence_length):
            states_BL[:, place] = (uniform_BL[:, place, None] >= p_BV.cumsum(axis=1)[:, :-1]).sum(axis=1)
            p_BV = self.next_VV[states_BL[:, place]]
        return torch.from_numpy(states_BL)

    def nll(self, tokens_BL: Tensor) -> npt.NDArray[np.float64]:
        """(B,) of each sequence by the source itself, in nats."""
        states_BL = tokens_BL.numpy()
        return -np.log(self.first[states_BL[:, 0]]) - np.log(self.next_VV[states_BL[:, :-1], states_BL[:, 1:]]).sum(
            axis=1
        )

    def document(self, ordinal: int, eos_token_id: int) -> int:
        """Every sequence is a document."""
        return ordinal


def source(length: int = 8, seed: int = 0) -> MarkovSource:
    """Four words, each of which is mostly followed by one or two others."""
    next_VV = np.random.default_rng(5).dirichlet(np.full(WORDS, 0.5), size=WORDS)
    return MarkovSource(0.9 * next_VV + 0.1 / WORDS, length, seed)


def trained(kind: type[LanguageModule], data: MarkovSource, steps: int, **settings: object) -> LanguageModule:
    """A module after some steps of Adam at a falling rate, by the batches of a run."""
    module = kind(SHAPE, WORDS + 2, MASK, EOS, seed=1, **settings)
    module.configure_model()
    batches = TrainingDataset(
        data, 7, 1e-3, "weyl", 0.0, EOS, BATCH, BATCH, block_length=module.block_length,  # type: ignore[arg-type]
    )  # fmt: skip
    optimizer = torch.optim.Adam(module.parameters(), lr=3e-3, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, 4 * (1 - step / steps)))
    for step in range(steps):
        batch = batches.__getitems__(list(range(step * BATCH, (step + 1) * BATCH)))
        if module.facts.replaces:
            batch = with_training_noise(batch, batches.seed, module.alphabet)  # type: ignore[attr-defined]
        module.training_loss(batch).backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return module.eval()


def validation(module: LanguageModule, data: MarkovSource, sequences: int) -> ValidationBatch:
    """Sequences that no training has seen, with the noise of a run's validation."""
    batches = ValidationDataset(data, sequences, 11, EOS, block_length=module.block_length)  # type: ignore[arg-type]
    return module.with_noise(batches.__getitems__(list(range(sequences))))  # type: ignore[return-value]
