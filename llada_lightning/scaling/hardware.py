"""Peak FLOP/s of devices, dense bf16, from the vendors' data sheets.

Figures with sparsity are twice as high and not meant here. A device that is not listed has no peak: its MFU is
unknown, never guessed.
"""

from __future__ import annotations

PEAK_FLOPS_BF16: dict[str, float] = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H800": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10G": 70e12,
    "A10": 125e12,
    "RTX 4090": 165e12,
}
"""Dense bf16 peak by a part of the device's name; the first that matches counts, so longer names stand first."""


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of a device by the name its driver gives, or None where it is not known."""
    if "MIG" in device_name:  # a slice has a share of the peak
        return None
    for part, peak in PEAK_FLOPS_BF16.items():
        if all(word in device_name.replace("-", " ").split() for word in part.split()):
            return peak
    return None
