"""Map-style data sets from ordinals to batches: tokens from litdata shards, noise from counters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from llada_lightning.data.manifest import Manifest
from llada_lightning.data.order import EpochOrder, Mixture
from llada_lightning.data.shards import ShardReader
from llada_lightning.objectives import forward_process
from llada_lightning.objectives.batches import TrainingBatch, ValidationBatch, scored_positions
from llada_lightning.objectives.forward_process import TimeSampling
from llada_lightning.support.errors import UserError


@dataclass(frozen=True)
class ForwardProcess:
    """The settings of the noise of pre-training (see ``objectives.forward_process``).

    Args:
        seed: The seed of the noise.
        eps: The smallest mask probability.
        time_sampling: How the mask ratios are drawn.
        random_length_share: The share of the sequences that are cut to a random length.
    """

    seed: int
    eps: float
    time_sampling: TimeSampling
    random_length_share: float


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
        shards = [manifest.splits[split].shards for manifest in manifests]
        self.orders = [
            EpochOrder(
                [shard.tokens // sequence_length for shard in own],
                seed,
                source,
                window_shards,
                None if limits is None else limits[source],
            )
            for source, own in enumerate(shards)
        ]
        self._documents: dict[tuple[int, int], int] = {}
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
            UserError: a shard is not what was prepared, or holds a token that the tokenizer does not have.
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

        Args:
            ordinal: The ordinal of the sequence.
            eos_token_id: The id of EOS.
        """
        source, item = self.locate(ordinal)
        begin, passed = self._place(source, 0), []
        for later in range(item, 0, -1):
            if (source, later) in self._documents:
                begin = self._documents[source, later]
                break
            passed.append((source, later))
            ends = (self._readers[source][later - 1] == eos_token_id).nonzero()
            if len(ends):
                begin = self._place(source, later - 1) + 1 + int(ends[-1])
                break
        # What lies between begins there too: no sequence is looked at twice, however long the documents are.
        self._documents.update(dict.fromkeys(passed, begin))
        return begin

    def _place(self, source: int, item: int) -> int:
        """The position of the first token of a sequence, counted over all sources."""
        return (sum(order.items for order in self.orders[:source]) + item) * self.sequence_length

    def consumed_items(self, ordinals: int) -> list[int]:
        """Returns the number of sequences of each source among the first ``ordinals``, repeats counted."""
        return [int(count) for count in self.mixture.consumed(ordinals)]


class TrainingDataset(Dataset[TrainingBatch]):
    """The micro-batch of a list of ordinals.

    Args:
        stream: The sequences of the training split.
        process: The settings of the noise.
        eos_token_id: The id of EOS.
        global_batch: The number of sequences of an optimizer step.
        micro_batch: The number of sequences of a micro-batch.
        document_mask: Whether the batch tells which token belongs to which document.
    """

    def __init__(
        self,
        stream: TokenStream,
        process: ForwardProcess,
        eos_token_id: int,
        global_batch: int,
        micro_batch: int,
        document_mask: bool = False,
    ) -> None:
        self.stream, self.process, self.eos_token_id = stream, process, eos_token_id
        self.global_batch, self.micro_batch, self.document_mask = global_batch, micro_batch, document_mask

    def __getitems__(self, ordinals: list[int]) -> TrainingBatch:
        n_B = np.asarray(ordinals, dtype=np.int64)
        length, process = self.stream.sequence_length, self.process
        lengths_B = self._lengths(n_B)
        t_B = forward_process.mask_ratio(process.seed, n_B, process.time_sampling)
        p_B = forward_process.mask_probability(t_B, process.eps)
        masked_BL = torch.from_numpy(forward_process.random_mask(process.seed, n_B, p_B, length))
        tokens_BL = self.stream.tokens(ordinals)
        attention_mask_BL = None
        if (lengths_B < length).any():
            attention_mask_BL = torch.arange(length)[None] < torch.from_numpy(lengths_B)[:, None]
            tokens_BL = tokens_BL.masked_fill(~attention_mask_BL, self.eos_token_id)
            masked_BL = masked_BL & attention_mask_BL
        global_tokens = self._global_tokens(int(n_B[0]))
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
        )

    def _lengths(self, ordinals_B: np.ndarray) -> np.ndarray:
        return forward_process.random_lengths(
            self.process.seed, ordinals_B, self.stream.sequence_length, self.process.random_length_share
        )

    def _global_tokens(self, ordinal: int) -> int:
        """The number of tokens of the global batch of an ordinal, which every rank knows without communication."""
        first = ordinal - ordinal % self.global_batch
        return int(self._lengths(np.arange(first, first + self.global_batch)).sum())


