"""The base class of the data modules: an exact global batch over ranks and micro-batches, and the loaders."""

from __future__ import annotations

import math
import resource
from abc import ABC, abstractmethod
from typing import Any

import torch
from lightning import LightningDataModule, Trainer
from torch.utils.data import DataLoader

from llada_lightning.compute.flops import MASK_EPS, MAX_BATCH
from llada_lightning.compute.shapes import MAX_WIDTH
from llada_lightning.data.datasets import take_batch
from llada_lightning.data.manifest import TOLERATED_LOSS, TokenizerInfo
from llada_lightning.objectives.forward_process import TimeSampling
from llada_lightning.run import Stream
from llada_lightning.settings import MAX_PROCESSES
from llada_lightning.support.arguments import KeepsArguments
from llada_lightning.support.errors import UserError


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
        UserError: a setting is out of range.
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
    def expected_tokens_per_step(self) -> float:
        """The expected number of tokens of a global batch."""
        return self.batch * self.tokens_per_sequence

    @property
    def batch(self) -> int:
        """The number of sequences of an optimizer step; an AssertionError before the run is resolved."""
        assert self.global_batch is not None, "the run has not been resolved"
        return self.global_batch

    def stream_facts(self, vocab_size: int) -> Stream:
        """Returns the facts of the data from which a run is resolved.

        Args:
            vocab_size: The width of the output head.
        """
        return Stream(
            vocab_size=vocab_size,
            sequence_length=self.sequence_length,
            mask_eps=self.mask_eps,
            tokens_per_sequence=self.tokens_per_sequence,
            attended_length=self.attended_length,
            response_share=self.response_share,
        )

    @property
    @abstractmethod
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of the validation text for each of its tokens."""

    @property
    def lost_share(self) -> float:
        """The share of the validation text's bytes that its tokens do not decode to, as far as it is known."""
        return 0.0

    def bits_per_byte(self, nats_per_token: float) -> float | None:
        """The bits per byte of a loss on the validation text; None where the tokens do not decode to that text."""
        if self.lost_share > TOLERATED_LOSS:
            return None
        return nats_per_token / self.bytes_per_token / math.log(2)

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
        """Refuses data that cannot be trained on.

        Raises:
            UserError: the data is missing, damaged or too small.
        """

    def setup(self, stage: str | None = None) -> None:
        self.check()

    @property
    def micro_batch(self) -> int:
        """The number of sequences of a forward pass on one device, for which the global batch is exact."""
        assert self.trainer is not None
        return self.exact_micro_batch(self._replica[1], self.trainer.accumulate_grad_batches)

    @property
    def _replica(self) -> tuple[int, int]:
        """The rank of this process among those that read different sequences, and the number of those.

        The processes of one tensor-parallel group read the same sequences and count as one.
        """
        assert self.trainer is not None
        place = self.trainer.distributed_sampler_kwargs or {"rank": 0, "num_replicas": 1}
        return place["rank"], place["num_replicas"]

    def exact_micro_batch(self, devices: int, accumulation: int) -> int:
        """Returns :attr:`micro_batch` for a number of devices and of accumulated batches."""
        return exact_micro_batch(self.batch, self._micro_batch, devices, accumulation)

    def loader_workers(self, trainer: Trainer) -> int:
        """Returns the number of processes of each loader: as given, else 2 on a GPU and 0 elsewhere."""
        if self.workers is not None:
            return self.workers
        return 2 if trainer.strategy.root_device.type == "cuda" else 0

    def _loader(self, dataset: Any, sampler: Any) -> DataLoader:
        assert self.trainer is not None
        on_gpu = self.trainer.strategy.root_device.type == "cuda"
        workers = self.loader_workers(self.trainer)
        return DataLoader(
            dataset,
            batch_sampler=sampler,
            collate_fn=take_batch,
            num_workers=workers,
            pin_memory=on_gpu,
            persistent_workers=workers > 0,
            # A generator of its own: the loader draws worker seeds, which must not move the global generator.
            generator=torch.Generator().manual_seed(0),
        )


_OPEN_FILES, _OPEN_FILES_OF_A_WORKER = 64, 64
"""Open files of a training process with its libraries, and of the batches that one worker passes to it."""


def require_open_files(workers: int) -> None:
    """Raises the limit of open files of this process to what the workers of a loader need; else they hang or die.

    Args:
        workers: The number of loader processes.

    Raises:
        UserError: the system does not allow it.
    """
    if workers == 0:
        return
    needed = _OPEN_FILES + _OPEN_FILES_OF_A_WORKER * workers
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
    except (ValueError, OSError) as error:
        raise UserError(
            f"data.workers: {workers} given, which needs {needed} open files, but the limit is {soft}; raise it "
            f"(ulimit -n {needed}), or give --data.workers 0"
        ) from error


def exact_micro_batch(global_batch: int, micro_batch: int | None, devices: int, accumulation: int) -> int:
    """Returns the micro-batch for which micro-batch x devices x accumulation is the global batch.

    Args:
        global_batch: The number of sequences of an optimizer step.
        micro_batch: The micro-batch that the user chose; None: the one that fits.
        devices: The number of devices that read different sequences.
        accumulation: The number of forward passes of an optimizer step.

    Raises:
        UserError: no micro-batch fits, or the given one does not; the message names the nearest choices.
    """
    if micro_batch is None and global_batch % (devices * accumulation) == 0:
        return global_batch // (devices * accumulation)
    if micro_batch is not None and micro_batch * devices * accumulation == global_batch:
        return micro_batch
    per_step = (micro_batch or 1) * devices
    lower = max(1, global_batch // per_step) * per_step
    choices = sorted({lower, lower + per_step})
    given = f"micro-batch {micro_batch or '(whole number)'} x {devices} device(s) x accumulation {accumulation}"
    fits = [a for a in range(1, global_batch + 1) if global_batch % (per_step * a) == 0] if micro_batch else []
    exact = [a for a in fits if per_step * a == global_batch]
    fix = (
        f"set --trainer.accumulate_grad_batches {exact[0]}"
        if exact
        else f"nearest global batches: {' or '.join(map(str, choices))} with accumulation "
        f"{' or '.join(str(c // per_step) for c in choices)}"
    )
    raise UserError(f"data.global_batch: {global_batch} is not {given}; {fix}")
