"""A callback that writes down which sequences, under which noise, a process trains on, and may end the run."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer

from llada_lightning.objectives.batches import TrainingBatch


class OrdinalLog(Callback):
    """One line of JSON for each micro-batch, in a file for each process of a leg.

    Args:
        folder: of the files.
        leg: number of this start of the run.
        stop_step: in the middle of this step the first process sends ``signal_name``; null: the run goes to its end.
        signal_name: SIGKILL to all processes of the group, or SIGTERM to itself.
    """

    def __init__(self, folder: str, leg: int, stop_step: int | None = None, signal_name: str = "SIGTERM") -> None:
        self.folder, self.leg, self.stop_step, self.signal_name = Path(folder), leg, stop_step, signal_name

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: TrainingBatch, batch_idx: int
    ) -> None:
        line = {
            "leg": self.leg,
            "rank": trainer.global_rank,
            "step": trainer.global_step + 1,
            "ordinals": batch.ordinals_B.tolist(),
            "noise": noise_hashes(batch),
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / f"leg{self.leg}-rank{trainer.global_rank}.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")

    def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        if trainer.global_rank == 0 and trainer.global_step + 1 == self.stop_step:
            if self.signal_name == "SIGKILL":
                os.killpg(os.getpgrp(), signal.SIGKILL)
            os.kill(os.getpid(), signal.Signals[self.signal_name])


def noise_hashes(batch: TrainingBatch) -> list[str]:
    """For each sequence twelve digits of sha256 over its tokens, its mask probability p (which t determines), its mask,
    and what the model sees where that is not what the mask says."""
    columns = [batch.tokens_BL, batch.p_B, batch.masked_BL, *([] if batch.noisy_BL is None else [batch.noisy_BL])]
    parts = (b"".join(x.cpu().numpy().tobytes() for x in row) for row in zip(*columns, strict=True))
    return [hashlib.sha256(part).hexdigest()[:12] for part in parts]
