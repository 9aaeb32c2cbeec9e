"""A profile of a run: the parts of its steps' time, in `summary.json` for programs and on one page for people."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llada_lightning.compute.hardware import MeasuredRate
from llada_lightning.compute.shapes import format_count
from llada_lightning.support.errors import UserError
from llada_lightning.support.printing import shortened
from llada_lightning.support.reading import read_json

PHASES = {
    "data": "waiting for data",
    "transfer": "batch to the device",
    "forward": "forward",
    "backward": "backward",
    "optimizer": "gradient clipping and optimizer",
    "callbacks": "callbacks: logging, checkpoints",
    "loop": "Lightning's loop",
}
"""The parts of a step, in their order, and their names on the page."""

SUMMARY_FILE = "summary.json"
_RATES = {
    "tokens/s": ("tokens_per_second", 1, ",.0f"),
    "GFLOP/s, 6ND": ("flops_6nd_per_second", 1e9, ",.1f"),
    "GFLOP/s, attention": ("flops_attention_per_second", 1e9, ",.1f"),
    "GFLOP/s, head": ("flops_head_per_second", 1e9, ",.1f"),
    "GFLOP/s, total": ("flops_total_per_second", 1e9, ",.1f"),
    "MFU (total)": ("mfu", 1, ".1%"),
}
_GIB = 2**30


def profiled_rate(path: Path | str) -> MeasuredRate:
    """The measurements of a profile: memory, and FLOP/s of one device in the steps before the profiler slowed them."""
    try:
        summary = read_json(path)
        speed = summary["unprofiled"] or summary["profiled"]
        rate = float(speed["flops_total_per_second"]) / int(summary["devices"])
        peak, estimate = summary["peak_memory_bytes"], summary["estimated_memory_bytes"]
        found = MeasuredRate(
            objective=str(summary["objective"]),
            params_nonembedding=float(summary["params_nonembedding"]),
            flops_per_second=rate,
            memory_ratio=None if peak is None or estimate is None else float(peak) / float(estimate),
        )
    except UserError as error:
        raise UserError(f"{error}; {_WRITTEN_BY}") from error
    except (ValueError, TypeError, KeyError, ArithmeticError) as error:
        reason = shortened(f"{type(error).__name__}: {error}")
        raise UserError(f"{path}: no profile's {SUMMARY_FILE} ({reason}); {_WRITTEN_BY}") from error
    if not (0 < found.flops_per_second < math.inf and 0 < found.params_nonembedding < math.inf):
        raise UserError(f"{path}: holds no throughput above 0; {_WRITTEN_BY}")
    return found


_WRITTEN_BY = "`llada fit --profile.steps 5` writes one into the run's folder"


def page(summary: Mapping[str, Any]) -> str:
    """The summary on one page of Markdown."""
    first, last = summary["steps"]
    step, phases = summary["step_milliseconds"], summary["phase_milliseconds"]
    sequences = f"{summary['micro_batch']} x accumulation {summary['accumulation']} x {summary['devices']} device(s)"
    facts = {
        "device": summary["device"],
        "threads of the CPU": summary["threads"],
        "model": f"{summary['objective']} {summary['shape']}: {format_count(summary['params_nonembedding'])} "
        f"parameters without embedding and head, {format_count(summary['params_total'])} in all",
        "vocabulary, length": f"{summary['vocab_size']:,} vocabulary entries, {summary['sequence_length']:,} tokens",
        "batch": f"{summary['global_batch']} sequences = micro-batch {sequences}",
        "precision, strategy": f"{summary['precision']}, {summary['strategy']}",
        "speed": ", ".join(f"{key} {value}" for key, value in summary["speed"].items()),
        "peak memory": _memory(summary),
    }
    sections = [
        f"# Profile of steps {first}-{last}",
        _table(("", ""), list(facts.items())),
        "## Speed",
        "The profiler slows what it watches: the speed of the run is that of the steps just before. All devices "
        "together; FLOPs by the three counts of a training token.",
        _speed_table(summary),
        "## A step",
        f"{step:.2f} ms on average under the profiler, validation left out.{_ON_GPU if summary['on_gpu'] else ''}"
        f"{_CHUNKED if summary['speed'].get('loss') == 'chunked' else ''}",
        _table(
            ("phase", "ms a step", "share"),
            [(label, f"{phases[name]:.2f}", f"{phases[name] / step:.1%}") for name, label in PHASES.items()],
        ),
        _communication(summary, step),
        "## Most expensive operations",
        _table(
            ("operation", "calls a step", "ms a step", "share"),
            [
                (f"`{found['name'][:80]}`", f"{found['calls']:g}", f"{spent:.2f}", f"{spent / step:.1%}")
                for found in summary["operations"]
                for spent in [found["milliseconds"]]
            ],
        ),
        "`trace*.json.gz` opens in https://ui.perfetto.dev; its names that begin with `[pl]` are Lightning's actions.",
    ]
    return "\n\n".join(sections) + "\n"


_CHUNKED = " The chunked loss takes the output head's gradients in the forward pass."
_ON_GPU = " Times are the GPU's: what the host does while the GPU is busy is not seen."


def _memory(summary: Mapping[str, Any]) -> str:
    peak, estimate = summary["peak_memory_bytes"], summary["estimated_memory_bytes"]
    if peak is None:
        return "n/a"
    told = f"{peak / _GIB:.2f} GiB"
    if estimate is not None:
        return f"{told}, {peak / estimate:.2f} x what `llada plan` estimates"
    return told if summary["on_gpu"] else f"{told} (the whole process, interpreter and libraries with it)"


def _speed_table(summary: Mapping[str, Any]) -> str:
    columns = [summary["unprofiled"], summary["profiled"]]

    def shown(column: Mapping[str, float] | None, key: str, unit: float, form: str) -> str:
        return "n/a" if column is None or column.get(key) is None else format(column[key] / unit, form)

    rows = [(label, *(shown(column, *how) for column in columns)) for label, how in _RATES.items()]
    return _table(("", "before", "under the profiler"), rows)


def _communication(summary: Mapping[str, Any], step: float) -> str:
    told = summary["communication_milliseconds"]
    line = (
        f"Communication (nccl, gloo) is under way for {told['total']:.2f} ms of them; for {told['alone']:.2f} ms "
        f"({told['alone'] / step:.1%}) nothing is computed meanwhile."
    )
    busy = summary["device_busy"]
    return line if busy is None else f"{line} The GPU is busy {busy:.1%} of the time."


def _table(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    lines = [head, ("---", *("---:" if head[0] or len(head) > 2 else "---" for _ in head[1:])), *rows]
    return "\n".join("| " + " | ".join(map(str, cells)) + " |" for cells in lines)
