"""What `llada fit` adds to a bare PyTorch loop over the same model, batch and optimizer: a ratio in one process.

Both are run in turns, several times, on the same data folder, and the median step of each is compared. Lightning's
part holds everything that a real run does at each step: loader, loss, clipping, schedule, accounting, progress.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, Trainer

from llada_lightning.compute.schedule import WSD
from llada_lightning.data.datamodule import TokenDataModule
from llada_lightning.data.prepare import prepare
from llada_lightning.support.libraries import quiet_libraries
from llada_lightning.training import ArmModule, LladaModule
from llada_lightning.training.callbacks.accounting import Accounting, BudgetProgress
from llada_lightning.training.callbacks.loggers import MetricsCSV
from llada_lightning.training.cli import TRAINER_DEFAULTS
from llada_lightning.training.language_module import LanguageModule
from llada_lightning.training.machine import native_precision


class StepTimes(Callback):
    """Seconds from one step's end to the next one's."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, *args: Any) -> None:
        self.ends.append(time.perf_counter())


def build(module_class: type[LanguageModule], data: TokenDataModule, shape: str, steps: int) -> LanguageModule:
    tokenizer = data.tokenizer
    schedule = WSD(lr=1e-3).resolve(steps, data.expected_tokens_per_step, 1e-3)
    return module_class(shape, tokenizer.vocab_size, tokenizer.mask_id, tokenizer.eos_id, schedule=schedule)


def lightning_steps(module: LanguageModule, data: TokenDataModule, steps: int, precision: str) -> list[float]:
    """Step times of a fit as the command sets it up."""
    accounting = Accounting(module.flops_per_token(data.sequence_length, data.mask_eps))
    times = StepTimes()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            max_steps=steps,
            accelerator="cpu",
            precision=precision,  # type: ignore[arg-type]
            callbacks=[accounting, BudgetProgress("benchmark", accounting), times],
            enable_checkpointing=False,
            limit_val_batches=0,
            log_every_n_steps=max(1, steps // 100),
            **{**TRAINER_DEFAULTS, "logger": MetricsCSV(Path(folder))},
        )
        trainer.fit(module, datamodule=data)
    return between(times.ends)


def bare_steps(module: LanguageModule, data: TokenDataModule, steps: int, precision: str) -> list[float]:
    """Step times of a plain loop: forward, backward, clip, step, on batches that were loaded before."""
    module.configure_model()
    optimizer = module.configure_optimizers()["optimizer"]
    loader = iter(data.train_dataloader())
    batches = [next(loader) for _ in range(steps)]
    ends = []
    for batch in batches:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
            loss = module.training_loss(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ends.append(time.perf_counter())
    return between(ends)


def between(ends: list[float]) -> list[float]:
    """Differences, without the first steps, which warm up."""
    return [b - a for a, b in pairwise(ends[3:])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="1.28m")
    parser.add_argument("--steps", type=int, default=24, help="a turn")
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--json", type=Path, help="write the result here too")
    arguments = parser.parse_args()
    quiet_libraries()
    precision = native_precision("cpu")
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        prepare("python-stdlib", f"{folder}/data", vocab_size=2048, max_bytes=8_000_000, progress=False)
        for module_class in (ArmModule, LladaModule):
            times: dict[str, list[float]] = {"lightning": [], "bare": []}
            for _ in range(arguments.turns):
                for name, run in (("lightning", lightning_steps), ("bare", bare_steps)):
                    data = TokenDataModule(f"{folder}/data", sequence_length=256, global_batch=16)
                    # The bare loop has no trainer: its loader needs one that says rank 0 of 1.
                    data.trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
                    module = build(module_class, data, arguments.shape, arguments.steps)
                    times[name] += run(module, data, arguments.steps, precision)
            medians = {name: statistics.median(values) for name, values in times.items()}
            results[module_class.objective] = {
                "shape": arguments.shape,
                "precision": precision,
                "threads": torch.get_num_threads(),
                "lightning_ms": 1e3 * medians["lightning"],
                "bare_ms": 1e3 * medians["bare"],
                "ratio": medians["lightning"] / medians["bare"],
            }
    for objective, result in results.items():
        print(
            f"{objective}: llada fit {result['lightning_ms']:.1f} ms a step, bare loop {result['bare_ms']:.1f} ms, "
            f"ratio {result['ratio']:.3f} ({arguments.shape}, 16 x 256 tokens, {precision}, {platform.machine()})"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
