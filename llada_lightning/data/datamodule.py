"""The data modules of training: what all of them share, and that of pre-training, for all objectives."""

from __future__ import annotations

import hashlib
import math
import resource
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from lightning import LightningDataModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.data import DataLoader

from llada_lightning.compute.flops import MASK_EPS, MAX_BATCH, expected_length
from llada_lightning.compute.shapes import MAX_WIDTH
from llada_lightning.data import TOKENIZER_NAME, TokenizerInfo
from llada_lightning.data.datasets import (
    OrdinalSampler,
    StridedSampler,
    TokenStream,
    TrainingDataset,
    ValidationDataset,
    take_batch,
)
from llada_lightning.data.manifest import (
    Manifest,
    bits_per_byte,
    check_sequence_length,
    read_manifest,
    read_tokenizer_text,
)
from llada_lightning.data.order import WINDOW_SHARDS, Mixture
from llada_lightning.data.shards import check_shards
from llada_lightning.data.validation import ValidationCorpus, held_out_corpora, mixture_sources
from llada_lightning.objectives.forward_process import TimeSampling
from llada_lightning.run import Stream, sequences_read
from llada_lightning.settings import MAX_PROCESSES
from llada_lightning.support.arguments import KeepsArguments
from llada_lightning.support.errors import UserError
from llada_lightning.support.files import local_path


