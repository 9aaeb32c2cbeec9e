"""A training step of `llada` and `arm`, ours against the released way of working: a ratio in one process.

Variants take turns, so that a machine that slows down slows all of them; a turn's ratio compares what was measured in
that turn, and the median of the turns and their range are shown. On the CPU all variants of a table stay in memory; on
a GPU each is built anew in its turn, so that it has the memory to itself. FLOPs are those of our account (the head at
masked positions only), whatever a variant computes. Beside each time stand the first losses, which must be the
reference's: same weights, same batches. Run: python benchmarks/train_speed.py --preset cpu
"""

from __future__ import annotations

import argparse
import gc
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from bench_report import caption, cell, circumstances, markdown, write_result
from llada_lightning.compute.flops import MASK_EPS
from llada_lightning.compute.hardware import peak_flops
from llada_lightning.compute.shapes import get_shape
from llada_lightning.objectives.batches import TrainingBatch
from llada_lightning.support.libraries import quiet_libraries
from llada_lightning.training.callbacks.leaving import is_out_of_memory
from speed_variants import PRESETS, RATIO_AIMS, Preset
from step_sizes import EVERYTHING, LEAST_OF_ARM, MFU_AIMS
from train_step import Steps, Variant, Workload, obstacle, synchronise

MEASURED = "measured"
BATCHES = 4


