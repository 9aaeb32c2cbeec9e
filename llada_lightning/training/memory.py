"""Out of memory: which micro-batch was tried, and which fits, found by trying."""

from __future__ import annotations

import gc
import traceback
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer

from llada_lightning.objectives.batches import TrainingBatch, ValidationBatch
from llada_lightning.training.modules import LanguageModule
from llada_lightning.training.parallel import FullySharded

_SIGNS = (
    "out of memory", "can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED", "std::bad_alloc",
)  # fmt: skip
"""In the messages of a RuntimeError: of the driver, of the CPU's allocator, of libraries that have no memory left."""

Batch = TrainingBatch | ValidationBatch


class MemoryAdvice(Callback):
    """When memory runs out in a step, finds the largest micro-batch that a step has room for.

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

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._reads_data = True

    on_test_start = on_predict_start = on_validation_start

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, *rest: Any) -> None:
        self._batch = batch

    def on_validation_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, *rest: Any) -> None:
        self._batch = batch

    def on_test_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, *rest: Any) -> None:
        self._batch = batch

    def on_predict_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, *rest: Any) -> None:
        self._batch = batch

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if not is_out_of_memory(exception):
            return
        assert isinstance(pl_module, LanguageModule)
        reason = " ".join(str(exception).split())[:200] or type(exception).__name__
        _release(exception, pl_module)
        batch, self._batch = self._batch, None
        if batch is None and self._reads_data:
            self.advice = (
                f"data.global_batch: a micro-batch of {trainer.datamodule.micro_batch:,} sequences does not fit in "  # type: ignore[attr-defined]
                f"memory ({reason}); give a smaller --data.micro_batch with a larger "
                "--trainer.accumulate_grad_batches, or a smaller global batch"
            )
        elif batch is None:
            self.advice = (
                f"model.shape: weights and moments of {pl_module.shape.params_total(pl_module.vocab_size or 0):,} "
                f"parameters have no room in memory ({reason}); use --trainer.strategy=fsdp2 on more devices, or a "
                "smaller shape"
            )
        elif isinstance(batch, TrainingBatch):
            self.advice = _advice_for_training(trainer, pl_module, batch, reason)
        else:
            self.advice = _advice_for_validation(trainer, pl_module, batch, reason)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device or the CPU had no room for what was asked."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


def _advice_for_training(trainer: Trainer, module: LanguageModule, batch: TrainingBatch, reason: str) -> str:
    tried, length = batch.tokens_BL.shape
    share = tried * trainer.accumulate_grad_batches
    sizes = [size for size in range(tried - 1, 0, -1) if share % size == 0]
    fitting = _largest(trainer, module, batch, sizes)
    start = f"data.micro_batch: {tried} sequences of {length} tokens have no room in memory ({reason})"
    if fitting is None:
        return (
            f"{start}, nor has one; use --trainer.strategy=fsdp2 on more devices, a shorter data.sequence_length or a "
            "smaller shape"
        )
    return (
        f"{start}; {_tried(trainer, module, fitting)}: give --data.micro_batch {fitting} "
        f"--trainer.accumulate_grad_batches {share // fitting}, and the run resumes from its last checkpoint"
    )


def _advice_for_validation(trainer: Trainer, module: LanguageModule, batch: ValidationBatch, reason: str) -> str:
    tried, length = batch.tokens_BL.shape
    fitting = _largest(trainer, module, batch, [size for size in range(tried - 1, 0, -1) if tried % size == 0])
    start = f"data.val_batch: {tried} sequences of {length} tokens have no room in memory ({reason})"
    if fitting is None:
        return f"{start}, nor has one; use more memory, a shorter data.sequence_length or a smaller shape"
    return f"{start}; {_tried(trainer, module, fitting)}: give --data.val_batch {fitting}"


def _tried(trainer: Trainer, module: LanguageModule, fitting: int) -> str:
    if _is_sharded(trainer):
        return f"{fitting} may fit (not tried: sharded)"
    masked = " with every token masked" if module.facts.masks else ""
    return f"{fitting} {'has' if fitting == 1 else 'have'}, as tried{masked}"


def _is_sharded(trainer: Trainer) -> bool:
    return isinstance(trainer.strategy, FullySharded)


def _largest(trainer: Trainer, module: LanguageModule, batch: Batch, sizes: list[int]) -> int | None:
    """The first of the descending sizes for which a step has room.

    In shards a forward pass takes all processes, and those with room are not here: there, the next smaller size.
    """
    if _is_sharded(trainer):
        return sizes[0] if sizes else None
    return next((size for size in sizes if _has_room(trainer, module, worst_case(batch, size))), None)


def worst_case(batch: Batch, size: int) -> Batch:
    """The first ``size`` sequences with everything masked: no batch of that size takes more memory.

    Every masked token costs a row of logits, and one batch has more of them than another.
    """
    masked_BL = torch.ones_like(batch.masked_BL[:size])
    if isinstance(batch, TrainingBatch):
        return batch.rows(slice(size), masked_BL)
    rows: dict[str, Any] = {name: value[:size] for name, value in batch._asdict().items() if value is not None}
    return batch._replace(**{**rows, "masked_BL": masked_BL})


def _has_room(trainer: Trainer, module: LanguageModule, batch: Batch) -> bool:
    try:
        moments = _moments_to_come(trainer, module) if isinstance(batch, TrainingBatch) else []
        _pass(trainer, module, batch)
        del moments
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
        loss = module.training_loss(batch)
    torch.autograd.grad(loss, [parameter for parameter in module.parameters() if parameter.requires_grad])


def _moments_to_come(trainer: Trainer, module: LanguageModule) -> list[torch.Tensor]:
    """Room for AdamW's two moments, where the first step has not made them."""
    if any(optimizer.state for optimizer in trainer.optimizers):
        return []
    return [torch.zeros_like(parameter) for parameter in module.parameters() for _ in range(2)]


def _release(error: BaseException, module: LanguageModule) -> None:
    """Let go of what the failed step held: its frames keep activations alive, its parameters the gradients."""
    seen: BaseException | None = error
    while seen is not None:
        traceback.clear_frames(seen.__traceback__)
        seen = seen.__context__
    module.zero_grad(set_to_none=True)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
