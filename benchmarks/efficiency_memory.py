"""Peak memory of writing one answer, by input and output length (paper, Appendix B.7, Table 11).

Weights are random: of the checkpoint's shape, as memory does not depend on their values nor on the length that they
were trained on. Each model has a process of its own; on the CPU each measurement has, because freed memory may stay
with a process. On CUDA the peak is of torch's allocations; on the CPU it is the process's resident memory.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from llada_lightning.checkpoints.description import Description
from llada_lightning.checkpoints.language_model import LanguageModel
from llada_lightning.checkpoints.stored_tensors import dtype_named
from llada_lightning.compute.shapes import Shape
from llada_lightning.generation.sampler import generate
from llada_lightning.support.errors import UserError

LLADA_STEPS = 4
"""Of `llada`'s answers: every step computes the same tensors, of no more tokens than the first."""

LAST_TOKENS = 2
"""Of an `arm` without a cache only these are written, behind all the others: its peak is its last pass."""

MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""Tells glibc to give freed memory back at once, so that resident memory follows the tensors."""


def measure_memory(
    description: Description, dtype: str, device: str, inputs: Sequence[int], outputs: Sequence[int]
) -> list[dict[str, Any]]:
    """Peak memory of every input and output length, for an `arm` without and with its cache.

    Returns:
        Records of sampler, input, output, peak_bytes, and baseline_bytes (with the weights in place).

    Raises:
        UserError: a measurement failed, such as for lack of memory.
    """
    caches = {"arm, no cache": "none", "arm, cache": "kv"} if description.objective == "arm" else {"llada": "none"}
    jobs = [
        {"sampler": name, "cache": cache, "input": given, "output": written}
        for name, cache in caches.items()
        for given in inputs
        for written in outputs
    ]
    model = {
        "objective": description.objective,
        "shape": asdict(description.shape),
        "vocab_size": description.vocab_size,
        "rope_theta": description.rope_theta,
        "mask_token_id": description.mask_token_id,
        "start_token_id": description.start_token_id,
        "dtype": dtype,
        "device": device,
    }
    groups = [jobs] if torch.device(device).type == "cuda" else [[job] for job in jobs]
    return [row for group in groups for row in _in_a_process({**model, "jobs": group})]


def _in_a_process(task: dict[str, Any]) -> list[dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, str(Path(__file__).resolve())],
        input=json.dumps(task),
        capture_output=True,
        text=True,
        env={**os.environ, **MALLOC},
        check=False,
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise UserError(
            f"memory: measuring {task['objective']} failed ({reason}); try smaller --memory-inputs, -outputs"
        )
    rows: list[dict[str, Any]] = json.loads(done.stdout)
    return rows


# --- in the process --------------------------------------------------------------------------------------------------


def random_model(task: dict[str, Any]) -> LanguageModel:
    """A model of a shape; no token ends its answers, and its context is what is asked of it."""
    with torch.device("meta"):
        model = Description(
            task["objective"], Shape(**task["shape"]), task["vocab_size"], 0, task["mask_token_id"], 1,
            rope_theta=task["rope_theta"],
        ).transformer()  # fmt: skip
    model = model.to(dtype_named(task["dtype"])).to_empty(device=task["device"]).requires_grad_(False)
    model.initialise()
    context = max(job["input"] + job["output"] for job in task["jobs"]) + 16
    return LanguageModel(
        objective=task["objective"],
        model=model.eval(),
        mask_token_id=task["mask_token_id"],
        eos_token_id=-1,
        context_length=context,
        start_token_id=task["start_token_id"],
        name="random weights",
    )


def write_answer(lm: LanguageModel, given: int, written: int, cache: str) -> None:
    """One answer, or as much of it as reaches the peak."""
    steps = LLADA_STEPS if lm.objective == "llada" else None
    if lm.causal and cache == "none":
        last = min(LAST_TOKENS, written)
        given, written = given + written - last, last
    word = next(word for word in range(lm.model.vocab_size) if word != lm.mask_token_id)
    generate(lm, [[word] * given], length=written, steps=steps, cache=cache)  # type: ignore[arg-type]


class CudaMemory:
    """Of torch's allocations on one device, in bytes."""

    name = "cuda"

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def reset(self) -> int:
        torch.cuda.synchronize(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        return torch.cuda.memory_allocated(self._device)

    def peak(self) -> int:
        torch.cuda.synchronize(self._device)
        return torch.cuda.max_memory_allocated(self._device)


class ResidentMemory:
    """Of this process, in bytes."""

    name = "resident"

    def reset(self) -> int:
        """Memory now. Linux forgets the peak so far; elsewhere that of the start counts too."""
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            return self.peak()
        return self._status("VmRSS")

    def peak(self) -> int:
        try:
            return self._status("VmHWM")
        except OSError:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            return peak if sys.platform == "darwin" else peak * 1024

    def _status(self, key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith(key)).split()[1])


def main() -> None:
    """Reads a task from stdin, writes its records to stdout."""
    task = json.load(sys.stdin)
    lm = random_model(task)
    memory = CudaMemory(lm.device) if lm.device.type == "cuda" else ResidentMemory()
    rows = []
    for job in task["jobs"]:
        write_answer(lm, 4, 8, job["cache"])  # libraries load what they need
        baseline = memory.reset()
        write_answer(lm, job["input"], job["output"], job["cache"])
        found = {"baseline_bytes": baseline, "peak_bytes": memory.peak()}
        rows.append({**job, **found, "measure": memory.name, "llada_steps": LLADA_STEPS})
    json.dump(rows, sys.stdout)


if __name__ == "__main__":
    main()
