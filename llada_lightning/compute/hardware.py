"""Peak FLOP/s of devices, dense bf16, and their memory, from the vendors' data sheets.

Figures with sparsity are twice as high and not meant here: where a data sheet prints those alone, half of them is
here. A device that is not listed has no peak, and nor has one that does not multiply bf16 in hardware (V100, T4): its
MFU is unknown, never guessed. Sources: NVIDIA's data sheets of the device, and beside them

- B200, GB200: NVIDIA Blackwell Architecture Technical Brief (dense and sparse side by side; a GB200 is one of the two
  GPUs of a superchip);
- RTX A6000, RTX 3090: NVIDIA Ampere GA102 Whitepaper, Appendix A (bf16 with fp32 accumulation);
- RTX 4090: NVIDIA Ada Whitepaper, Appendix A (likewise);
- MI300X: AMD Instinct MI300X data sheet.

What a planned run costs on a machine: memory of one device, and hours.
"""

from __future__ import annotations

import csv
import math
import re
from bisect import bisect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from importlib.resources import files
from statistics import median
from typing import TYPE_CHECKING, Literal

from llada_lightning.compute.flops import MAX_BATCH
from llada_lightning.compute.shapes import Shape, format_count
from llada_lightning.support.errors import UserError
from llada_lightning.support.printing import shortened

if TYPE_CHECKING:
    import pandas as pd

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


STATE_BYTES = 16
"""Bytes a parameter: fp32 weight, gradient, and AdamW's two moments (Rajbhandari et al. 2020, Sec. 3.1, with the
weights themselves in fp32 as under Lightning's bf16-mixed)."""

USABLE_MEMORY = 0.9
"""Share of a device's memory that a plan fills: the rest is CUDA's context, workspaces and fragmentation."""


def state_bytes(shape: Shape, vocab_size: int) -> float:
    """Weights, gradients and moments, and autocast's bf16 copies of all matrices but the embedding, in bytes."""
    return STATE_BYTES * shape.params_total(vocab_size) + 2 * (shape.params_nonembedding + vocab_size * shape.d_model)


def activation_bytes_per_token(shape: Shape) -> float:
    """What a step keeps of one token for the backward pass, logits apart, under bf16-mixed without recomputation.

    Counted as Korthikanti et al. 2022 (arXiv:2205.05198, Sec. 4.1) count 34 bytes x width for GPT; here, for a block
    of pre-norm RMSNorm, rotary positions, SwiGLU and no stored attention matrix, as PyTorch's autocast keeps them: the
    two norms' fp32 inputs (8 d), a bf16 input for each of the five projections behind a norm (10 d), queries and the
    attention's output (4 d), keys and values (4 kv), and four bf16 tensors of the inner width (8 d_ff). Then the last
    norm's input and the head's (6 d). ``torch.compile`` keeps less.
    """
    kv_width = shape.n_kv_heads * shape.head_dim
    block = 22 * shape.d_model + 4 * kv_width + 8 * shape.d_ff
    return shape.n_layers * block + 6 * shape.d_model


LossKind = Literal["plain", "chunked"]
"""How the cross-entropy behind the output head is computed: at once, or chunk by chunk with its gradients."""

LOGITS_CHUNK_BYTES = 2**30
"""bf16 logits that the chunked loss takes at a time on a GPU (``model.head``)."""


def logits_bytes(vocab_size: int, tokens: int, loss: LossKind = "chunked") -> float:
    """What a step holds of the logits of a micro-batch.

    Plain: at the start of the backward pass three fp32 tensors of the vocabulary's width are alive: log-probabilities,
    their gradient, and the logits'. Chunked: of one chunk the bf16 logits, the fp32 probabilities, and the gradient in
    bf16; that of the head's weight is among the states (:func:`state_bytes`) in any case.

    For `llada` too: with few sequences in a micro-batch nearly all of its positions may be masked.
    """
    logits = float(vocab_size * tokens)
    return 12 * logits if loss == "plain" else 8 * min(logits, LOGITS_CHUNK_BYTES / 2)


def training_memory_bytes(
    shape: Shape,
    vocab_size: int,
    sequence_length: int,
    micro_batch: int,
    shards: int = 1,
    loss: LossKind = "chunked",
) -> float:
    """Peak memory of one device in a training step under bf16-mixed: states, activations and logits.

    Args:
        shape: The dimensions of the Transformer.
        vocab_size: The number of vocabulary entries.
        sequence_length: The number of tokens of a sequence.
        micro_batch: The number of sequences of a forward pass on the device.
        shards: The number of devices over which FSDP divides the states. The block that it gathers is not counted.
        loss: The way in which the cross-entropy is computed.
    """
    tokens = micro_batch * sequence_length
    activations = tokens * activation_bytes_per_token(shape)
    return state_bytes(shape, vocab_size) / shards + activations + logits_bytes(vocab_size, tokens, loss)


