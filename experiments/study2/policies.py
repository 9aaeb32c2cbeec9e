"""Exact losses beside the bounds: `python experiments/study2/policies.py FOLDER [--jobs 2]`.

Of the results in FOLDER it measures those of the middle shape with seed 0: of `llada` and its recipe `easy` under the
policy that commits the surest token first, one a step, and of `block` with blocks of 4 tokens in random order. What is
measured is skipped.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from llada_lightning.records import RESULT_FILE, read_records

SHAPE = "L1-d64-h2-kv2-ff192"
POLICIES = {
    ("llada", ""): "confidence",
    ("llada", "density=range"): "confidence",
    ("block", "block_length=4"): "random_order",
}
"""By the objective and its variant, as far as the first bracket."""


def commands(folder: Path) -> Iterator[list[str]]:
    """The command for each result of a run that is left to measure."""
    for record in read_records(folder):
        policy = POLICIES.get((record["objective"], (record["variant"] or "").partition("(")[0]))
        measured = record.get("val_policies") or {}
        if policy is None or f"{policy}@1" in measured or (record["shape"], record["seed"]) != (SHAPE, 0):
            continue
        step = f"checkpoints/step={record['steps']:08d}.ckpt"
        branch = folder / "branches" / str(record["steps"]) / step
        yield [
            *("validate", "--config", str(folder / "config.yaml")),
            *("--ckpt_path", str(branch if branch.exists() else folder / step)),
            *("--run.policies", f"{{{policy}: 1}}"),
        ]


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure exact losses of the second study's middle shape.")
    parser.add_argument("study", type=Path, help="folder of the runs")
    parser.add_argument("--jobs", type=int, default=2, help="measurements at once")
    options = parser.parse_args()

    def measure(folder: Path) -> int:  # one after the other, as they write into the same file
        calls = ([sys.executable, "-m", "llada_lightning", *command] for command in commands(folder))
        return max((subprocess.run(call, check=False).returncode for call in calls), default=0)

    with ThreadPoolExecutor(options.jobs) as pool:
        folders = sorted(path.parent for path in options.study.glob(f"*/{RESULT_FILE}"))
        return max(pool.map(measure, folders), default=0)


if __name__ == "__main__":
    sys.exit(main())
