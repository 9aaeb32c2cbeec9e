"""The streaming data module that both objectives share."""

from __future__ import annotations

import hashlib

from torch.utils.data import DataLoader

from llada_lightning.compute.flops import MASK_EPS, expected_length
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
from llada_lightning.objectives.forward_process import TimeSampling
from llada_lightning.run import sequences_read
from llada_lightning.support.errors import UserError


class TokenDataModule(LanguageDataModule):
    """Streams fixed-length sequences of one corpus or of a weighted mixture, with their noise.

    The order and the noise are pure functions of (seed, ordinal): the number of devices, workers and micro-batches
    changes nothing, and a resumed run needs its step only.

    Args:
        path: a folder (or URL) that `llada prepare` wrote, or a mapping from folders to mixture weights.
        sequence_length: L, tokens of a sequence.
        global_batch: The number of sequences of an optimizer step, exactly; null: by the rule of `rules.batch`.
        micro_batch: sequences of a forward pass on one device; null: the global batch over devices and accumulation.
        val_sequences: validation sequences, the same for every run; null: all of the validation split.
        val_batch: sequences of a validation batch on one device; null: as micro_batch.
        random_length_share: share of the training sequences cut to a random length (paper, Sec. 2.2).
        mask_eps: smallest mask probability of the forward process.
        time_sampling: t stratified over the global batch (weyl) or independent (iid).
        window_shards: shards whose sequences are shuffled together.
        workers: loader processes; 0 loads in the training process; null: 2 where a GPU trains, else 0.
        seed: of order and noise; null: the run's seed.
        val_seed: of the validation set's choice and noise, shared by runs that are to be compared.
        document_mask: keep attention within each document of a sequence, in training and validation. FLOPs are
            counted as of full attention: an upper count.
        train_tokens: distinct tokens of the training split that are read, again and again; null: all. They are the
            beginnings of all its shards, the same for every seed; of a mixture each source gives its weight's share.
    """

    def __init__(
        self,
        path: dict[str, float] | str,
        sequence_length: int = 256,
        global_batch: int | None = None,
        micro_batch: int | None = None,
        val_sequences: int | None = 512,
        val_batch: int | None = None,
        random_length_share: float = 0.01,
        mask_eps: float = MASK_EPS,
        time_sampling: TimeSampling = "weyl",
        window_shards: int = WINDOW_SHARDS,
        workers: int | None = None,
        seed: int | None = None,
        val_seed: int = 0,
        document_mask: bool = False,
        train_tokens: int | None = None,
    ) -> None:
        super().__init__(
            sequence_length,
            global_batch,
            micro_batch,
            val_sequences,
            val_batch,
            mask_eps,
            time_sampling,
            workers,
            seed,
            val_seed,
        )
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
        self.random_length_share, self.window_shards, self.document_mask = (
            random_length_share,
            window_shards,
            document_mask,
        )
        self._manifests: list[Manifest] | None = None

    @property
    def manifests(self) -> list[Manifest]:
        """One manifest a source; read once."""
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
        """Vocabulary size, special ids and fingerprint of the sources' one tokenizer."""
        return self.manifests[0].tokenizer

    def tokenizer_files(self) -> dict[str, str]:
        return {TOKENIZER_NAME: read_tokenizer_text(next(iter(self.weights)))}

    @property
    def fingerprint(self) -> str:
        """Of the corpus, or of the mixture with its weights."""
        if len(self.manifests) == 1:
            return self.manifests[0].fingerprint
        parts = [f"{m.fingerprint}:{w!r}" for m, w in zip(self.manifests, self.weights.values(), strict=True)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    @property
    def tokens_per_sequence(self) -> float:
        """The expected tokens of a training sequence: below L by the sequences of random length."""
        return expected_length(self.sequence_length, self.random_length_share)

    @property
    def bytes_per_token(self) -> float:
        """Of the validation text: the mean of its split, sources by weight."""
        weights = list(self.weights.values())
        by_source = [m.splits["val"].bytes_per_token for m in self.manifests]
        return sum(w * b for w, b in zip(weights, by_source, strict=True)) / sum(weights)

    @property
    def lost_share(self) -> float:
        """Of the source that loses most."""
        return max(manifest.splits["val"].lost_share for manifest in self.manifests)

    def unique_tokens(self, steps: int) -> int:
        """Distinct tokens that a run of ``steps`` steps reads (of full sequences)."""
        return sum(min(read, items) for read, items in self._read_of(steps)) * self.sequence_length

    def epochs(self, steps: int) -> float:
        """How often a run of ``steps`` steps reads the source that it repeats most."""
        return max(read / items for read, items in self._read_of(steps))

    def _read_of(self, steps: int) -> list[tuple[int, int]]:
        """For each source the sequences that a run reads, repeats counted, and those that there are."""
        read = Mixture(list(self.weights.values())).consumed(steps * self.batch)
        return list(zip(read.tolist(), self._train_sequences(), strict=True))

    def _train_sequences(self) -> list[int]:
        """Of each source the training sequences that are read at all."""
        present = [m.splits["train"].items(self.sequence_length) for m in self.manifests]
        return sequences_read(present, list(self.weights.values()), self.sequence_length, self.train_tokens)

    def check(self) -> None:
        """Refuse a data folder that cannot serve: missing, cut or foreign files, sequences longer than a
        shard. The shards' bytes are checked when they are read."""
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
    """As litdata takes it: ``~`` and ``file://`` resolved; ``local:``, its stand-in for a remote place, kept."""
    return (folder if folder.startswith("local:") else local_path(folder) or folder).rstrip("/")


def available_sequences(stream: TokenStream, wanted: int | None) -> int:
    """Validation sequences before any source repeats, at most ``wanted``."""
    totals = [order.items for order in stream.orders]
    low, high = 0, sum(totals) + 1
    while high - low > 1:
        middle = (low + high) // 2
        fits = all(c <= t for c, t in zip(stream.consumed_items(middle), totals, strict=True))
        low, high = (middle, high) if fits else (low, middle)
    return low if wanted is None else min(low, wanted)
