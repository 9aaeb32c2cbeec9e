"""One point of `growth.py`, in a process of its own: reads a task from stdin, writes time and memory to stdout."""

from __future__ import annotations

import json
import sys
from statistics import median
from typing import Any

import torch

from efficiency_memory import CudaMemory, ResidentMemory
from llada_lightning.compute.shapes import get_shape
from llada_lightning.support.libraries import quiet_libraries
from llada_lightning.training.machine import Speed
from train_step import Steps, Variant, Workload

BATCHES = 4


def measure(task: dict[str, Any]) -> dict[str, float]:
    """Seconds of a step (the median), and memory.

    Returns:
        step_seconds; peak_bytes, the most that was held in steps; baseline_bytes, held before there was a model.
    """
    device = torch.device(task["device"])
    shape = get_shape(task["shape"])
    workload = Workload(
        task["objective"], shape, task["vocab_size"], task["sequence_length"], task["micro_batch"], device
    )
    memory = CudaMemory(device) if device.type == "cuda" else ResidentMemory()
    baseline = memory.reset()
    # A GPU computes as it does in a fit; on the CPU nothing is compiled, which would only add to the memory.
    gpu = device.type == "cuda"
    variant = Variant("ours", speed=Speed(compile=gpu), bf16=gpu, fused=True)
    steps = Steps(variant, workload, workload.batches(BATCHES))
    steps.timed(task["warmup"])
    seconds = median(steps.timed(task["steps"]))
    return {"step_seconds": seconds, "baseline_bytes": baseline, "peak_bytes": memory.peak()}


def main() -> None:
    task = json.load(sys.stdin)
    quiet_libraries()
    json.dump(measure(task), sys.stdout)


if __name__ == "__main__":
    main()
