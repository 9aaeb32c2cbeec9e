"""Time a token and peak memory of a training step against length, size, vocabulary and batch, by the FLOP account.

One thing grows at a time, from the same first point; each measurement has a process of its own, because freed memory
may stay with a process. `time / FLOPs` is what the time a token has grown by over what the account (6ND, attention and
head together) has: 1 where the time follows it. Run: python benchmarks/growth.py --objective llada
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from bench_report import caption, circumstances, markdown, write_result
from efficiency_memory import MALLOC
from llada_lightning.compute.flops import MASK_EPS
from llada_lightning.compute.shapes import get_shape
from llada_lightning.objectives import get_objective

Point = dict[str, Any]
AXES: dict[str, dict[str, tuple[Any, ...]]] = {
    "cpu": {
        "sequence_length": (256, 512, 1024, 2048),
        "shape": ("853k", "2.66m", "6.43m", "14.2m"),
        "vocab_size": (2048, 8192, 32_768, 131_072),
        "micro_batch": (8, 16, 32),
    },
    "cuda": {
        "sequence_length": (1024, 2048, 4096, 8192),
        "shape": ("85m", "202m", "397m", "680m"),
        "vocab_size": (16_384, 32_768, 65_536, 131_072),
        "micro_batch": (4, 8, 16, 32),
    },
}
"""By device what grows, and its values; the first point has the first of each."""
FOLLOWS = 0.1
"""Time follows the account where the ratio of their growth is within this of 1."""


def measure(point: Point, objective: str, device: str, steps: int) -> dict[str, Any]:
    """The figures of a point, in a fresh process.

    Raises:
        RuntimeError: the process failed.
    """
    task = {**point, "objective": objective, "device": device, "steps": steps, "warmup": 3}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("growth_point.py"))],
        input=json.dumps(task),
        capture_output=True,
        text=True,
        env={**os.environ, **MALLOC, "PYTHONPATH": str(Path(__file__).parents[1])},
        check=False,
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise RuntimeError(f"growth: {point} failed: {reason}")
    figures: dict[str, Any] = json.loads(done.stdout)
    return figures


def account(point: Point, objective: str) -> float:
    """FLOPs of a token by our account, the head at masked positions only."""
    shape, length = get_shape(point["shape"]), point["sequence_length"]
    return get_objective(objective).flops_per_token(shape, point["vocab_size"], length, MASK_EPS).flops_total


def points(axes: dict[str, tuple[Any, ...]]) -> list[tuple[str, Point]]:
    """Each point with the axis that it lies on; the first one lies on all of them, and stands once."""
    first = {axis: values[0] for axis, values in axes.items()}
    return [("", first)] + [(axis, {**first, axis: value}) for axis, values in axes.items() for value in values[1:]]


def study(axes: dict[str, tuple[Any, ...]], objective: str, device: str, steps: int, repeats: int) -> list[Point]:
    """All points, several times over in turns, as rows: medians, and ratios to the first point."""
    where = points(axes)
    taken = [[measure(point, objective, device, steps) for _, point in where] for _ in range(repeats)]
    rows = []
    for number, (axis, point) in enumerate(where):
        figures = {key: median(turn[number][key] for turn in taken) for key in taken[0][number]}
        tokens = point["micro_batch"] * point["sequence_length"]
        rows.append(
            {
                "axis": axis,
                **point,
                **figures,
                "token_seconds": figures["step_seconds"] / tokens,
                "flops_per_token": account(point, objective),
                "memory_bytes": figures["peak_bytes"] - figures["baseline_bytes"],
            }
        )
    first = rows[0]
    for row in rows:
        row |= {f"{key}_ratio": row[key] / first[key] for key in ("token_seconds", "flops_per_token", "memory_bytes")}
        row["time_over_flops"] = row["token_seconds_ratio"] / row["flops_per_token_ratio"]
        row["follows"] = abs(row["time_over_flops"] - 1) <= FOLLOWS
    return rows


def table(rows: Sequence[Point]) -> str:
    """The rows as Markdown."""
    header = [
        "growing",
        "value",
        "us a token",
        "x",
        "MFLOP a token",
        "x",
        "time / FLOPs",
        "follows",
        "memory, MiB",
        "x",
    ]
    lines = []
    for row in rows:
        axis = row["axis"]
        lines.append(
            [
                axis.replace("_", " ") or "first point",
                str(row[axis]) if axis else ", ".join(str(row[name]) for name in AXES["cpu"]),
                f"{1e6 * row['token_seconds']:.1f}",
                f"{row['token_seconds_ratio']:.2f}",
                f"{row['flops_per_token'] / 1e6:.1f}",
                f"{row['flops_per_token_ratio']:.2f}",
                f"{row['time_over_flops']:.2f}",
                "" if not axis else "yes" if row["follows"] else "no",
                f"{row['memory_bytes'] / 2**20:.0f}",
                f"{row['memory_bytes_ratio']:.2f}",
            ]
        )
    return markdown(header, lines)


def main(arguments: Sequence[str] | None = None, axes: dict[str, tuple[Any, ...]] | None = None) -> int:
    """The command; other axes than its own for a shorter look."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objective", choices=("llada", "arm"), default="llada")
    parser.add_argument("--device", choices=AXES, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=4, help="measured in a process")
    parser.add_argument("--repeats", type=int, default=2, help="processes of each point")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        result = {**circumstances(torch.device("cpu")), "rows": [], "status": "missing: no CUDA device here"}
        write_result(options.json, result)
        print(f"{caption(result)}\n\ngrowth on a GPU: {result['status']}")
        return 0
    rows = study(axes or AXES[options.device], options.objective, options.device, options.steps, options.repeats)
    result = {**circumstances(torch.device(options.device)), "objective": options.objective, "rows": rows}
    write_result(options.json, result)
    print(f"{caption(result)}\n\n`{options.objective}`:\n\n{table(rows)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