class LanguageDataModule(KeepsArguments, LightningDataModule, ABC):
    """Training and validation sequences with their noise, both pure functions of (seed, ordinal).

    The number of devices, workers and micro-batches changes no result, and a resumed run needs only its step.

    Args:
        sequence_length: The number of tokens of a sequence (L).
        global_batch: The number of sequences of an optimizer step, exactly; null: by the rule of `rules.batch`.
        micro_batch: The number of sequences of a forward pass on one device; null: the global batch divided by devices
            and accumulation.
        val_sequences: The largest number of validation sequences (of dialogues, for fine-tuning), the same for every
            run; null: no limit.
        val_batch: The number of sequences of a validation batch on one device; null: the micro-batch.
        mask_eps: The smallest mask probability of the forward process.
        time_sampling: How the mask ratios t are drawn: stratified over the global batch (weyl), or independently (iid).
        workers: The number of loader processes; 0: the training process loads; null: 2 on a GPU, else 0.
        seed: The seed of order and noise; null: the seed of the run.
        val_seed: The seed that chooses the validation sequences and their noise, shared by runs that are compared.

    Raises:
        UserError: A setting is out of range.
    """

    document_mask = False

    def __init__(
        self,
        sequence_length: int,
        global_batch: int | None = None,
        micro_batch: int | None = None,
        val_sequences: int | None = 512,
        val_batch: int | None = None,
        mask_eps: float = MASK_EPS,
        time_sampling: TimeSampling = "weyl",
        workers: int | None = None,
        seed: int | None = None,
        val_seed: int = 0,
    ) -> None:
        super().__init__()
        ranges = {
            "sequence_length": (sequence_length, 1, MAX_WIDTH),
            "global_batch": (global_batch, 1, MAX_BATCH),
            "micro_batch": (micro_batch, 1, MAX_BATCH),
            "val_sequences": (val_sequences, 1, math.inf),
            "val_batch": (val_batch, 1, MAX_BATCH),
            "workers": (workers, 0, MAX_PROCESSES),
        }
        for name, (value, least, most) in ranges.items():
            if value is not None and value < least:
                raise UserError(f"data.{name}: {value} must be at least {least}")
            if value is not None and value > most:
                raise UserError(f"data.{name}: {value} must be at most {most}")
        if not 0 < mask_eps < 1:
            raise UserError(f"data.mask_eps: {mask_eps} must lie between 0 and 1")
        self.sequence_length, self.global_batch = sequence_length, global_batch
        self._micro_batch, self._val_batch = micro_batch, val_batch
        self.val_sequences = val_sequences
        self.mask_eps, self.time_sampling, self.workers = mask_eps, time_sampling, workers
        self.seed, self.val_seed = seed or 0, val_seed

    @property
    @abstractmethod
    def tokenizer(self) -> TokenizerInfo:
        """Vocabulary size, special ids and fingerprint of the one tokenizer."""

    @abstractmethod
    def tokenizer_files(self) -> dict[str, str]:
        """The tokenizer's files that the folder of a run keeps: file name -> text."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """The hash of all data that is trained and validated on."""

    @property
    @abstractmethod
    def tokens_per_sequence(self) -> float:
        """The expected number of tokens of a training sequence."""

    @property
    @abstractmethod
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of the validation text for each of its tokens."""

    @property
    def lost_share(self) -> float:
        """The share of the validation text's bytes that its tokens do not decode to, as far as it is known."""
        return 0.0

    @property
    def attended_length(self) -> int:
        """The mean number of positions that a token attends to, as the FLOPs count them."""
        return self.sequence_length

    @property
    def response_share(self) -> float:
        """The share of the tokens that the forward process may mask."""
        return 1.0

    @property
    def wanted_steps(self) -> int | None:
        """The number of optimizer steps, where the settings of the data module decide it."""
        return None

    @abstractmethod
    def unique_tokens(self, steps: int) -> int:
        """The number of distinct tokens that a run of ``steps`` steps reads."""

    @abstractmethod
    def epochs(self, steps: int) -> float:
        """The number of passes of ``steps`` steps over the part of the data that is repeated most."""

    @abstractmethod
    def check(self) -> None:
        """Refuses data that is missing, damaged or too small to be trained on."""

    def setup(self, stage: str | None = None) -> None:
        self.check()

    @property
    def batch(self) -> int:
        """The number of sequences of an optimizer step; an AssertionError before the run is resolved."""
        assert self.global_batch is not None, "the run has not been resolved"
        return self.global_batch

    @property
    def expected_tokens_per_step(self) -> float:
        """The expected number of tokens of a global batch."""
        return self.batch * self.tokens_per_sequence

    def stream_facts(self, vocab_size: int) -> Stream:
        """Returns the facts of the data from which a run is resolved; ``vocab_size`` is the output head's."""
        return Stream(
            vocab_size=vocab_size,
            sequence_length=self.sequence_length,
            mask_eps=self.mask_eps,
            tokens_per_sequence=self.tokens_per_sequence,
            attended_length=self.attended_length,
            response_share=self.response_share,
        )

    def bits_per_byte(self, nats_per_token: float) -> float | None:
        """The bits per byte of a loss on the validation text; None where the tokens do not decode to that text."""
        return bits_per_byte(nats_per_token, self.bytes_per_token, self.lost_share)

    @property
    def val_sources(self) -> list[ValidationCorpus]:
        """The sources of a mixture, each with a validation loss of its own; empty where there is one source."""
        return []

    @property
    def held_out_corpora(self) -> list[ValidationCorpus]:
        """Further corpora, in the order of the loaders behind the first one of a validation that has several."""
        return []

    @property
    def micro_batch(self) -> int:
        """The number of sequences of a forward pass on one device, for which the global batch is exact."""
        assert self.trainer is not None
        return self.exact_micro_batch(self._replica[1], self.trainer.accumulate_grad_batches)

    def exact_micro_batch(self, devices: int, accumulation: int) -> int:
        """Returns :attr:`micro_batch` for a number of devices that read different sequences and of accumulated batches.

        Raises:
            UserError: No micro-batch fits, or the given one does not; the message names the nearest choices.
        """
        per_step = (self._micro_batch or 1) * devices
        if self._micro_batch is None and self.batch % (devices * accumulation) == 0:
            return self.batch // (devices * accumulation)
        if self._micro_batch is not None and per_step * accumulation == self.batch:
            return self._micro_batch
        if self._micro_batch is not None and self.batch % per_step == 0:
            fix = f"set --trainer.accumulate_grad_batches {self.batch // per_step}"
        else:
            lower = max(1, self.batch // per_step)
            fix = (
                f"nearest global batches: {lower * per_step} or {(lower + 1) * per_step} with accumulation {lower} or "
                f"{lower + 1}"
            )
        given = (
            f"micro-batch {self._micro_batch or '(whole number)'} x {devices} device(s) x accumulation {accumulation}"
        )
        raise UserError(f"data.global_batch: {self.batch} is not {given}; {fix}")

    @property
    def _replica(self) -> tuple[int, int]:
        """The rank among the processes that read different sequences (a tensor-parallel group is one), their number."""
        assert self.trainer is not None
        place = self.trainer.distributed_sampler_kwargs or {"rank": 0, "num_replicas": 1}
        return place["rank"], place["num_replicas"]

    def loader_workers(self, trainer: Trainer) -> int:
        """Returns the number of processes of each loader: as given, else 2 on a GPU and 0 elsewhere."""
        if self.workers is not None:
            return self.workers
        return 2 if trainer.strategy.root_device.type == "cuda" else 0

    def _training_loader(self, dataset: Any) -> DataLoader:
        assert self.trainer is not None
        sampler = OrdinalSampler(self.trainer.global_step, self.batch, self.micro_batch, *self._replica)
        return self._loader(dataset, sampler)

    def _validation_loader(self, dataset: Any, sequences: int) -> DataLoader:
        return self._loader(dataset, StridedSampler(sequences, self._val_batch or self.micro_batch, *self._replica))

    def _loader(self, dataset: Any, sampler: Any) -> DataLoader:
        assert self.trainer is not None
        workers = self.loader_workers(self.trainer)
        return DataLoader(
            dataset,
            batch_sampler=sampler,
            collate_fn=take_batch,
            num_workers=workers,
            pin_memory=self.trainer.strategy.root_device.type == "cuda",
            persistent_workers=workers > 0,
            # A generator of its own: the loader draws worker seeds, which must not move the global generator.
            generator=torch.Generator().manual_seed(0),
        )


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

    def check(self) -> None:
        """Refuses a data folder with missing, cut or foreign files, or whose shards are shorter than a sequence.

        The bytes of a shard are checked when it is first read.
        """
        for folder, manifest in zip(self.weights, self.manifests, strict=True):
            check_shards(folder, manifest)
            check_sequence_length(manifest, self.sequence_length)
        assert self.held_out_corpora is not None  # each is checked when it is read

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
        dataset = ValidationDataset(stream, sequences, self.val_seed, self.tokenizer.eos_id, self.document_mask)
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


def require_open_files(workers: int) -> None:
    """Raises the limit of open files of this process to what the workers of a loader need; else they hang or die.

    Raises:
        UserError: The system does not allow it.
    """
    needed = 64 + 64 * workers  # of this process with its libraries, and of the batches that each worker passes to it
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if workers == 0 or soft == resource.RLIM_INFINITY or soft >= needed:
        return
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
    except (ValueError, OSError) as error:
        raise UserError(
            f"data.workers: {workers} given, which needs {needed} open files, but the limit is {soft}; raise it "
            f"(ulimit -n {needed}), or give --data.workers 0"
        ) from error
