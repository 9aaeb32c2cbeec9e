"""Whether a run stays as fast and as small while it grows a thousandfold: one `llada fit`, its steps by decades.

Step times are differences between the rows of its metrics.csv, every step logged; the median leaves out what
checkpoints cost, the mean does not. Memory is the most that the process has held up to the decade's end.
Run: python benchmarks/long_run.py --steps 10000
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch

from bench_report import caption, circumstances, markdown, write_result
from llada_lightning.training.callbacks.loggers import read_rows
from processes import child_environment, finish
from small_fits import fit_words, prepare_corpora, run_folder

WARM_UP = 3
"""First steps that are not looked at: libraries load, the optimizer makes its moments."""
CONSTANT = 0.1


def fit(objective: str, steps: int, folder: Path) -> Path:
    """A fit of so many steps in a process of its own; its metrics.csv."""
    corpora = prepare_corpora(folder)
    words = fit_words(
        objective,
        corpora.first,
        folder / "runs",
        f"--trainer.max_steps={steps}",
        f"--trainer.val_check_interval={steps}",
        f"--run.checkpoint_every_steps={max(1, steps // 10)}",
    )
    finish(words, folder / "log", child_environment(folder / "tmp"), timeout=3600)
    return run_folder(folder / "runs") / "metrics.csv"


def decades(rows: Sequence[dict[str, str]]) -> list[dict[str, Any]]:
    """Steps 4-10, 11-100, 101-1000, ...: the seconds of a step, and memory at the end, beside the first decade's.

    Args:
        rows: of a metrics.csv, one for each step.
    """
    trained = [row for row in rows if "train_nats_per_token" in row]
    seconds = {int(b["step"]): float(b["seconds"]) - float(a["seconds"]) for a, b in pairwise(trained)}
    memory = {int(row["step"]): float(row["peak_memory_bytes"]) for row in trained}
    found: list[dict[str, Any]] = []
    first, last = WARM_UP + 1, 10
    while first <= max(seconds):
        last = min(last, max(seconds))
        times = [seconds[step] for step in range(first, last + 1)]
        found.append(
            {
                "steps": [first, last],
                "median_seconds": median(times),
                "mean_seconds": mean(times),
                "peak_memory_bytes": memory[last],
            }
        )
        first, last = last + 1, 10 * last
    for decade in found:
        for key in ("median_seconds", "peak_memory_bytes"):
            decade[f"{key}_ratio"] = decade[key] / found[0][key]
    return found


def table(found: Sequence[dict[str, Any]]) -> str:
    """The decades as Markdown."""
    header = ["steps", "median, ms", "x", "mean, ms", "peak memory, MiB", "x"]
    lines = [
        [
            "{} to {}".format(*decade["steps"]),
            f"{1e3 * decade['median_seconds']:.2f}",
            f"{decade['median_seconds_ratio']:.2f}",
            f"{1e3 * decade['mean_seconds']:.2f}",
            f"{decade['peak_memory_bytes'] / 2**20:.0f}",
            f"{decade['peak_memory_bytes_ratio']:.2f}",
        ]
        for decade in found
    ]
    return markdown(header, lines)


def constant(found: Sequence[dict[str, Any]]) -> bool:
    """Whether no decade is more than 10 % above the first, in time and in memory."""
    keys = ("median_seconds_ratio", "peak_memory_bytes_ratio")
    return all(decade[key] <= 1 + CONSTANT for decade in found for key in keys)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objective", choices=("llada", "arm"), default="llada")
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        found = decades(read_rows(fit(options.objective, options.steps, Path(folder))))
    result = {**circumstances(torch.device("cpu")), "objective": options.objective, "decades": found}
    result["constant"] = constant(found)
    write_result(options.json, result)
    verdict = "met" if result["constant"] else "not met"
    print(f"{caption(result)}\n\n{table(found)}\n\nTo reach: no decade more than 10 % above the first: {verdict}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