@dataclass
class Measurement:
    """What is known of a variant.

    Attributes:
        status: `measured`; `out of memory`; `missing: why` where the machine cannot; `failed: why` where it should.
        turns: by turn the seconds of each step.
        losses: of the first steps.
        peak_bytes: on a GPU, of torch's allocations.
    """

    variant: Variant
    status: str = MEASURED
    turns: list[list[float]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    peak_bytes: int | None = None

    @property
    def ok(self) -> bool:
        return self.status == MEASURED

    def measure(self, steps: Steps, count: int) -> None:
        self.turns.append(steps.timed(count))
        self.losses = steps.losses
        if steps.workload.device.type == "cuda":
            self.peak_bytes = torch.cuda.max_memory_allocated(steps.workload.device)


def measure_in_turns(variants: Sequence[Variant], workload: Workload, preset: Preset) -> list[Measurement]:
    """Time all variants of one workload; one that cannot run says why, and the others go on."""
    found = [Measurement(variant) for variant in variants]
    for one in found:
        reason = obstacle(one.variant, workload)
        one.status = MEASURED if reason is None else f"missing: {reason}"
    batches = workload.batches(BATCHES)
    kept: dict[str, Steps] = {}
    # A new table's models share no compiled code with the last one's, whose number torch limits.
    torch._dynamo.reset()
    for _ in range(preset.turns):
        for one in (one for one in found if one.ok):
            _take_turn(one, workload, batches, preset, kept)
            if workload.device.type == "cuda":
                gc.collect()
                torch.cuda.empty_cache()
    return found


def _take_turn(
    one: Measurement, workload: Workload, batches: list[TrainingBatch], preset: Preset, kept: dict[str, Steps]
) -> None:
    name, keep = one.variant.name, workload.device.type != "cuda"
    if not keep:
        torch._dynamo.reset()
        torch.cuda.reset_peak_memory_stats(workload.device)
    try:
        steps = kept.get(name) or warmed_up(one.variant, workload, batches, preset.warmup)
        one.measure(steps, preset.steps)
        if keep:
            kept[name] = steps
    except Exception as error:  # a row of its own: what the others have shown must not be lost
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        one.status = "out of memory" if is_out_of_memory(error) else f"failed: {reason}"
        traceback.clear_frames(error.__traceback__)


def warmed_up(variant: Variant, workload: Workload, batches: list[TrainingBatch], warmup: int) -> Steps:
    """A variant whose first steps, which compile and set up the optimizer, are done."""
    steps = Steps(variant, workload, batches)
    for _ in range(warmup):
        steps.step()
    synchronise(workload.device)
    return steps


def rows_of(found: Sequence[Measurement], workload: Workload, shape: str, preset_name: str) -> list[dict[str, Any]]:
    """The measurements of one workload for JSON, each beside the reference."""
    reference = next((one for one in found if one.variant.reference and one.ok), None)
    per_token = workload.module().flops_per_token(workload.sequence_length, MASK_EPS)
    peak = peak_flops(torch.cuda.get_device_name(workload.device)) if workload.device.type == "cuda" else None
    rows = []
    for one in found:
        row: dict[str, Any] = {
            "preset": preset_name,
            "shape": shape,
            "vocab_size": workload.vocab_size,
            "sequence_length": workload.sequence_length,
            "micro_batch": workload.micro_batch,
            "objective": workload.objective,
            "variant": one.variant.name,
            "status": one.status,
        }
        if one.ok:
            seconds = median(time for turn in one.turns for time in turn)
            rate = workload.tokens / seconds
            row |= {
                "step_seconds": seconds,
                "turns_seconds": one.turns,
                "tokens_per_second": rate,
                "flops_6nd_per_second": rate * per_token.flops_6nd,
                "flops_attention_per_second": rate * per_token.flops_attention,
                "flops_head_per_second": rate * per_token.flops_head,
                "flops_total_per_second": rate * per_token.flops_total,
                "peak_memory_bytes": one.peak_bytes,
                "losses": one.losses,
            }
            if peak is not None:
                row["mfu_6nd"] = rate * per_token.flops_6nd / peak
                row["mfu_6nd_attention"] = rate * (per_token.flops_6nd + per_token.flops_attention) / peak
                row["mfu"] = rate * per_token.flops_total / peak
            if reference is not None:
                row |= beside(one, reference)
        row |= aim(row)
        rows.append(row)
    return rows


def beside(one: Measurement, reference: Measurement) -> dict[str, Any]:
    """How many times as fast as the reference, turn by turn, and how far from its losses."""
    pairs = zip(reference.turns, one.turns, strict=True)
    ratios = [median(theirs) / median(ours) for theirs, ours in pairs]
    differences = [abs(a - b) for a, b in zip(one.losses, reference.losses, strict=True)]
    return {
        "reference": reference.variant.name,
        "ratio": median(ratios),
        "ratio_range": [min(ratios), max(ratios)],
        "first_loss_difference": differences[0],
        "loss_difference": max(differences),
    }


def aim(row: dict[str, Any]) -> dict[str, Any]:
    """What is to be reached by this row, and whether it is; nothing where there is no aim."""
    if row["preset"] == "cpu" and row["objective"] == "llada":
        key, least = "ratio", RATIO_AIMS.get((row["vocab_size"], row["variant"]))
    else:
        key, least = "mfu", MFU_AIMS.get(row["shape"]) if row["variant"] == EVERYTHING else None
    if least is None:
        return {}
    value = row.get(key)
    return {"aim": {"figure": key, "least": least, "met": None if value is None else value >= least}}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown, one table for each shape and vocabulary."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        key = (row["preset"], row["shape"], row["vocab_size"], row["sequence_length"], row["micro_batch"])
        groups.setdefault(key, []).append(row)
    parts = []
    for (preset, shape, vocab_size, length, micro_batch), members in groups.items():
        gpu = PRESETS[preset].gpu
        header = ["objective", "variant", "ms a step", "ratio (turns)", "tokens/s", "first loss", "later losses"]
        header += ["MFU 6ND", "+ attention", "+ head", "peak GiB"] if gpu else []
        title = f"{shape}, {vocab_size:,} words, {micro_batch} x {length} tokens:"
        parts.append(f"{title}\n\n{markdown([*header, 'to reach'], [_line(row, gpu) for row in members])}")
        parts += _one_against_the_other(members)
    return "\n\n".join(parts)


def _line(row: dict[str, Any], gpu: bool) -> list[str]:
    if row["status"] != MEASURED:
        rest = [""] * (4 + 4 * gpu)
        return [row["objective"], row["variant"], row["status"], *rest, _aim_text(row)]
    ratio = "reference" if row.get("reference") == row["variant"] else cell(row.get("ratio"))
    if ratio not in ("reference", "missing"):
        ratio += " ({:.2f} to {:.2f})".format(*row["ratio_range"])
    line = [row["objective"], row["variant"], f"{1e3 * row['step_seconds']:.1f}", ratio]
    line += [
        f"{row['tokens_per_second']:,.0f}",
        *(_loss(row, key) for key in ("first_loss_difference", "loss_difference")),
    ]
    if gpu:
        line += [cell(row.get(key), ".1%") for key in ("mfu_6nd", "mfu_6nd_attention", "mfu")]
        memory = row["peak_memory_bytes"]
        line.append(cell(None if memory is None else memory / 2**30, ".1f"))
    return [*line, _aim_text(row)]


def _loss(row: dict[str, Any], key: str) -> str:
    return cell(row.get(key), ".0e")


def _aim_text(row: dict[str, Any]) -> str:
    if "aim" not in row:
        return ""
    wanted = row["aim"]
    verdict = {True: "met", False: "not met", None: "missing"}[wanted["met"]]
    return f"{wanted['figure']} {wanted['least']:g}: {verdict}"


def _one_against_the_other(rows: Sequence[dict[str, Any]]) -> list[str]:
    """`llada` beside `arm` with everything on, as achieved FLOP/s: of one device it is the ratio of their MFU."""
    rates = {
        row["objective"]: row["flops_total_per_second"]
        for row in rows
        if row["variant"] == EVERYTHING and row["status"] == MEASURED
    }
    if set(rates) != {"arm", "llada"}:
        return []
    ratio = rates["llada"] / rates["arm"]
    return [f"Everything on, `llada` achieves {ratio:.3f} of `arm`'s FLOP/s (to reach: {LEAST_OF_ARM})."]


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure what the options ask for; after each workload what there is so far is written."""
    device, preset = torch.device(options.device), PRESETS[options.preset]
    preset = replace(preset, turns=options.turns or preset.turns)
    result: dict[str, Any] = {**circumstances(device), "rows": []}
    lacking = preset.needs_gpu and device.type != "cuda"
    for workload, name in workloads(options, preset):
        variants = [variant for variant in preset.variants(workload.objective) if chosen(variant, options.only)]
        if lacking:
            aimed = [variant for variant in variants if variant.name == EVERYTHING]
            found = [Measurement(variant, "missing: no CUDA device here") for variant in aimed]
        else:
            print(f"train_speed: {workload.objective} {name}, {workload.vocab_size} words", file=sys.stderr, flush=True)
            found = measure_in_turns(variants, workload, preset)
        result["rows"] += rows_of(found, workload, name, options.preset)
        write_result(options.json, result)
    if lacking:
        print(f"train_speed: {options.preset} needs a CUDA device, and this is {device}: tiny sizes", file=sys.stderr)
        tiny: dict[str, Any] = {"preset": "tiny", "shapes": [], "vocabularies": [], "micro_batch": None}
        result["rows"] += run(argparse.Namespace(**{**vars(options), **tiny, "json": None}))["rows"]
        write_result(options.json, result)
    return result


def workloads(options: argparse.Namespace, preset: Preset) -> Iterator[tuple[Workload, str]]:
    """Those of the preset that the options leave, with the names of their shapes."""
    sizes = [size for size in preset.sizes if not options.shapes or size.shape in options.shapes]
    if options.micro_batch:
        sizes = [replace(size, micro_batch=options.micro_batch) for size in sizes]
    if options.vocabularies:
        sizes = [replace(size, vocab_size=vocab_size) for size in sizes for vocab_size in options.vocabularies]
    for size in dict.fromkeys(sizes):
        for objective in options.objectives:
            tokens = (size.vocab_size, size.sequence_length, size.micro_batch)
            yield Workload(objective, get_shape(size.shape), *tokens, torch.device(options.device)), size.shape


def chosen(variant: Variant, only: Sequence[str]) -> bool:
    """References always; others where a part of their name is asked for, or nothing is."""
    return variant.reference or not only or any(part in variant.name for part in only)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--device", default=None, help="cpu or cuda; that of the preset where there is one")
    parser.add_argument("--shapes", nargs="+", default=[], help="of the preset's; all")
    parser.add_argument("--vocabularies", nargs="+", type=int, default=[], help="instead of the preset's")
    parser.add_argument("--objectives", nargs="+", choices=("llada", "arm"), default=["llada", "arm"])
    parser.add_argument("--only", nargs="+", default=[], help="parts of variants' names; references run anyway")
    parser.add_argument("--micro-batch", type=int, help="instead of the preset's")
    parser.add_argument("--turns", type=int, help="instead of the preset's")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args(arguments)
    if options.device is None:
        options.device = "cuda" if PRESETS[options.preset].gpu and torch.cuda.is_available() else "cpu"
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    quiet_libraries()
    warnings.filterwarnings("ignore", message=".*GPU available but not used.*")
    result = run(options)
    print(f"{caption(result)}\n\n{table(result['rows'])}")
    return 1 if any(row["status"].startswith("failed") for row in result["rows"]) else 0


if __name__ == "__main__":
    sys.exit(main())
