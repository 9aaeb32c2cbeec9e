"""What the loaders hand to the modules: tokens beside their noise.

Map-style data sets from ordinals to batches: tokens from litdata shards, noise from counters.
"""

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
    """How the noise of pre-training is drawn (see ``objectives.forward_process``)."""

    seed: int
    eps: float
    time_sampling: TimeSampling
    random_length_share: float


class TokenStream:
    """The sequences of one split of a weighted mixture, by ordinal.

    Args:
        folders: the prepared folders (or URLs), as litdata takes them; one a source.
        manifests: of the folders.
        split: "train" or "val".
        weights: of the mixture.
        sequence_length: L.
        seed: of the order.
        window_shards: shards whose items are shuffled together.
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
        """Source and item of an ordinal."""
        source, position = self.mixture.locate(ordinal)
        return source, self.orders[source].item(position)

    def tokens(self, ordinals: Sequence[int]) -> Tensor:
        """(B, L) int64.

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
        """A number for the document that a sequence begins in, equal for all sequences that do.

        It is the place of the document's beginning: of the last EOS before the sequence, looked for backwards. EOS
        ends every document.
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
        """A sequence's first token, counted over all sources."""
        return (sum(order.items for order in self.orders[:source]) + item) * self.sequence_length

    def consumed_items(self, ordinals: int) -> list[int]:
        """Sequences read from each source by the first ``ordinals`` ones, repeats counted."""
        return [int(count) for count in self.mixture.consumed(ordinals)]


class TrainingDataset(Dataset[TrainingBatch]):
    """Ordinals of a micro-batch -> the micro-batch; with ``document_mask``, what belongs to which document."""

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
        """Tokens of the global batch that holds an ordinal: known to every rank without communication."""
        first = ordinal - ordinal % self.global_batch
        return int(self._lengths(np.arange(first, first + self.global_batch)).sum())


class ValidationDataset(Dataset[ValidationBatch]):
    """Ordinals of a validation batch -> the batch, with Eq. 14's masks. Ordinals beyond ``sequences`` fill up."""

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
    """(B, L) int64: which document of its sequence a token belongs to, counted from 0. EOS ends its document.

    Of the true tokens: what is masked still belongs to its document. For `arm` these are the documents of what is
    predicted; the input there stands one place behind, so that a document's first token is predicted from EOS alone.
    """
    ends_BL = (tokens_BL == eos_token_id).long()
    return ends_BL.cumsum(dim=1) - ends_BL


class OrdinalSampler(Sampler[list[int]]):
    """The ordinals of each micro-batch of one rank, from a given step on, without end.

    Step s consumes the ordinals sG to sG + G - 1. Micro-batch a of rank r takes the (a * ranks + r)-th run of
    ``micro_batch`` ordinals, so that ranks and accumulation only cut the same global batch.
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
    """Batches of the ordinals 0..sequences-1 of one rank; every rank has the same number of full batches, whose
    ordinals run past the end where the sequences do not divide."""

    def __init__(self, sequences: int, batch: int, rank: int, ranks: int) -> None:
        self.sequences, self.batch, self.rank, self.ranks = sequences, batch, rank, ranks

    def __len__(self) -> int:
        return -(-self.sequences // (self.batch * self.ranks))

    def __iter__(self) -> Iterator[list[int]]:
        for i in range(len(self)):
            first = (i * self.ranks + self.rank) * self.batch
            yield list(range(first, first + self.batch))


def take_batch(batch: Any) -> Any:
    """The loader's collate function: the data sets make whole batches."""
    return batch
