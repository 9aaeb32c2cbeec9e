"""What the loss by noise level adds to a training step, as a ratio of pairs of steps in one run.

A step is the loss of one micro-batch, its gradient and the optimizer's update. Of each pair one step hands its losses
over by noise level and the other does not; which one is first alternates, and both have the same batch. The host reads
the sums every `--log-every` steps, as a run does for a row of its log, and that is a part of the step. On a CPU the
seconds are those of this process, on one thread.

    python benchmarks/level_cost.py --shapes 53k 853k

The ratio is the median over the pairs, with an interval of 95 % from the order of their ratios. On a machine with
other work that interval is wider than the cost, so the time within the sums themselves is measured, too, as a share.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from llada_lightning.objectives import block, llada
from llada_lightning.objectives.batches import LevelSums, TrainingBatch
from llada_lightning.training.modules import BlockDiffusionModule, LladaModule
from llada_lightning.training.noise_levels import LevelLosses
from objective_speed import batch_of

SMALL = {"n_layers": 2, "d_model": 48, "n_heads": 4, "n_kv_heads": 4, "d_ff": 128}
"""53k parameters: at such a size a fixed cost for each step weighs most."""


def interval(values: list[float]) -> tuple[float, float]:
    """The 95 % interval of a median, between two of the values in their order (binomial, by its normal limit)."""
    ordered, count = sorted(values), len(values)
    reach = 0.98 * math.sqrt(count)
    low, high = math.floor((count - 1) / 2 - reach), math.ceil((count - 1) / 2 + reach)
    return ordered[max(0, low)], ordered[min(count - 1, high)]


class TimedLevels:
    """Sums by noise level, and the seconds that they take."""

    def __init__(self, levels: LevelLosses, clock: Callable[[], float]) -> None:
        self._levels, self._clock = levels, clock
        self.seconds = 0.0

    def add(self, *values: Any) -> None:
        start = self._clock()
        self._levels.add(*values)
        self.seconds += self._clock() - start

    def take(self, device: torch.device) -> None:
        start = self._clock()
        self._levels.take(device)
        self.seconds += self._clock() - start


def pairs_of_steps(module: LladaModule, batch: TrainingBatch, pairs: int, log_every: int, device: str) -> list[Any]:
    """(seconds with, seconds without, seconds within the sums) of each pair; the first pair is left out."""
    clock = time.perf_counter if device == "cuda" else time.process_time
    optimizer = module.optimizer_settings.build(list(module.named_parameters()))

    def loss(levels: LevelSums | None) -> torch.Tensor:
        if module.block_length is None:
            return llada.training_loss(module, batch, module.loss_weight, levels)
        return block.training_loss(module, batch, module.block_length, module.loss_weight, levels)

    found = []
    for pair in range(pairs + 1):
        seconds, levels = {}, TimedLevels(module.train_levels, clock)
        for on in (True, False) if pair % 2 else (False, True):
            start = clock()
            loss(levels if on else None).backward()
            optimizer.step()
            optimizer.zero_grad()
            if on and pair % log_every == 0:
                levels.take(torch.device(device))
            if device == "cuda":
                torch.cuda.synchronize()
            seconds[on] = clock() - start
        found.append((seconds[True], seconds[False], levels.seconds))
    return found[1:]


def measure(kind: type[LladaModule], shape: Any, given: argparse.Namespace) -> dict[str, Any]:
    """The ratio of one objective at one shape."""
    blocks = {"block_length": given.block_length} if kind is BlockDiffusionModule else {}
    module = kind(shape, given.vocab_size, given.vocab_size - 1, given.vocab_size - 2, **blocks)
    module.configure_model()
    module.to(given.device)
    batch = batch_of(given.sequences, given.length, given.vocab_size, module.block_length, given.device)
    seconds = pairs_of_steps(module, batch, given.pairs, given.log_every, given.device)
    ratios = [on / off for on, off, _ in seconds]
    low, high = interval(ratios)
    step = median(off for _, off, _ in seconds)
    share = sum(within for *_, within in seconds) / sum(on for on, *_ in seconds)
    figures = {"step_ms": 1e3 * step, "ratio": median(ratios), "low": low, "high": high, "share": share}
    return {"objective": module.objective, **figures}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["53k", "853k"])
    parser.add_argument("--vocab-size", type=int, default=512)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--block-length", type=int, default=16)
    parser.add_argument("--pairs", type=int, default=300)
    parser.add_argument("--log-every", type=int, default=10)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="write the result here too")
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    print(f"{given.sequences} x {given.length} tokens, {given.vocab_size} words; {given.device}, one thread")
    rows = []
    for shape in given.shapes:
        for kind in (LladaModule, BlockDiffusionModule):
            row = measure(kind, SMALL if shape == "53k" else shape, given)
            rows.append({"shape": shape, **row})
            print(
                f"{shape:>6} {row['objective']:<6} {row['step_ms']:8.2f} ms a step   with levels {row['ratio']:.4f} "
                f"({row['low']:.4f} to {row['high']:.4f}), of which the sums take {row['share']:.2%}",
                flush=True,
            )
    if given.json:
        given.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
