"""What a run costs in a sweep: forked from one process that has imported all it needs, or a process of its own.

The same sweep of tiny fits, two at once, once in each way. Then the fixed cost of a forked run: what each of ten
further runs of one step adds, one at a time.
Run: python benchmarks/sweep_speed.py
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from bench_report import caption, circumstances, write_result
from processes import child_environment, finish
from small_fits import prepare_corpora, write_sweep

LEAST_RATIO, MOST_SECONDS = 2.0, 2.5
"""To reach: own processes' seconds over forked ones', and the fixed seconds of a forked run."""


def sweep_seconds(folder: Path, data: Path, runs: int, jobs: int, steps: int, *extra: str) -> float:
    """Seconds of a sweep of ``runs`` fits (an even number: half of them `arm`, half `llada`) of ``steps`` steps."""
    few = (f"--trainer.max_steps={steps}", f"--trainer.val_check_interval={steps}")
    path = write_sweep(folder / "sweep.yaml", data, folder, *few, seeds=runs // 2)
    words = ["sweep", "run", str(path), "--jobs", str(jobs), *extra]
    environment = child_environment(folder / "tmp")
    start = time.monotonic()
    finish(words, folder / "log", environment)
    seconds = time.monotonic() - start
    assert len(list(folder.glob("kills/*/result.json"))) == runs
    return seconds


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=12)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = prepare_corpora(folder).first
        size = (data, options.runs, options.jobs, options.steps)
        seconds = {way: sweep_seconds(folder / way, *size, "--fork", way) for way in ("true", "false")}
        few, many = (sweep_seconds(folder / f"of{runs}", data, runs, 1, 1) for runs in (2, 12))
    ratio, fixed = seconds["false"] / seconds["true"], (many - few) / 10
    result = {**circumstances(torch.device("cpu")), "runs": options.runs, "jobs": options.jobs, "steps": options.steps}
    result |= {"forked": seconds["true"], "own": seconds["false"], "ratio": ratio, "fixed": fixed}
    write_result(options.json, result)
    print(
        f"{caption(result)}\n\nA sweep of {options.runs} runs of {options.steps} steps, {options.jobs} at once: "
        f"{seconds['true']:.1f} s forked, {seconds['false']:.1f} s in processes of their own, ratio {ratio:.2f} (to "
        f"reach {LEAST_RATIO}: {'met' if ratio >= LEAST_RATIO else 'not met'}). A forked run of one step takes "
        f"{fixed:.2f} s (to reach {MOST_SECONDS}: {'met' if fixed <= MOST_SECONDS else 'not met'})."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
