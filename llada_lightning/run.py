"""What a plan needs to know of the data stream: words, lengths, and how much there is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from llada_lightning.compute.flops import MASK_EPS, TrainingFlops, expected_length
from llada_lightning.compute.shapes import Shape
from llada_lightning.objectives import get_objective
from llada_lightning.support.errors import UserError


@dataclass(frozen=True)
class Source:
    """One corpus of a mixture.

    Args:
        weight: its share of the sequences, relative to the other sources'.
        sequences: training sequences that it holds.
    """

    weight: float
    sequences: int


@dataclass(frozen=True)
class DataFacts:
    """What prepared data is known to hold, at one sequence length.

    Args:
        vocab_size: words of the tokenizer.
        sources: one, or those of a mixture.
    """

    vocab_size: int
    sources: tuple[Source, ...]


def sequences_read(
    present: Sequence[int], weights: Sequence[float], sequence_length: int, train_tokens: int | None
) -> list[int]:
    """Of each source the training sequences that are read at all: its weight's share of ``train_tokens``, at least one.

    Args:
        present: sequences that each source holds.
        weights: of the sources.
        sequence_length: L.
        train_tokens: distinct tokens that may be read; None: all.
    """
    if train_tokens is None:
        return list(present)
    wanted, total = train_tokens / sequence_length, sum(weights)
    shares = [max(1, round(wanted * weight / total)) for weight in weights]
    return [min(share, held) for share, held in zip(shares, present, strict=True)]


@dataclass(frozen=True)
class Stream:
    """The stream that both objectives train on; defaults as ``llada fit`` has them.

    Args:
        vocab_size: words of embedding and head.
        sequence_length: L, tokens of a full sequence.
        random_length_share: share of the sequences cut to a random length.
        mask_eps: smallest mask probability of the forward process.
        sources: the corpora; none where the data is not known.
    """

    vocab_size: int
    sequence_length: int = 256
    random_length_share: float = 0.01
    mask_eps: float = MASK_EPS
    sources: tuple[Source, ...] = field(default=())

    def check(self) -> None:
        """Refuse what ``llada fit`` would refuse.

        Raises:
            UserError: names the setting.
        """
        if not 0 <= self.random_length_share <= 1:
            raise UserError(f"plan: random_length_share {self.random_length_share:g} must lie between 0 and 1")
        if not 0 < self.mask_eps < 1:
            raise UserError(f"plan: mask_eps {self.mask_eps:g} must lie between 0 and 1")

    def flops_per_token(self, shape: Shape, objective: str) -> TrainingFlops:
        """The expected training FLOPs of one token of an objective, as ``llada fit`` counts them."""
        return get_objective(objective).flops_per_token(shape, self.vocab_size, self.sequence_length, self.mask_eps)

    def tokens_per_step(self, global_batch: int) -> float:
        """Expected tokens of a global batch of so many sequences."""
        return global_batch * expected_length(self.sequence_length, self.random_length_share)

    def epochs(self, sequences: float) -> float | None:
        """How often so many sequences read the source that they repeat most; None where the data is not known."""
        total = sum(source.weight for source in self.sources)
        passes = [sequences * source.weight / total / source.sequences for source in self.sources]
        return max(passes, default=None)

    @property
    def tokens_present(self) -> int | None:
        """Training tokens of all sources together; None where the data is not known."""
        return sum(source.sequences for source in self.sources) * self.sequence_length if self.sources else None
