"""Data sets from ordinals to batches, of sequences and of dialogues, and the samplers that give the ordinals.

Noise is a pure function of (seed, ordinal), so whole batches are made of nothing but a list of ordinals.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from llada_lightning.data.manifest import Manifest
from llada_lightning.data.order import EpochOrder, Mixture
from llada_lightning.data.shards import ShardReader
from llada_lightning.objectives import forward_process
from llada_lightning.objectives.batches import TrainingBatch, ValidationBatch, scored_positions
from llada_lightning.objectives.densities import Density
from llada_lightning.objectives.forward_process import TimeSampling
from llada_lightning.support.errors import UserError

if TYPE_CHECKING:
    from llada_lightning.data.dialogues import Pairs

Ints = npt.NDArray[np.int64]


class TokenStream:
    """The sequences of one split of a weighted mixture, by ordinal.

    Args:
        folders: The prepared folder (or URL) of each source, as litdata takes it.
        manifests: The manifest of each folder.
        split: The name of the split, "train" or "val".
        weights: The weight of each source in the mixture.
        sequence_length: The number of tokens of a sequence (L).
        seed: The seed of the order.
        window_shards: The number of shards whose items are shuffled together.
        limits: The number of sequences of each source that are read at all; None: all.
    """

    def __init__(
        self,
        folders: Sequence[str],
        manifests: Sequence[Manifest],
        split: str,
        weights: Sequence[float],
        sequence_length: int,
        seed: int,
        window_shards: int,
        limits: Sequence[int] | None = None,
    ) -> None:
        self.sequence_length, self._vocab_size = sequence_length, manifests[0].tokenizer.vocab_size
        self.mixture = Mixture(weights)
        self.orders = [
            EpochOrder(
                [shard.tokens // sequence_length for shard in manifest.splits[split].shards],
                seed,
                source,
                window_shards,
                None if limits is None else limits[source],
            )
            for source, manifest in enumerate(manifests)
        ]
        self._readers = [
            ShardReader(folder, split, manifest, sequence_length)
            for folder, manifest in zip(folders, manifests, strict=True)
        ]

    def locate(self, ordinal: int) -> tuple[int, int]:
        """Returns the source and the item of an ordinal."""
        source, position = self.mixture.locate(ordinal)
        return source, self.orders[source].item(position)

    def tokens(self, ordinals: Sequence[int]) -> Tensor:
        """Returns the tokens of ordinals: (B, L) int64.

        Raises:
            UserError: A shard is not what was prepared, or holds a token that the tokenizer does not have.
        """
        located = [self.locate(ordinal) for ordinal in ordinals]
        tokens_BL = torch.stack([self._readers[source][item].long() for source, item in located])
        foreign = ((tokens_BL < 0) | (tokens_BL >= self._vocab_size)).any(dim=1).nonzero()
        if len(foreign):
            source, item = located[int(foreign[0])]
            raise UserError(
                f"data.path: sequence {item} of '{self._readers[source].folder}' has tokens beyond the vocabulary of "
                f"{self._vocab_size}; the shards are damaged: prepare the corpus again"
            )
        return tokens_BL

    def document(self, ordinal: int, eos_token_id: int) -> int:
        """Returns a number that is equal for all sequences that begin in the same document.

        It is the position of the document's first token, behind the last EOS before the sequence. EOS ends every
        document.
        """
        source, item = self.locate(ordinal)
        earlier = sum(order.items for order in self.orders[:source]) * self.sequence_length
        return earlier + self._readers[source].last_before(item, eos_token_id)


@dataclass(eq=False)
class TrainingDataset(Dataset[TrainingBatch]):
    """The micro-batch of a list of ordinals, with noise of a seed; the settings are those of ``TokenDataModule``."""

    stream: TokenStream
    seed: int
    mask_eps: float
    time_sampling: TimeSampling
    random_length_share: float
    eos_token_id: int
    global_batch: int
    micro_batch: int
    document_mask: bool = False
    density: Density | None = None
    block_length: int | None = None

    def __getitems__(self, ordinals: list[int]) -> TrainingBatch:
        n_B = np.asarray(ordinals, dtype=np.int64)
        length = self.stream.sequence_length
        lengths_B = self._lengths(n_B)
        drawn = (self.seed, n_B, self.time_sampling, self.density, self.global_batch)
        t_B, q_B = forward_process.drawn_ratio(*drawn, self.block_length, length)
        p_B = forward_process.mask_probability(t_B, self.mask_eps)
        masked_BL = torch.from_numpy(forward_process.random_mask(self.seed, n_B, p_B, length, self.block_length))
        tokens_BL = self.stream.tokens(ordinals)
        attention_mask_BL = None
        if (lengths_B < length).any():
            attention_mask_BL = _between(0 * lengths_B, lengths_B, length)
            tokens_BL = tokens_BL.masked_fill(~attention_mask_BL, self.eos_token_id)
            masked_BL = masked_BL & attention_mask_BL
        # Every rank knows the tokens of the global batch without communication.
        first = int(n_B[0]) - int(n_B[0]) % self.global_batch
        global_tokens = int(self._lengths(np.arange(first, first + self.global_batch)).sum())
        scored_M, scored = scored_positions(masked_BL)
        return TrainingBatch(
            tokens_BL=tokens_BL,
            attention_mask_BL=attention_mask_BL,
            masked_BL=masked_BL,
            p_B=torch.from_numpy(p_B).float(),
            ordinals_B=torch.from_numpy(n_B),
            scored_M=scored_M,
            scored=scored,
            denominator=global_tokens * self.micro_batch / self.global_batch,
            global_tokens=global_tokens,
            documents_BL=document_numbers(tokens_BL, self.eos_token_id) if self.document_mask else None,
            density_B=None if q_B is None else torch.from_numpy(q_B).float(),
        )

    def _lengths(self, ordinals_B: Ints) -> Ints:
        length, share = self.stream.sequence_length, self.random_length_share
        return forward_process.random_lengths(self.seed, ordinals_B, length, share)


@dataclass(eq=False)
class ValidationDataset(Dataset[ValidationBatch]):
    """The validation batch of a list of ordinals, with the masks of Eq. 14.

    Ordinals from the number of sequences on only fill the batch.
    """

    stream: TokenStream
    sequences: int
    noise_seed: int
    eos_token_id: int
    document_mask: bool = False
    block_length: int | None = None

    def __getitems__(self, ordinals: list[int]) -> ValidationBatch:
        n_B = np.asarray(ordinals, dtype=np.int64)
        counted_B = n_B < self.sequences
        n_B = np.where(counted_B, n_B, 0)
        length = self.stream.sequence_length
        masked_BL = forward_process.validation_mask(self.noise_seed, n_B, length, self.block_length)
        tokens_BL = self.stream.tokens(n_B.tolist())
        return ValidationBatch(
            tokens_BL=tokens_BL,
            masked_BL=torch.from_numpy(masked_BL),
            counted_B=torch.from_numpy(counted_B),
            documents_B=torch.tensor([self.stream.document(n, self.eos_token_id) for n in n_B.tolist()]),
            ordinals_B=torch.from_numpy(n_B),
            noise_seed=self.noise_seed,
            documents_BL=document_numbers(tokens_BL, self.eos_token_id) if self.document_mask else None,
        )


def document_numbers(tokens_BL: Tensor, eos_token_id: int) -> Tensor:
    """Returns the number of the document of each token within its sequence, from 0: (B, L) int64. EOS ends a document.

    The true tokens count: a masked token still belongs to its document. In autoregression these are the documents of
    the predicted tokens; the input is shifted by one, so that a document's first token is predicted from EOS alone.
    """
    ends_BL = (tokens_BL == eos_token_id).long()
    return ends_BL.cumsum(dim=1) - ends_BL


# --- dialogues: prompts with responses --------------------------------------------------------------------------------


class PairStream:
    """The pair of each ordinal: an epoch reads each dialogue once, in an order by the seed, and draws one of its pairs.

    Args:
        pairs: All pairs.
        dialogues_N: (N,) int64: The dialogues of the split.
        seed: The seed of the order and of the drawn turns.
        pad_together: The number of ordinals, from a multiple of it on, that are padded to the longest pair of them.
    """

    def __init__(self, pairs: Pairs, dialogues_N: Ints, seed: int, pad_together: int) -> None:
        self.pairs, self.dialogues_N, self.seed, self.pad_together = pairs, dialogues_N, seed, pad_together
        self._order = EpochOrder([len(dialogues_N)], seed)

    def drawn(self, ordinals: Ints) -> Ints:
        """Returns the pair of each ordinal: (B,) int64."""
        items = [self._order.item(int(n)) for n in ordinals]
        return self.pairs.drawn(self.dialogues_N[items], self.seed, ordinals)

    def padded_lengths(self, ordinals: Ints) -> Ints:
        """Returns the number of tokens of each ordinal's pair with its padding EOS: (B,) int64.

        Groups are formed by ordinals, not by micro-batches, so that devices and accumulation change nothing.
        """
        first = ordinals - ordinals % self.pad_together
        groups = np.unique(first)
        members = (groups[:, None] + np.arange(self.pad_together)).ravel()
        lengths = self.pairs.lengths[self.drawn(members)].reshape(len(groups), -1).max(axis=1)
        return lengths[np.searchsorted(groups, first)]


@dataclass(eq=False)
class PairDataset(Dataset[TrainingBatch]):
    """The micro-batch of a list of ordinals. Prompts are never masked; padding EOS is response (Algorithm 2)."""

    stream: PairStream
    eos_id: int
    mask_eps: float
    time_sampling: TimeSampling
    global_batch: int
    density: Density | None = None
    block_length: int | None = None
    _tokens_of_step: dict[int, int] = field(default_factory=dict, init=False)
    """The tokens of the last step alone, whose micro-batches ask for the same."""

    def __getitems__(self, ordinals: list[int]) -> TrainingBatch:
        n_B = np.asarray(ordinals, dtype=np.int64)
        stream, seed = self.stream, self.stream.seed
        pairs_B, padded_B = stream.drawn(n_B), stream.padded_lengths(n_B)
        prompts_B, lengths_B = stream.pairs.prompts_P[pairs_B], stream.pairs.lengths[pairs_B]
        length = int(padded_B.max())
        drawn = (seed, n_B, self.time_sampling, self.density, self.global_batch)
        t_B, q_B = forward_process.drawn_ratio(*drawn, self.block_length, int(stream.pairs.lengths.max()))
        p_B = forward_process.mask_probability(t_B, self.mask_eps)
        masked_BL = torch.from_numpy(forward_process.random_mask(seed, n_B, p_B, length, self.block_length))
        masked_BL &= _between(prompts_B, padded_B, length)
        step = int(n_B[0]) // self.global_batch
        if step not in self._tokens_of_step:
            of_step = np.arange(step * self.global_batch, (step + 1) * self.global_batch)
            self._tokens_of_step = {step: int(stream.padded_lengths(of_step).sum())}
        scored_M, scored = scored_positions(masked_BL)
        return TrainingBatch(
            tokens_BL=stream.pairs.rows(pairs_B, self.eos_id, length),
            attention_mask_BL=None if (padded_B == length).all() else _between(0 * padded_B, padded_B, length),
            masked_BL=masked_BL,
            p_B=torch.from_numpy(p_B).float(),
            ordinals_B=torch.from_numpy(n_B),
            scored_M=scored_M,
            scored=scored,
            denominator=float(len(n_B)),
            global_tokens=self._tokens_of_step[step],
            response_BL=_between(prompts_B, lengths_B, length),
            response_lengths_B=torch.from_numpy(padded_B - prompts_B),
            density_B=None if q_B is None else torch.from_numpy(q_B).float(),
        )


@dataclass(eq=False)
class PairValidationDataset(Dataset[ValidationBatch]):
    """The validation batch of a list of ordinals: each response with its EOS, unpadded, masked as in Eq. 6.

    So a masked objective knows the length of the response, as in the paper's likelihoods, and autoregression does not.
    The turns, as the masks, are drawn by the seed.
    """

    pairs: Pairs
    dialogues_N: Ints
    seed: int
    eos_id: int
    block_length: int | None = None

    def __getitems__(self, ordinals: list[int]) -> ValidationBatch:
        n_B = np.asarray(ordinals, dtype=np.int64)
        counted_B = n_B < len(self.dialogues_N)
        n_B = np.where(counted_B, n_B, 0)
        pairs_B = self.pairs.drawn(self.dialogues_N[n_B], self.seed, n_B)
        prompts_B, lengths_B = self.pairs.prompts_P[pairs_B], self.pairs.lengths[pairs_B]
        length = int(lengths_B.max())
        masked_BL = torch.zeros(len(n_B), length, dtype=torch.bool)
        for row, n, begin, end in zip(masked_BL, n_B, prompts_B, lengths_B, strict=True):
            place = (int(end - begin), self.block_length, int(begin), int(self.pairs.lengths.max()))
            row[begin:end] = torch.from_numpy(forward_process.validation_mask(self.seed, n[None], *place)[0])
        return ValidationBatch(
            tokens_BL=self.pairs.rows(pairs_B, self.eos_id, length),
            masked_BL=masked_BL,
            counted_B=torch.from_numpy(counted_B),
            documents_B=torch.from_numpy(self.dialogues_N[n_B]),
            ordinals_B=torch.from_numpy(n_B),
            noise_seed=self.seed,
            attention_mask_BL=_between(0 * lengths_B, lengths_B, length),
            response_BL=_between(prompts_B, lengths_B, length),
        )


def _between(begin_B: Ints, end_B: Ints, length: int) -> Tensor:
    """(B, length) bool: begin <= position < end."""
    positions_L = np.arange(length)[None]
    return torch.from_numpy((positions_L >= begin_B[:, None]) & (positions_L < end_B[:, None]))


# --- the ordinals of each rank ----------------------------------------------------------------------------------------


@dataclass(eq=False)
class OrdinalSampler(Sampler[list[int]]):
    """The ordinals of each micro-batch of one rank, from a step on, without end.

    Step s consumes the ordinals sG to sG + G - 1. Micro-batch a of rank r takes the (a * ranks + r)-th run of
    ``micro_batch`` ordinals, so that ranks and accumulation only cut the same global batch (of G sequences).
    """

    first_step: int
    global_batch: int
    micro_batch: int
    rank: int
    ranks: int

    def __iter__(self) -> Iterator[list[int]]:
        assert self.global_batch % (self.micro_batch * self.ranks) == 0
        step = self.first_step
        while True:
            start, end = step * self.global_batch, (step + 1) * self.global_batch
            for first in range(start + self.rank * self.micro_batch, end, self.ranks * self.micro_batch):
                yield list(range(first, first + self.micro_batch))
            step += 1


@dataclass(eq=False)
class StridedSampler(Sampler[list[int]]):
    """The ordinals 0 to ``sequences`` - 1 of one rank in batches.

    Every rank has the same number of full batches, so that the last ordinals may be past the end.
    """

    sequences: int
    batch: int
    rank: int
    ranks: int

    def __len__(self) -> int:
        return -(-self.sequences // (self.batch * self.ranks))

    def __iter__(self) -> Iterator[list[int]]:
        for i in range(len(self)):
            first = (i * self.ranks + self.rank) * self.batch
            yield list(range(first, first + self.batch))


def take_batch(batch: Any) -> Any:
    """Returns the batch as it is: the collate function of the loaders, whose data sets make whole batches."""
    return batch
