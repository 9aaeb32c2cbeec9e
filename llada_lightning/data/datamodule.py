"""The data module of pre-training, which all objectives share."""

from __future__ import annotations

import hashlib
from typing import Any

from torch.utils.data import DataLoader

from llada_lightning.compute.flops import expected_length
from llada_lightning.data.datasets import (
    ForwardProcess,
    OrdinalSampler,
    StridedSampler,
    TokenStream,
    TrainingDataset,
    ValidationDataset,
)
from llada_lightning.data.integrity import check_shards
from llada_lightning.data.language_datamodule import LanguageDataModule
from llada_lightning.data.manifest import (
    TOKENIZER_NAME,
    Manifest,
    TokenizerInfo,
    check_sequence_length,
    local_path,
    read_manifest,
    read_tokenizer_text,
)
from llada_lightning.data.order import WINDOW_SHARDS, Mixture
from llada_lightning.run import sequences_read
from llada_lightning.support.errors import UserError


class TokenDataModule(LanguageDataModule):
    """Streams sequences of fixed length from one prepared corpus, or from a weighted mixture of several.

    Order and noise are pure functions of (seed, ordinal): the number of devices, workers and micro-batches changes no
    result, and a resumed run needs only its step.

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
        self._manifests: list[Manifest] | None = None

    @property
    def manifests(self) -> list[Manifest]:
        """The manifest of each source, read once.

        Raises:
            UserError: a manifest is missing or damaged, or the sources have different tokenizers.
        """
        if self._manifests is None:
            self._manifests = [read_manifest(folder) for folder in self.weights]
            first, *others = self._manifests
            for folder, manifest in zip(list(self.weights)[1:], others, strict=True):
                if manifest.tokenizer.fingerprint != first.tokenizer.fingerprint:
                    raise UserError(
                        f"data.path: '{folder}' was prepared with another tokenizer than the mixture's first source; "
                        "prepare it again with --tokenizer of the first"
                    )
        return self._manifests

    @property
    def tokenizer(self) -> TokenizerInfo:
        """Vocabulary size, special ids and fingerprint of the one tokenizer of all sources."""
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

    @property
    def tokens_per_sequence(self) -> float:
        """The expected number of tokens of a training sequence: below L, because some have a random length."""
        return expected_length(self.sequence_length, self.random_length_share)

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of the validation text for each token: the mean over the sources by their weights."""
        weights = list(self.weights.values())
        by_source = [m.splits["val"].bytes_per_token for m in self.manifests]
        return sum(w * b for w, b in zip(weights, by_source, strict=True)) / sum(weights)

    @property
    def lost_share(self) -> float:
        """The share of the validation text's bytes that its tokens do not decode to: the largest of all sources."""
        return max(manifest.splits["val"].lost_share for manifest in self.manifests)

    def unique_tokens(self, steps: int) -> int:
        """The number of distinct tokens (of full sequences) that a run of ``steps`` steps reads."""
        return sum(min(read, items) for read, items in self._read_of(steps)) * self.sequence_length

    def epochs(self, steps: int) -> float:
        """The number of passes of a run of ``steps`` steps over the source that it repeats most."""
        return max(read / items for read, items in self._read_of(steps))

    def _read_of(self, steps: int) -> list[tuple[int, int]]:
        """The number of sequences of each source that a run reads, repeats counted, and that the source has."""
        read = Mixture(list(self.weights.values())).consumed(steps * self.batch)
        return list(zip(read.tolist(), self._train_sequences(), strict=True))

    def _train_sequences(self) -> list[int]:
        """The number of training sequences of each source that are read at all."""
        present = [m.splits["train"].items(self.sequence_length) for m in self.manifests]
        return sequences_read(present, list(self.weights.values()), self.sequence_length, self.train_tokens)

    def check(self) -> None:
        """Refuses a data folder with missing, cut or foreign files, or whose shards are shorter than a sequence.

        The bytes of a shard are checked when it is first read.
        """
        for folder, manifest in zip(self.weights, self.manifests, strict=True):
            check_shards(folder, manifest)
            check_sequence_length(manifest, self.sequence_length)

    def train_dataloader(self) -> DataLoader:
        assert self.trainer is not None
        process = ForwardProcess(self.seed, self.mask_eps, self.time_sampling, self.random_length_share)
        dataset = TrainingDataset(
            self._stream("train", self.seed, self._train_sequences()),
            process,
            self.tokenizer.eos_id,
            self.batch,
            self.micro_batch,
            self.document_mask,
        )
        sampler = OrdinalSampler(self.trainer.global_step, self.batch, self.micro_batch, *self._replica)
        return self._loader(dataset, sampler)

    def val_dataloader(self) -> DataLoader:
        assert self.trainer is not None
        stream = self._stream("val", self.val_seed)
        sequences = available_sequences(stream, self.val_sequences)
        batch = self._val_batch or self.micro_batch
        sampler = StridedSampler(sequences, batch, *self._replica)
        dataset = ValidationDataset(stream, sequences, self.val_seed, self.tokenizer.eos_id, self.document_mask)
        return self._loader(dataset, sampler)

    test_dataloader = val_dataloader
    predict_dataloader = val_dataloader

    def _stream(self, split: str, seed: int, limits: list[int] | None = None) -> TokenStream:
        return TokenStream(
            folders=[_for_litdata(folder) for folder in self.weights],
            manifests=self.manifests,
            split=split,
            weights=list(self.weights.values()),
            sequence_length=self.sequence_length,
            seed=seed,
            window_shards=self.window_shards,
            limits=limits,
        )


def _for_litdata(folder: str) -> str:
    """A folder as litdata takes it: ``~`` and ``file://`` resolved; its own prefix ``local:`` kept."""
    return (folder if folder.startswith("local:") else local_path(folder) or folder).rstrip("/")


def available_sequences(stream: TokenStream, wanted: int | None) -> int:
    """Returns the number of validation sequences before any source repeats, at most ``wanted``."""
    totals = [order.items for order in stream.orders]
    low, high = 0, sum(totals) + 1
    while high - low > 1:
        middle = (low + high) // 2
        fits = all(c <= t for c, t in zip(stream.consumed_items(middle), totals, strict=True))
        low, high = (middle, high) if fits else (low, middle)
    return low if wanted is None else min(low, wanted)
