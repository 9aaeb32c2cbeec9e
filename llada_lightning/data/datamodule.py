"""The data module of pre-training, for all objectives."""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.data import DataLoader

from llada_lightning.compute.flops import expected_length
from llada_lightning.data import TOKENIZER_NAME, TokenizerInfo
from llada_lightning.data.datasets import (
    TokenStream,
    TrainingDataset,
    ValidationDataset,
)
from llada_lightning.data.loading import LanguageDataModule
from llada_lightning.data.manifest import (
    Manifest,
    check_sequence_length,
    read_manifest,
    read_tokenizer_text,
)
from llada_lightning.data.order import WINDOW_SHARDS, Mixture
from llada_lightning.data.shards import check_shards
from llada_lightning.data.validation import ValidationCorpus, held_out_corpora, mixture_sources
from llada_lightning.objectives.batches import bucketed
from llada_lightning.objectives.forward_process import drawn_ratio, mask_probability
from llada_lightning.run import sequences_read
from llada_lightning.support.errors import UserError
from llada_lightning.support.files import local_path

_LOOKED_AT = 256
"""The number of micro-batches by which the largest number of masked positions is estimated."""


class TokenDataModule(LanguageDataModule):
    """Streams sequences of fixed length from one prepared corpus, or from a weighted mixture of several.

    Args:
        path: The folder (or URL) that `llada prepare` wrote, or a mapping from such folders to mixture weights.
        sequence_length: The number of tokens of a sequence (L).
        random_length_share: The share of the training sequences that are cut to a random length (paper, Sec. 2.2).
        window_shards: The number of shards whose sequences are shuffled together.
        document_mask: Whether a token attends only to its own document within the sequence, in training and in
            validation. FLOPs are counted as for full attention, which is an upper count.
        train_tokens: The number of distinct training tokens, which are read again and again; null: all. They come from
            the beginning of each shard and are the same for every seed; each source of a mixture gives the share of
            its weight.
        held_out: Further corpora, as a mapping from a name to a prepared folder with the same tokenizer. The loss on
            the `val` split of each is measured at the end of a run, and by `llada validate`. It changes neither the run
            nor its own validation loss.
        loader: The other settings of :class:`LanguageDataModule`, by name.
    """

    def __init__(
        self,
        path: dict[str, float] | str,
        sequence_length: int = 256,
        random_length_share: float = 0.01,
        window_shards: int = WINDOW_SHARDS,
        document_mask: bool = False,
        train_tokens: int | None = None,
        held_out: dict[str, str] | None = None,
        **loader: Any,
    ) -> None:
        super().__init__(sequence_length=sequence_length, **loader)
        if window_shards < 1:
            raise UserError(f"data.window_shards: {window_shards} must be at least 1")
        if not path:
            raise UserError("data.path: no folder given; name one that llada prepare wrote")
        if not 0 <= random_length_share <= 1:
            raise UserError(f"data.random_length_share: {random_length_share} must lie between 0 and 1")
        if train_tokens is not None and train_tokens < sequence_length:
            raise UserError(f"data.train_tokens: {train_tokens} is below one sequence of {sequence_length}; raise it")
        self.train_tokens = train_tokens
        self.weights = {path: 1.0} if isinstance(path, str) else dict(path)
        self.random_length_share, self.window_shards = random_length_share, window_shards
        self.document_mask = document_mask
        self.held_out = dict(held_out or {})

    static_shapes = True

    @cached_property
    def manifests(self) -> list[Manifest]:
        """The manifest of each source.

        Raises:
            UserError: A manifest is missing or damaged, or the sources have different tokenizers.
        """
        manifests = [read_manifest(folder) for folder in self.weights]
        for folder, manifest in zip(self.weights, manifests, strict=True):
            if manifest.tokenizer.fingerprint != manifests[0].tokenizer.fingerprint:
                raise UserError(
                    f"data.path: '{folder}' was prepared with another tokenizer than the mixture's first source; "
                    "prepare it again with --tokenizer of the first"
                )
        return manifests

    @property
    def tokenizer(self) -> TokenizerInfo:
        return self.manifests[0].tokenizer

    def tokenizer_files(self) -> dict[str, str]:
        return {TOKENIZER_NAME: read_tokenizer_text(next(iter(self.weights)))}

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the corpus, or of the mixture with its weights."""
        if len(self.manifests) == 1:
            return self.manifests[0].fingerprint
        parts = [f"{m.fingerprint}:{w!r}" for m, w in zip(self.manifests, self.weights.values(), strict=True)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    @cached_property
    def val_sources(self) -> list[ValidationCorpus]:
        return mixture_sources(list(self.weights), self.manifests, self.sequence_length)

    @cached_property
    def held_out_corpora(self) -> list[ValidationCorpus]:
        """The corpora of ``held_out``; a UserError where one of them cannot be validated on."""
        return held_out_corpora(self.held_out, self.tokenizer, self.sequence_length)

    @property
    def tokens_per_sequence(self) -> float:
        return expected_length(self.sequence_length, self.random_length_share)

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of the validation text for each token: the mean over the sources by their weights."""
        weights = list(self.weights.values())
        by_source = [m.splits["val"].bytes_per_token for m in self.manifests]
        return sum(w * b for w, b in zip(weights, by_source, strict=True)) / sum(weights)

    @property
    def lost_share(self) -> float:
        return max(manifest.splits["val"].lost_share for manifest in self.manifests)

    @property
    def val_documents(self) -> int:
        return sum(manifest.splits["val"].documents for manifest in self.manifests)

    def unique_tokens(self, steps: int) -> int:
        return sum(min(read, items) for read, items in self._read_of(steps)) * self.sequence_length

    def epochs(self, steps: int) -> float:
        return max(read / items for read, items in self._read_of(steps))

    def _read_of(self, steps: int) -> list[tuple[int, int]]:
        """The number of sequences of each source that a run reads, repeats counted, and that the source has."""
        read = Mixture(list(self.weights.values())).consumed(steps * self.batch)
        return list(zip(read.tolist(), self._train_sequences(), strict=True))

    def _train_sequences(self) -> list[int]:
        """The number of training sequences of each source that are read at all."""
        present = [m.splits["train"].items(self.sequence_length) for m in self.manifests]
        return sequences_read(present, list(self.weights.values()), self.sequence_length, self.train_tokens)

    def most_scored(self, micro_batch: int, steps: int) -> int:
        """The number of masked positions that hardly any micro-batch of a run has more of.

        It lies four standard deviations above the largest expected number of some micro-batches that are spread over
        the run, and is a multiple of ``BUCKET``.

        Args:
            micro_batch: The number of sequences of one.
            steps: The number of steps of the run.
        """
        starts = np.unique(np.linspace(0, max(steps - 1, 0), _LOOKED_AT).astype(np.int64)) * self.batch
        ordinals_N = (starts[:, None] + np.arange(micro_batch)).ravel()
        drawn = (self.seed, ordinals_N, self.time_sampling, self.density, self.batch)
        t_N, _ = drawn_ratio(*drawn, self.block_length, self.sequence_length)
        p_SP = mask_probability(t_N, self.mask_eps).reshape(len(starts), -1)
        positions = micro_batch * self.sequence_length
        width = positions / p_SP.shape[1]  # the positions that share a probability
        counts_S = width * (p_SP.sum(axis=1) + 4 * np.sqrt((p_SP * (1 - p_SP)).sum(axis=1) / width))
        return bucketed(min(positions, int(counts_S.max())))

    def check(self) -> None:
        """Refuses a data folder with missing, cut or foreign files, or whose shards are shorter than a sequence.

        The bytes of a shard are checked when it is first read.
        """
        for folder, manifest in zip(self.weights, self.manifests, strict=True):
            check_shards(folder, manifest)
            check_sequence_length(manifest, self.sequence_length)
        _ = self.held_out_corpora  # each is checked when it is read

    def train_dataloader(self) -> DataLoader:
        return self._training_loader(
            TrainingDataset(
                self._stream("train", self.seed, self.weights, self.manifests, self._train_sequences()),
                seed=self.seed,
                mask_eps=self.mask_eps,
                time_sampling=self.time_sampling,
                random_length_share=self.random_length_share,
                eos_token_id=self.tokenizer.eos_id,
                global_batch=self.batch,
                micro_batch=self.micro_batch,
                document_mask=self.document_mask,
                density=self.density,
                block_length=self.block_length,
            )
        )

    def val_dataloader(self) -> Any:
        """The loader of the validation sequences; outside of training also one for each held-out corpus behind it."""
        own = self.predict_dataloader()
        assert self.trainer is not None
        if not self.held_out or self.trainer.state.fn == TrainerFn.FITTING:
            return own
        return [own, *(self._loader_of({c.folder: 1.0}, [c.manifest]) for c in self.held_out_corpora)]

    test_dataloader = val_dataloader

    def predict_dataloader(self) -> DataLoader:
        return self._loader_of(self.weights, self.manifests)

    def _loader_of(self, weights: Mapping[str, float], manifests: Sequence[Manifest]) -> DataLoader:
        """The validation sequences of corpora, as many as no source repeats and ``val_sequences`` allows."""
        stream = self._stream("val", self.val_seed, weights, manifests)
        totals = np.array([order.items for order in stream.orders])

        def repeats(sequences: int) -> bool:  # any source
            return bool((stream.mixture.consumed(sequences) > totals).any())

        sequences = bisect_left(range(1, int(totals.sum()) + 2), True, key=repeats)
        if self.val_sequences is not None:
            sequences = min(sequences, self.val_sequences)
        end, blocks = self.tokenizer.eos_id, self.block_length
        dataset = ValidationDataset(stream, sequences, self.val_seed, end, self.document_mask, blocks)
        return self._validation_loader(dataset, sequences)

    def _stream(
        self,
        split: str,
        seed: int,
        weights: Mapping[str, float],
        manifests: Sequence[Manifest],
        limits: list[int] | None = None,
    ) -> TokenStream:
        # litdata takes ~ and file:// resolved, and its own prefix local: kept.
        folders = [f if f.startswith("local:") else local_path(f) or f for f in weights]
        return TokenStream(
            [folder.rstrip("/") for folder in folders],
            manifests,
            split,
            list(weights.values()),
            self.sequence_length,
            seed,
            self.window_shards,
            limits,
        )