@dataclass(frozen=True)
class MeasuredRate:
    """What a run has achieved: FLOP/s (6ND, attention and head together) of one device.

    Args:
        memory_ratio: The peak memory divided by :func:`training_memory_bytes`; None where both are not known.
        device: The device as the results name it; empty where it is not known.
    """

    objective: str
    params_nonembedding: float
    flops_per_second: float
    memory_ratio: float | None = None
    device: str = ""


def measured_rates(results: pd.DataFrame) -> tuple[MeasuredRate, ...]:
    """The rates of a results table's runs (``records``), those without a throughput or a size left out."""
    import pandas as pd

    rates = []
    for row in results.to_dict("records"):
        devices = re.match(r"(\d+) x ", str(row["device"]))
        tokens_per_second = row["tokens_per_second"]
        counts = (tokens_per_second, row["tokens"], row["params_nonembedding"], row["flops_total"])
        if any(pd.isna(count) or not count > 0 for count in counts):
            continue
        rate = tokens_per_second * row["flops_total"] / row["tokens"] / (int(devices[1]) if devices else 1)
        if math.isfinite(rate):
            kind = re.sub(r"^\d+ x ", "", str(row["device"]))
            rates.append(MeasuredRate(str(row["objective"]), float(row["params_nonembedding"]), rate, device=kind))
    return tuple(rates)


@cache
def shipped_rates(device_name: str) -> tuple[tuple[MeasuredRate, ...], str]:
    """The rates of a device that come with the package (``measured_speeds.csv``), and their source in words."""
    text = files("llada_lightning.compute").joinpath("measured_speeds.csv").read_text()
    rows = list(csv.DictReader(text.splitlines()))
    own = [row for row in rows if _listed({row["device"]: 1.0}, device_name)]
    rates = tuple(
        MeasuredRate(
            row["objective"],
            float(row["params_nonembedding"]),
            float(row["tokens_per_second"]) * float(row["flops_per_token"]),
        )
        for row in own
    )
    source = f"speeds measured on one {own[0]['device']} ({own[0]['date']}, commit {own[0]['commit']})" if own else ""
    return rates, source


