"""The sizes and variants of a step that several benchmarks measure, and what is to be reached; without torch."""

from __future__ import annotations

from dataclasses import dataclass

EVERYTHING = "+ compiled blocks: everything on"
EAGER, FLASH, FLEX = "eager", "attention by flash", "attention by flex"
GRAPHED = "steps as graphs"

MFU_AIMS = {"85m": 0.45, "319m": 0.47, "llada-1b": 0.5}
"""Least MFU on a GPU, attention and head counted, by shape; ``LARGE_STEPS`` has the sizes."""
LEAST_OF_ARM = 0.97
"""Least MFU of `llada` over that of `arm`."""


@dataclass(frozen=True)
class Size:
    """What a step is measured on: a shape by name, tokens of a sequence, vocabulary entries, sequences of a step."""

    shape: str
    sequence_length: int
    vocab_size: int
    micro_batch: int

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.sequence_length * self.micro_batch


SMALL_STEPS = (Size("853k", 256, 4096, 64), Size("2.66m", 256, 4096, 64), Size("14.2m", 512, 8192, 64))
"""Launches take longer than arithmetic."""
LARGE_STEPS = (Size("85m", 2048, 32_768, 8), Size("319m", 2048, 32_768, 8), Size("llada-1b", 4096, 126_464, 8))
TINY_STEPS = (Size("107k", 64, 512, 4),)
"""For a CPU, where only the way is tried."""
SIZES = {size.shape: size for size in (*SMALL_STEPS, *LARGE_STEPS, *TINY_STEPS)}
"""By shape."""
