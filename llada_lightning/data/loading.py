"""What all data modules of training share: the batch, the loaders of both splits, what a run is told of its data."""

from __future__ import annotations

import math
import resource
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from lightning import LightningDataModule, Trainer
from torch.utils.data import DataLoader

from llada_lightning.compute.flops import MASK_EPS, MAX_BATCH
from llada_lightning.compute.shapes import MAX_WIDTH
from llada_lightning.data import TokenizerInfo
from llada_lightning.data.datasets import (
    OrdinalSampler,
    StridedSampler,
    take_batch,
)
from llada_lightning.data.manifest import (
    bits_per_byte,
)
from llada_lightning.data.validation import ValidationCorpus
from llada_lightning.objectives.batches import TrainingBatch, ValidationBatch
from llada_lightning.objectives.densities import Density
from llada_lightning.objectives.density_settings import density_setting
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
        density: The density of the mask ratios: a name with its arguments, such as `{name: beta, a: 1.5, b: 1}`
            (uniform, beta, logit_normal, range, curriculum), or the `class_path` and `init_args` of a class of yours;
            null: uniform on (0, 1), as in the paper.
        workers: The number of loader processes; 0: the training process loads; null: 2 on a GPU, else 0.
        seed: The seed of order and noise; null: the seed of the run.
        val_seed: The seed that chooses the validation sequences and their noise, shared by runs that are compared.

    Raises:
        UserError: A setting is out of range.
    """

    static_shapes: ClassVar[bool] = False
    """Whether all micro-batches have sequences of one length, so that a step can be a graph (:meth:`most_scored`)."""
    document_mask = False
    block_length: int | None = None
    """The number of tokens that share a mask ratio, where the module that trains on the data predicts in blocks; None:
    the whole sequence."""

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
        density: str | dict[str, Any] | None = None,
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
        self.density_setting = density_setting(density)
        self.seed, self.val_seed = seed or 0, val_seed

    @property
    def density(self) -> Density | None:
        """The density of the mask ratios; None: uniform on (0, 1)."""
        return None if self.density_setting is None else self.density_setting.density

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
    def val_documents(self) -> int:
        """The number of documents, or dialogues, in which validation sequences may begin; 0: not known."""
        return 0

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

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Let the module add the noise of its inputs while the batch is on the host."""
        assert self.trainer is not None
        add: Any = getattr(self.trainer.lightning_module, "with_noise", None)
        return add(batch) if isinstance(batch, (TrainingBatch, ValidationBatch)) and add is not None else batch

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
            density=self.density,
            block_length=self.block_length,
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
