"""A run that ends before its last step: asked to by a signal, out of memory, or refused by a callback beside ours."""

from __future__ import annotations

import gc
import os
import sys
import traceback
from contextlib import suppress
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException

from llada_lightning.objectives.batches import TrainingBatch, ValidationBatch
from llada_lightning.support.errors import UserError
from llada_lightning.support.printing import shortened
from llada_lightning.support.signals import SIGNALS, LeaveRequest
from llada_lightning.training.language_module import VALIDATION_METRICS, LanguageModule
from llada_lightning.training.lightning_internals import leave_at_the_steps_end, replace_sigterm_check
from llada_lightning.training.parallel import Agreement, FullySharded

Batch = TrainingBatch | ValidationBatch

_NO_MEMORY = (
    "out of memory", "can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED", "std::bad_alloc",
)  # fmt: skip
"""The parts of a RuntimeError's message that mean out of memory: of the driver, the CPU's allocator and libraries."""


class LeaveTogether(Callback):
    """Agrees at each step's end, and at each validation batch's, on whether a signal asked any process to leave.

    Lightning then ends the run with a ``SIGTERMException`` in every process.

    Args:
        request: The request that the signal handlers of this process fill in.
    """

    def __init__(self, request: LeaveRequest) -> None:
        self._request = request
        self._agreement = Agreement()
        self._step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step = trainer.global_step

        def leave_as_agreed() -> None:
            if trainer.received_sigterm:
                raise SIGTERMException

        replace_sigterm_check(trainer, leave_as_agreed)
        self.on_validation_start(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._request.install()
        self._agreement.begin(trainer)

    def on_train_batch_end(self, trainer: Trainer, *arguments: Any) -> None:
        if trainer.global_step != self._step:
            self._step = trainer.global_step
            self.on_validation_batch_end(trainer)

    def on_validation_batch_end(self, trainer: Trainer, *arguments: Any) -> None:
        received = self._request.received
        strongest = self._agreement.maximum(-1 if received is None else SIGNALS.index(received))
        if strongest >= 0:
            self._request.agreed = SIGNALS[strongest]
            leave_at_the_steps_end(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """W&B gives a run that it knows to be preempted to the next agent of its sweep."""
        wandb = sys.modules.get("wandb")  # a branch has no logger of its own, but the run has
        if isinstance(exception, SIGTERMException) and "WANDB_SWEEP_ID" in os.environ and wandb and wandb.run:
            with suppress(Exception):  # W&B is never in the way
                wandb.run.mark_preempting()


class MemoryAdvice(Callback):
    """When memory runs out in a step, finds the largest micro-batch with which a step fits, by trying.

    Attributes:
        advice: The advice in one line for the user: what was tried, what fits, and the settings; None until memory has
            run out.
    """

    def __init__(self) -> None:
        self.advice: str | None = None
        self._batch: Batch | None = None
        self._reads_data = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._reads_data = True

    on_validation_start = on_test_start = on_predict_start = on_train_start

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int = 0, dataloader_idx: int = 0
    ) -> None:
        self._batch = batch

    on_validation_batch_start = on_test_batch_start = on_predict_batch_start = on_train_batch_start

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if not is_out_of_memory(exception):
            return
        assert isinstance(pl_module, LanguageModule)
        reason = " ".join(str(exception).split())[:200] or type(exception).__name__
        _release(exception, pl_module)
        batch, self._batch = self._batch, None
        if batch is not None:
            self.advice = _advice(trainer, pl_module, batch, reason)
        elif self._reads_data:
            self.advice = (
                f"data.global_batch: a micro-batch of {trainer.datamodule.micro_batch:,} sequences does not fit in "  # type: ignore[attr-defined]
                f"memory ({reason}); give a smaller --data.micro_batch with a larger "
                "--trainer.accumulate_grad_batches, or a smaller global batch"
            )
        else:
            self.advice = (
                f"model.shape: weights and moments of {pl_module.shape.params_total(pl_module.vocab_size or 0):,} "
                f"parameters do not fit in memory ({reason}); use --trainer.strategy=fsdp2 on more devices, or a "
                "smaller shape"
            )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that the device or the CPU ran out of memory."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _NO_MEMORY)


def _advice(trainer: Trainer, module: LanguageModule, batch: Batch, reason: str) -> str:
    tried, length = batch.tokens_BL.shape
    trains = isinstance(batch, TrainingBatch)
    setting, share = ("micro_batch", tried * trainer.accumulate_grad_batches) if trains else ("val_batch", tried)
    smaller = [size for size in range(tried - 1, 0, -1) if share % size == 0]
    # With shards a forward pass takes all processes, and those that did not run out of memory are not here.
    sharded = isinstance(trainer.strategy, FullySharded)
    sizes = (size for size in smaller if sharded or _fits(trainer, module, worst_case(batch, size)))
    fitting = next(sizes, None)
    start = f"data.{setting}: {tried} sequences of {length} tokens do not fit in memory ({reason})"
    if fitting is None:
        more = "--trainer.strategy=fsdp2 on more devices" if trains else "more memory"
        return f"{start}, nor does one; use {more}, a shorter data.sequence_length or a smaller shape"
    if sharded:
        found = f"{fitting} may fit (not tried: sharded)"
    else:
        masked = " with every token masked" if module.facts.masks else ""
        found = f"{fitting} {'fits' if fitting == 1 else 'fit'}, as tried{masked}"
    advice = f"{start}; {found}: give --data.{setting} {fitting}"
    if not trains:
        return advice
    resumes = "and the run resumes from its last checkpoint"
    return f"{advice} --trainer.accumulate_grad_batches {share // fitting}, {resumes}"


def worst_case(batch: Batch, size: int) -> Batch:
    """The first ``size`` sequences with everything masked: no batch of that size takes more memory.

    Every masked token costs a row of logits, and one batch has more of them than another.
    """
    masked_BL = torch.ones_like(batch.masked_BL[:size])
    if isinstance(batch, TrainingBatch):
        return batch.rows(slice(size), masked_BL)
    rows: dict[str, Any] = {name: value[:size] for name, value in batch._asdict().items() if torch.is_tensor(value)}
    return batch._replace(**{**rows, "masked_BL": masked_BL})


def _fits(trainer: Trainer, module: LanguageModule, batch: Batch) -> bool:
    try:
        _pass(trainer, module, batch)
        return True
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        _release(error, module)
        return False


def _pass(trainer: Trainer, module: LanguageModule, batch: Batch) -> None:
    """What a step does, without the hooks of DDP, which would wait for other processes."""
    with trainer.precision_plugin.forward_context():
        if isinstance(batch, ValidationBatch):
            with torch.no_grad():
                module.sequence_nll(batch)
            return
        parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        made = any(optimizer.state for optimizer in trainer.optimizers)
        # AdamW's two, where the first step has not made them.
        moments = [] if made else [torch.zeros_like(p) for p in parameters for _ in range(2)]
        loss = module.training_loss(batch)
    torch.autograd.grad(loss, parameters)
    del moments


def _release(error: BaseException, module: LanguageModule) -> None:
    """Release what the failed step held: its frames keep activations alive, its parameters the gradients."""
    seen: BaseException | None = error
    while seen is not None:
        traceback.clear_frames(seen.__traceback__)
        seen = seen.__context__
    module.zero_grad(set_to_none=True)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def check_monitors(trainer: Trainer, module: LightningModule) -> None:
    """Refuse callbacks that wait for a metric that nobody logs, before the first step.

    A class of the user's own may log further metrics, so the metrics are known only where there is none.
    """
    callbacks: list[Any] = list(trainer.callbacks)  # type: ignore[attr-defined]
    if not all(_package(part) in ("llada_lightning", "lightning") for part in (module, *callbacks)):
        return
    for callback in callbacks:
        monitor = getattr(callback, "monitor", None)
        if monitor is not None and monitor not in VALIDATION_METRICS and not str(monitor).startswith("lr-"):
            raise UserError(
                f"trainer.callbacks: {type(callback).__name__} monitors '{shortened(monitor)}', which is not logged; "
                f"the metrics are {', '.join(VALIDATION_METRICS)}"
            )


def fault_of_a_callback(error: Exception) -> str | None:
    """What a callback beside ours refuses, as one line; None for an error that has another origin.

    Lightning's callbacks raise errors of many types for settings that do not fit. Of a user's callback only a
    RuntimeError is a refusal: others are faults of its code, which the traceback shows.

    Args:
        error: What the trainer raised.
    """
    if isinstance(error, (UserError, OSError)):
        return None
    for frame, line in traceback.walk_tb(error.__traceback__):
        owner = frame.f_locals.get("self")
        if not isinstance(owner, Callback) or _package(owner) == "llada_lightning":
            continue
        if _package(owner) == "lightning" or isinstance(error, (RuntimeError, MisconfigurationException)):
            where = "" if _package(owner) == "lightning" else f" ({frame.f_code.co_filename}, line {line})"
            return f"trainer.callbacks: {type(owner).__name__}{where}: {shortened(error, 600)}"
    if isinstance(error, MisconfigurationException):
        return f"trainer: {shortened(error, 600)}"
    return None


def _package(part: object) -> str:
    return type(part).__module__.split(".")[0]