class ValidationDataset(Dataset[ValidationBatch]):
    """The validation batch of a list of ordinals, with the masks of Eq. 14.

    Args:
        stream: The sequences of the validation split.
        sequences: The number of validation sequences; the rows of larger ordinals only fill the batch.
        noise_seed: The seed of the masks.
        eos_token_id: The id of EOS.
        document_mask: Whether the batch tells which token belongs to which document.
    """

    def __init__(
        self, stream: TokenStream, sequences: int, noise_seed: int, eos_token_id: int, document_mask: bool = False
    ) -> None:
        self.stream, self.sequences, self.noise_seed = stream, sequences, noise_seed
        self.eos_token_id, self.document_mask = eos_token_id, document_mask

    def __getitems__(self, ordinals: list[int]) -> ValidationBatch:
        n_B = np.asarray(ordinals, dtype=np.int64)
        counted_B = n_B < self.sequences
        n_B = np.where(counted_B, n_B, 0)
        length = self.stream.sequence_length
        counts_B = forward_process.stratified_mask_counts(self.noise_seed, n_B, length)
        masked_BL = forward_process.fixed_count_mask(self.noise_seed, n_B, counts_B, length)
        tokens_BL = self.stream.tokens(n_B.tolist())
        return ValidationBatch(
            tokens_BL=tokens_BL,
            masked_BL=torch.from_numpy(masked_BL),
            counted_B=torch.from_numpy(counted_B),
            documents_B=torch.tensor([self.stream.document(n, self.eos_token_id) for n in n_B.tolist()]),
            documents_BL=document_numbers(tokens_BL, self.eos_token_id) if self.document_mask else None,
        )


def document_numbers(tokens_BL: Tensor, eos_token_id: int) -> Tensor:
    """Returns the number of the document of each token within its sequence, from 0: (B, L) int64. EOS ends a document.

    The true tokens count: a masked token still belongs to its document. In autoregression these are the documents of
    the predicted tokens; the input is shifted by one, so that a document's first token is predicted from EOS alone.
    """
    ends_BL = (tokens_BL == eos_token_id).long()
    return ends_BL.cumsum(dim=1) - ends_BL


class OrdinalSampler(Sampler[list[int]]):
    """The ordinals of each micro-batch of one rank, from a step on, without end.

    Step s consumes the ordinals sG to sG + G - 1. Micro-batch a of rank r takes the (a * ranks + r)-th run of
    ``micro_batch`` ordinals, so that ranks and accumulation only cut the same global batch.

    Args:
        first_step: The first optimizer step.
        global_batch: The number of sequences of an optimizer step (G).
        micro_batch: The number of sequences of a micro-batch.
        rank: The rank of this process among those that read different sequences.
        ranks: The number of these processes.
    """

    def __init__(self, first_step: int, global_batch: int, micro_batch: int, rank: int, ranks: int) -> None:
        assert global_batch % (micro_batch * ranks) == 0
        self.first_step, self.global_batch, self.micro_batch = first_step, global_batch, micro_batch
        self.rank, self.ranks = rank, ranks

    def __iter__(self) -> Iterator[list[int]]:
        step = self.first_step
        while True:
            start, end = step * self.global_batch, (step + 1) * self.global_batch
            for first in range(start + self.rank * self.micro_batch, end, self.ranks * self.micro_batch):
                yield list(range(first, first + self.micro_batch))
            step += 1


class StridedSampler(Sampler[list[int]]):
    """The ordinals 0 to ``sequences`` - 1 of one rank in batches.

    Every rank has the same number of full batches, so that the last ordinals may be past the end.

    Args:
        sequences: The number of validation sequences.
        batch: The number of sequences of a batch.
        rank: The rank of this process among those that read different sequences.
        ranks: The number of these processes.
    """

    def __init__(self, sequences: int, batch: int, rank: int, ranks: int) -> None:
        self.sequences, self.batch, self.rank, self.ranks = sequences, batch, rank, ranks

    def __len__(self) -> int:
        return -(-self.sequences // (self.batch * self.ranks))

    def __iter__(self) -> Iterator[list[int]]:
        for i in range(len(self)):
            first = (i * self.ranks + self.rank) * self.batch
            yield list(range(first, first + self.batch))


def take_batch(batch: Any) -> Any:
    """Returns the batch as it is: the collate function of the loaders, whose data sets make whole batches."""
    return batch