@dataclass(frozen=True)
class Machine:
    """Where a study is to run. What is not known stays unknown, never guessed.

    Args:
        device: The name of the device, such as H100.
        devices: The number of devices that one run uses.
        mfu: The share of the dense bf16 peak that training achieves, with all three FLOP counts over it.
        measured: The rates of runs on such a device, which replace ``mfu``. Without either the rates count that come
            with the package.
        sharded: FSDP divides weights, gradients and moments among the devices.
        micro_batch: The number of sequences of a forward pass on one device; None: as many as fit.
    """

    device: str | None = None
    devices: int = 1
    mfu: float | None = None
    measured: tuple[MeasuredRate, ...] | None = None
    sharded: bool = False
    micro_batch: int | None = None

    def check(self, objectives: Iterable[str]) -> None:
        """Refuse settings that contradict one another.

        Raises:
            UserError: Names the setting.
        """
        if self.unknown is not None:
            raise UserError(f"plan: {self.unknown}; for another device leave it out, and give --measured RESULTS")
        for option, count in {"devices": self.devices, "micro-batch": self.micro_batch}.items():
            if count is not None and not 1 <= count <= MAX_BATCH:
                raise UserError(f"plan: --{option} {count} must lie between 1 and {MAX_BATCH}")
        if self.mfu is not None and self.measured is not None:
            raise UserError("plan: --mfu and --measured are both given; give one of them")
        if self.mfu is not None and not 0 < self.mfu <= 1:
            raise UserError(f"plan: --mfu {self.mfu:g} must lie above 0 and at most at 1, such as 0.4")
        if self.mfu is not None and self.peak is None:
            given = f"--device {self.device} has no known peak" if self.device else "--mfu needs --device"
            raise UserError(f"plan: {given}; known: {', '.join(PEAK_FLOPS_BF16)}; or give --measured RESULTS")
        for objective in objectives:
            if self.measured is not None and all(rate.objective != objective for rate in self.measured):
                raise UserError(
                    f"plan: --measured holds no throughput of {objective}; give a table or a profile of such a run, "
                    "too, or leave it out of --objectives"
                )

    @property
    def peak(self) -> float | None:
        """Dense bf16 FLOP/s of one device."""
        return peak_flops(self.device) if self.device else None

    @property
    def unknown(self) -> str | None:
        """What is wrong with the name of a device that is not listed; None for a listed one, and for none."""
        if self.device is None or self.memory is not None:
            return None
        name = " ".join(word for word in _WORDS.split(self.device.upper()))
        near = get_close_matches(name, MEMORY_GB, 1)
        nearest = f"; the nearest is {near[0]}" if near else ""
        return f"--device {shortened(self.device)} is not known{nearest}; known: {', '.join(MEMORY_GB)}"

    @property
    def memory(self) -> float | None:
        """Bytes of one device that a plan may fill."""
        known = memory_bytes(self.device) if self.device else None
        return None if known is None else USABLE_MEMORY * known

    def seconds(self, objective: str, params_nonembedding: float, flops_total: float) -> float | None:
        """Wall seconds of training on all devices, validation not counted; None where nothing tells the speed."""
        rate = self._flops_per_second(objective, params_nonembedding)
        return None if rate is None else flops_total / (rate * self.devices)

    @property
    def speeds(self) -> str | None:
        """Where the hours come from, in words; None where nothing tells the speed."""
        if self.measured is not None:
            devices = ", ".join(sorted({rate.device for rate in self.measured if rate.device}))
            on = f" on {shortened(devices)}" if devices else ""
            return f"the rates measured{on}, of the size nearest to each run's"
        if self.mfu is not None:
            return f"{self.mfu:.1%} of the dense bf16 peak"
        rates, source = shipped_rates(self.device) if self.device else ((), "")
        if not rates:
            return None
        sizes = [rate.params_nonembedding for rate in rates]
        ends = f"{format_count(min(sizes))} to {format_count(max(sizes))}"
        return f"{source} for sizes of {ends}, interpolated; --measured RESULTS takes your own"

    def _flops_per_second(self, objective: str, params_nonembedding: float) -> float | None:
        if self.measured is not None:
            return _nearest([rate for rate in self.measured if rate.objective == objective], params_nonembedding)
        if self.mfu is not None:
            return None if self.peak is None else self.peak * self.mfu
        rates, _ = shipped_rates(self.device) if self.device else ((), "")
        return _interpolated(rates, objective, params_nonembedding) if rates else None

    def memory_of(self, shape: Shape, vocab_size: int, sequence_length: int, micro_batch: int) -> float:
        """Peak memory of one device in bytes (:func:`training_memory_bytes`)."""
        shards = self.devices if self.sharded else 1
        return training_memory_bytes(shape, vocab_size, sequence_length, micro_batch, shards)

    def accumulation(self, shape: Shape, vocab_size: int, sequence_length: int, global_batch: int) -> int:
        """Micro-batches of a step on one device: the fewest with which it fits the memory, where that is known.

        Raises:
            UserError: Devices and micro-batch do not divide the global batch.
        """
        quantum = self.devices * (self.micro_batch or 1)
        if global_batch % quantum:
            micro = f" x micro-batch {self.micro_batch}" if self.micro_batch else ""
            raise UserError(f"plan: global batch {global_batch} is no multiple of {self.devices} device(s){micro}")
        per_device = global_batch // self.devices
        if self.micro_batch:
            return per_device // self.micro_batch
        if self.memory is None:
            return 1
        divisors = [count for count in range(1, per_device + 1) if per_device % count == 0]
        fitting = (
            count
            for count in divisors
            if self.memory_of(shape, vocab_size, sequence_length, per_device // count) <= self.memory
        )
        return next(fitting, per_device)


def _distance(rate: MeasuredRate, params_nonembedding: float) -> float:
    return abs(math.log(rate.params_nonembedding / params_nonembedding))


def _nearest(rates: Sequence[MeasuredRate], params_nonembedding: float) -> float:
    """FLOP/s of the size nearest to a run's; of several runs of that size the median."""
    least = min(_distance(rate, params_nonembedding) for rate in rates)
    return median(rate.flops_per_second for rate in rates if _distance(rate, params_nonembedding) == least)


def _interpolated(rates: Sequence[MeasuredRate], objective: str, params_nonembedding: float) -> float:
    """FLOP/s of a size between measured ones, by a line in logs; beyond them that of the nearest.

    Objectives are a few per cent apart, sizes a factor: of a size that was measured for others alone theirs counts.
    """
    sizes = sorted({rate.params_nonembedding for rate in rates})
    logs = []
    for size in sizes:
        here = [rate for rate in rates if rate.params_nonembedding == size]
        own = [rate for rate in here if rate.objective == objective]
        logs.append(math.log(median(rate.flops_per_second for rate in own or here)))
    right = min(max(bisect(sizes, params_nonembedding), 1), len(sizes) - 1) if len(sizes) > 1 else 0
    left = max(right - 1, 0)
    if left == right:
        return math.exp(logs[0])
    way = math.log(params_nonembedding / sizes[left]) / math.log(sizes[right] / sizes[left])
    return math.exp(logs[left] + min(1.0, max(0.0, way)) * (logs[right] - logs[left]))
