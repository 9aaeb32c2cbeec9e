"""What `train_speed.py` measures: variants of a training step by name, presets of sizes, and what is to be reached."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from llada_lightning.training.machine import Speed
from step_sizes import EAGER, EVERYTHING, FLASH, FLEX, GRAPHED, LARGE_STEPS, SMALL_STEPS, TINY_STEPS, Size
from train_step import Variant

RELEASED = "released loop: fp32, eager, all logits"
RELEASED_BF16 = "released loop in bf16-mixed"
GATHER = "+ logits of masked positions only"

RATIO_AIMS = {(4096, GATHER): 1.05, (4096, EVERYTHING): 2.5, (32_768, GATHER): 1.8, (32_768, EVERYTHING): 5.0}
"""Of the CPU's preset: least speed of `llada` over the released loop's, by vocabulary and variant."""


def cpu_variants(objective: str) -> list[Variant]:
    """Each one adds to the one before, but for the last; of `arm`, which has no positions to leave out, the ends."""
    plain, chunked, compiled = Speed(loss="plain", compile=False), Speed(compile=False), Speed(compile=True)
    released = Variant(RELEASED, released=True, reference=True)
    everything = Variant(EVERYTHING, speed=compiled, fused=True, bf16=True)
    if objective == "arm":
        return [released, Variant("+ chunked loss", speed=chunked), everything]
    return [
        released,
        Variant(GATHER, speed=plain),
        Variant("+ chunked loss", speed=chunked),
        Variant("+ fused AdamW", speed=chunked, fused=True),
        Variant("+ bf16-mixed", speed=chunked, fused=True, bf16=True),
        everything,
        Variant("everything on, in fp32", speed=compiled, fused=True),
    ]


def gpu_variants(objective: str) -> list[Variant]:
    """Up to "everything on" each one adds to the one before, and then each one changes one thing about that."""
    plain, chunked = Speed(loss="plain", compile=False), Speed(compile=False)
    gather = [Variant(GATHER, speed=plain, bf16=True)] if objective == "llada" else []

    def everything(name: str, speed: Speed) -> Variant:
        return Variant(name, speed=speed, bf16=True, fused=True)

    return [
        Variant(RELEASED, released=True, reference=True),
        Variant(RELEASED_BF16, released=True, reference=True, bf16=True),
        *gather,
        Variant("+ chunked loss", speed=chunked, bf16=True),
        everything("+ fused AdamW", chunked),
        everything(EVERYTHING, Speed(compile=True)),
        everything("selective recomputation", Speed(compile=True, recompute="selective")),
        everything("full recomputation", Speed(compile=True, recompute="full")),
        everything(FLASH, Speed(compile=True, attention="flash")),
        everything(FLEX, Speed(compile=True, attention="flex")),
        everything("fp8 products", Speed(compile=True, fp8=True)),
    ]


def step_variants(objective: str) -> list[Variant]:
    """Our own step in bf16-mixed with one kernel for AdamW: eager, compiled, as graphs, with other attention."""

    def variant(name: str, speed: Speed, reference: bool = False) -> Variant:
        return Variant(name, speed=speed, bf16=True, fused=True, reference=reference)

    return [
        variant(EAGER, Speed(compile=False), reference=True),
        variant(EVERYTHING, Speed(compile=True)),
        variant(GRAPHED, Speed(compile=True, graph=True, last_block="scored")),
        variant(FLASH, Speed(compile=True, attention="flash")),
        variant(FLEX, Speed(compile=True, attention="flex")),
    ]


@dataclass(frozen=True)
class Preset:
    """Sizes, and how long to measure.

    Attributes:
        variants: by objective.
        turns: rounds over all variants.
        steps: that a variant is measured for in a turn.
        warmup: steps of a new model before it is measured.
        gpu: taken to a GPU where there is one, and shown with MFU and memory.
        needs_gpu: too large for a CPU.
    """

    sizes: tuple[Size, ...]
    variants: Callable[[str], list[Variant]]
    turns: int
    steps: int
    warmup: int
    gpu: bool
    needs_gpu: bool = False


PRESETS = {
    "cpu": Preset(
        (Size("10.2m", 256, 4096, 16), Size("10.2m", 256, 32_768, 16)),
        cpu_variants,
        turns=3,
        steps=1,
        warmup=2,
        gpu=False,
    ),
    "h200": Preset(
        tuple(
            Size(shape, length, vocab_size, 8)
            for shape, length in (("85m", 2048), ("319m", 2048), ("llada-1b", 4096))
            for vocab_size in (32_768, 126_464)
        ),
        gpu_variants,
        turns=2,
        steps=6,
        warmup=3,
        gpu=True,
        needs_gpu=True,
    ),
    "small-steps": Preset(SMALL_STEPS, step_variants, turns=1, steps=60, warmup=10, gpu=True, needs_gpu=True),
    "large-steps": Preset(LARGE_STEPS, step_variants, turns=1, steps=8, warmup=4, gpu=True, needs_gpu=True),
    "tiny": Preset((Size("107k", 64, 384, 4),), gpu_variants, turns=2, steps=2, warmup=1, gpu=True),
    "tiny-steps": Preset(TINY_STEPS, step_variants, turns=1, steps=2, warmup=1, gpu=True),
}
