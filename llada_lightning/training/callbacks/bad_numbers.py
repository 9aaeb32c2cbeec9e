"""Steps with bad numbers: said, written to `faults.csv`, and the end of a run that has nothing else any more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer

from llada_lightning.checkpoints.run_folder import CHECKPOINTS, checkpoints_by_step
from llada_lightning.records import FAULT_COLUMNS, REPORTED, SKIPPED, read_faults, write_faults
from llada_lightning.support.signals import say
from llada_lightning.training.guard import WINDOW, Fault, UpdateGuard
from llada_lightning.training.parallel import all_finite


class DivergedError(Exception):
    """Too many updates in a row were skipped, or weights are no numbers; the message is one line for people."""


class BadNumbers(Callback):
    """Reads what the module's guard has found, where the host waits for the device anyway.

    That is at logged steps, before a checkpoint, and every ``patience`` steps at the latest. Rows are keyed by step: a
    run that goes on from a checkpoint drops those of later steps, which it is about to repeat.

    Args:
        folder: where `faults.csv` goes.
        global_batch: sequences of a step.
        patience: updates skipped in a row that end the run.
    """

    def __init__(self, folder: Path, global_batch: int, patience: int) -> None:
        self._folder, self._global_batch, self._patience = folder, global_batch, patience
        self._step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step = trainer.global_step
        if trainer.is_global_zero:
            rows = read_faults(self._folder)
            kept = [row for row in rows if int(row["step"]) <= self._step]
            if len(kept) < len(rows):
                write_faults(self._folder, kept)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *arguments: Any) -> None:
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        logged = self._step % trainer.log_every_n_steps == 0 or self._step == trainer.max_steps  # type: ignore[attr-defined]
        if logged or self._step % self._patience == 0:
            guard = self._record(trainer, pl_module)
            # At these steps only, so that a run which goes on from a checkpoint ends at the same one. At its end a run
            # shorter than that has diverged where it has made no update at all.
            patience = min(self._patience, self._step) if self._step == trainer.max_steps else self._patience
            if guard.streak >= patience:
                raise DivergedError(
                    self._diverged(guard, f"no update since step {guard.last_update}, {guard.streak} skipped in a row")
                )

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """No checkpoint holds weights that are not numbers: an update of finite gradients, too, can make them so."""
        guard = self._record(trainer, pl_module)
        if not all_finite([parameter.detach() for parameter in pl_module.parameters()]):
            raise DivergedError(self._diverged(guard, f"weights are not finite after step {trainer.global_step}"))

    def _record(self, trainer: Trainer, pl_module: LightningModule) -> UpdateGuard:
        guard = pl_module.guard
        assert isinstance(guard, UpdateGuard)
        guard.settle()
        faults, guard.faults = guard.faults, []
        if faults and trainer.is_global_zero:
            for fault in faults:
                say(self._described(fault))
            write_faults(self._folder, [*read_faults(self._folder), *map(self._row, faults)])
        return guard

    def _ordinals(self, step: int) -> tuple[int, int]:
        """First and last sequence of a step."""
        return (step - 1) * self._global_batch, step * self._global_batch - 1

    def _row(self, fault: Fault) -> dict[str, Any]:
        first, last = self._ordinals(fault.step)
        action = SKIPPED if fault.skipped else REPORTED
        values = (fault.step, fault.kind, fault.loss, fault.grad_norm, first, last, action)
        return dict(zip(FAULT_COLUMNS, values, strict=True))

    def _described(self, fault: Fault) -> str:
        first, last = self._ordinals(fault.step)
        height = f" ({fault.zscore:.1f} deviations above the median of {WINDOW} steps)" if fault.kind == "spike" else ""
        return (
            f"step {fault.step}: loss {fault.loss:.4f}{height}, gradient norm {fault.grad_norm:.4g}, sequences "
            f"{first}-{last}: update {'skipped' if fault.skipped else 'made all the same'}; "
            f"llada replay {self._folder} --step {fault.step} shows them"
        )

    def _diverged(self, guard: UpdateGuard, reason: str) -> str:
        saved = checkpoints_by_step(self._folder / CHECKPOINTS)
        good = [str(saved[step]) for step in sorted(saved) if step <= guard.last_update]
        return (
            f"diverged: {reason}; last good checkpoint: {good[-1] if good else 'none'}; lower --model.schedule.lr, or "
            "look at the sequences"
        )
