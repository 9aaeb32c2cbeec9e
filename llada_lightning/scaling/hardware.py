"""Peak FLOP/s of devices, dense bf16, and their memory, from the vendors' data sheets.

Figures with sparsity are twice as high and not meant here: where a data sheet prints those alone, half of them stands
here. A device that is not listed has no peak, and nor has one that does not multiply bf16 in hardware (V100, T4): its
MFU is unknown, never guessed. Sources: NVIDIA's data sheets of the device, and beside them

- B200, GB200: NVIDIA Blackwell Architecture Technical Brief (dense and sparse side by side; a GB200 is one of the two
  GPUs of a superchip);
- RTX A6000, RTX 3090: NVIDIA Ampere GA102 Whitepaper, Appendix A (bf16 with fp32 accumulation);
- RTX 4090: NVIDIA Ada Whitepaper, Appendix A (likewise);
- MI300X: AMD Instinct MI300X data sheet.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

PEAK_FLOPS_BF16: dict[str, float] = {
    "H200": 989e12,
    "H200 NVL": 835e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "GB200": 2500e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H800": 989e12,
    "A100": 312e12,
    "A100 PCIe": 312e12,
    "A800": 312e12,
    "A800 PCIe": 312e12,
    "A40": 149.7e12,
    "A30": 165e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "A10G": 70e12,
    "A10": 125e12,
    "RTX A6000": 154.8e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "MI300X": 1307.4e12,
}
"""Dense bf16 peak by the device's name, without maker, memory and socket."""

MEMORY_GB: dict[str, float] = {
    "H200": 141,
    "H200 NVL": 141,
    "GH200": 96,
    "B200": 180,
    "GB200": 186,
    "H100 PCIe": 80,
    "H100 NVL": 94,
    "H100": 80,
    "H800": 80,
    "A100": 40,
    "A100 PCIe": 40,
    "A800": 80,
    "A800 PCIe": 80,
    "A40": 48,
    "A30": 24,
    "L40S": 48,
    "L40": 48,
    "L4": 24,
    "A10G": 24,
    "A10": 24,
    "RTX A6000": 48,
    "RTX 4090": 24,
    "RTX 3090": 24,
    "MI300X": 192,
}
"""Memory in the data sheet's GB, the smaller where a device comes in two sizes and its name does not say which."""

_WORDS = re.compile(r"[\s-]+")
_PLAIN = re.compile(r"nvidia|geforce|amd|instinct|gpu|sxm\d?|hbm\de?|\d+gb|")
"""Words of a device's name that change no figure of the list. PCIe, NVL, D, Ti and others do, or may: `H800 PCIe`,
`RTX 3090 Ti` and `RTX 4090 D` are other devices than those listed, and not known."""

_NAMED_MEMORY = re.compile(r"(\d+)GB\b", re.IGNORECASE)


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of a device by the name its driver gives, or None where it is not known."""
    return _listed(PEAK_FLOPS_BF16, device_name)


def memory_bytes(device_name: str) -> float | None:
    """Memory of a device by the name its driver gives (`A100-SXM4-80GB` says it itself), or None where it is not known.

    A data sheet's GB is read as 10^9 bytes, the smaller of its readings.
    """
    listed = _listed(MEMORY_GB, device_name)
    # A GH200's name gives the memory of its processor: `NVIDIA GH200 480GB`.
    named = None if "GH200" in device_name.upper() else _NAMED_MEMORY.search(device_name)
    return None if listed is None else 1e9 * (float(named[1]) if named else listed)


def _listed(table: Mapping[str, float], device_name: str) -> float | None:
    if "MIG" in device_name:  # a slice has a share of peak and memory
        return None
    words = [word for word in _WORDS.split(device_name.lower()) if not _PLAIN.fullmatch(word)]
    return next((figure for part, figure in table.items() if part.lower().split() == words), None)
