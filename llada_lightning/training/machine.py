"""What a configuration needs of the machine: devices, a precision that they compute in hardware, ways to be faster."""

from __future__ import annotations

import importlib.util
import re
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import Namespace
from lightning import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch import nn

from llada_lightning.compute.shapes import Shape
from llada_lightning.model import Transformer
from llada_lightning.model.attention import Backend, check_backend
from llada_lightning.model.transformer import Block, Recompute
from llada_lightning.settings import MAX_PROCESSES
from llada_lightning.support.cluster import device_count
from llada_lightning.support.errors import UserError
from llada_lightning.support.security import not_trusted
from llada_lightning.support.signals import say
from llada_lightning.support.threads import threads_set, usable_cores
from llada_lightning.support.torch_internals import has_cpp_compiler, has_triton
from llada_lightning.training.parallel import tensor_parallel

_GPU = ("gpu", "cuda")
_NONE_FOUND = f"torch {torch.__version__} finds no {{}} device here"
_WIDTH = 64
"""A GPU multiplies matrices whose widths are multiples of it fastest."""
_FP8_CAPABILITY = (8, 9)
"""The first GPUs that multiply 8-bit floats: Ada and Hopper."""


def check_devices(trainer: Namespace) -> None:
    """Refuse devices that are not there, unknown strategies, and classes that are not trusted.

    Args:
        trainer: The settings of the trainer, with the precision filled in. Instances, which only Python can give, pass.
    """
    accelerator, devices, strategy = trainer.accelerator, trainer.devices, trainer.strategy
    for key in ("accelerator", "strategy", "profiler"):
        # A class that may not be imported is left over as a string.
        if isinstance(trainer[key], str) and "." in trainer[key]:
            raise UserError(f"trainer.{key}: {not_trusted(_class_path(trainer[key]))}")
    known = StrategyRegistry.available_strategies()
    if isinstance(strategy, str) and "." not in strategy and strategy not in ("auto", *known):
        ours = ", ".join(["ddp", *(name for name in known if name.startswith("fsdp2"))])
        raise UserError(f"trainer.strategy: {strategy} given; use one of {ours}, or leave it out")
    named = ",".join(map(str, devices)) if isinstance(devices, (list, tuple)) else str(devices)
    if not re.fullmatch(r"auto|-1|[1-9]\d*|(\d+,)+\d*|0,?", named.replace(" ", "")):
        raise UserError(f"trainer.devices: {devices} given; give a number from 1, or leave it out")
    if accelerator in _GPU:
        _check_gpus(accelerator, devices)
    elif accelerator == "mps" and not torch.backends.mps.is_available():
        raise UserError(f"trainer.accelerator: mps given, but {_NONE_FOUND.format('MPS')}; leave it out, or give cpu")
    elif accelerator == "cpu" and not re.fullmatch(r"auto|[1-9]\d*", str(devices).strip()):
        raise UserError(f"trainer.devices: {devices} given; on the CPU it is a number of processes, such as 1")
    elif accelerator in ("cpu", "auto") and (device_count(devices) or 1) > MAX_PROCESSES:
        raise UserError(f"trainer.devices: {devices} given; {MAX_PROCESSES} processes of one machine are the most")
    uses_gpu = accelerator in (*_GPU, "auto") and torch.cuda.is_available()
    if str(trainer.precision).startswith("bf16") and uses_gpu and not _multiplies_bf16():
        say(f"note: {torch.cuda.get_device_name()} computes {trainer.precision} by way of fp32; 32-true is faster")


def _check_gpus(accelerator: str, devices: Any) -> None:
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not there:
        raise UserError(
            f"trainer.accelerator: {accelerator} given, but {_NONE_FOUND.format('CUDA')}; leave it out, or give cpu"
        )
    if isinstance(devices, str) and "," in devices:
        devices = [number for number in devices.split(",") if number.strip()]
    if isinstance(devices, (list, tuple)):
        wanted = max(int(number) + 1 for number in devices)
    else:
        wanted = device_count(devices) or 1
    if wanted > there:
        raise UserError(
            f"trainer.devices: {devices} given, but torch finds {there} GPU(s) here; give at most {there}, or leave it "
            "out (all that there are)"
        )


def _class_path(given: str) -> str:
    """The dotted path within `a.b`, `{class_path: a.b}` and `{"class_path": "a.b", …}`."""
    path = given.partition("class_path")[2] or given
    return path.strip(" :{}\"'").split(",")[0].strip(" }\"'")


def native_precision(accelerator: str) -> Literal["bf16-mixed", "32-true"]:
    """bf16-mixed where the device multiplies bf16 in hardware, else fp32."""
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return "bf16-mixed" if _multiplies_bf16() else "32-true"
    flags = Path("/proc/cpuinfo")  # Linux has it
    multiplies = flags.exists() and {"avx512_bf16", "amx_bf16"} & set(flags.read_text().split())
    return "bf16-mixed" if multiplies and accelerator in ("auto", "cpu") else "32-true"


def _multiplies_bf16() -> bool:
    return torch.cuda.is_bf16_supported(including_emulation=False)


@dataclass
class Speed:
    """How the same numbers are computed faster. But for fp8 nothing here makes another run.

    Args:
        attention: The back end of attention: sdpa, flash or flex (see ``model.attention``).
        compile: Whether torch.compile compiles each block; null: where a GPU trains. Later runs use what it compiled.
        graph: Whether an optimizer step is launched as two CUDA graphs (see ``training.step_graphs``); null: where one
            CUDA device trains on micro-batches of one length.
        padding: Whether the inner width of the feed-forward part is filled up with zeros to a multiple of 64 within the
            products, which changes no weight and no count; null: where blocks are compiled for a GPU.
        last_block: Whether the last block of masked diffusion computes all positions (`whole`), or attention alone for
            those that the loss does not read (`scored`); null: `scored` where steps are graphs.
        loss: `chunked` takes the cross-entropy with the output head, so that the logits of all positions are never in
            memory; `plain` makes all logits first.
        recompute: What the backward pass computes again instead of keeping it: none, selective (all but products and
            attention), or full (whole blocks).
        fp8: Whether the blocks multiply in 8-bit floats (torchao; Hopper, Ada and later). It makes another run.
    """

    attention: Backend = "sdpa"
    compile: bool | None = None
    graph: bool | None = None
    padding: bool | None = None
    last_block: Literal["whole", "scored"] | None = None
    loss: Literal["chunked", "plain"] = "chunked"
    recompute: Recompute = "none"
    fp8: bool = False


def resolve_speed(speed: Speed, shape: Shape, trainer: Trainer, training: bool) -> tuple[Speed, list[str]]:
    """What of the settings this machine can do. Where nothing is trained, nothing is compiled unless it is asked for.

    Returns:
        The settings to apply, and lines for the start of a run: what was given up, and what is live.

    Raises:
        UserError: An attention back end, or fp8, that is not installed or does not fit.
    """
    device = trainer.strategy.root_device
    dtype = torch.bfloat16 if str(trainer.precision).startswith("bf16") else torch.float32
    grouped = shape.n_kv_heads != shape.n_heads
    attention = check_backend(speed.attention, device, training, shape.head_dim, dtype, grouped)
    if speed.fp8:
        _check_fp8(device, isinstance(trainer.strategy, ModelParallelStrategy))
    compiled = speed.compile
    if compiled is None:
        compiled = training and device.type == "cuda"
    trouble = _compiler_trouble(device) if compiled else None
    compiled = compiled and trouble is None
    fits = not speed.fp8 and tensor_parallel(trainer.strategy) == 1
    if speed.last_block == "scored" and tensor_parallel(trainer.strategy) > 1:
        raise UserError("speed.last_block: scored given, but not with tensor parallelism, which divides the positions")
    if speed.padding and not fits:
        raise UserError(f"speed.padding: true given, but not with {'fp8' if speed.fp8 else 'tensor parallelism'}")
    padding = compiled and device.type == "cuda" and fits if speed.padding is None else speed.padding
    resolved = replace(speed, compile=compiled, padding=padding and shape.d_ff % _WIDTH != 0)
    lines = [] if trouble is None else [f"note: speed.compile: {trouble}; running without it, which changes no figure"]
    live = [f"attention {attention}", "blocks compiled" if resolved.compile else "blocks not compiled"]
    live += [f"{speed.loss} loss", *([] if speed.recompute == "none" else [f"{speed.recompute} recomputation"])]
    live += ["fp8 products"] if speed.fp8 else []
    live += [f"inner width padded to {shape.d_ff + -shape.d_ff % _WIDTH}"] if resolved.padding else []
    return resolved, [*lines, f"speed: {', '.join(live)}"]


# --- threads of the CPU ----------------------------------------------------------------------------------------------

_LARGE_PRODUCT = 2e9
"""FLOPs of a product that takes a hundredth of a second and more, beside which waiting for threads is nothing."""
_TIMED_STEPS = 3


def set_threads(trainer: Trainer, shape: Shape, sequences: int, length: int, before: int | None = None) -> str:
    """Set how many threads the CPU computes with.

    What the user has set stands (``support.threads``). Else a run on the CPU takes one, or all cores that it may use,
    whichever computes one block of the model faster now: small products gain by more threads on idle cores, and lose
    several times their time where other work keeps one of the cores busy.

    Args:
        trainer: The trainer of the run.
        shape: The shape of the model.
        sequences: The number of sequences of a micro-batch.
        length: The number of tokens of a sequence.
        before: The number of threads with which the run has begun. It is kept where the cores are there, since
            another number rounds sums differently.

    Returns:
        What the line about speed says of it, from the comma on; nothing where another device computes.
    """
    if trainer.strategy.root_device.type != "cpu":
        torch.set_num_threads(min(torch.get_num_threads(), usable_cores()))
        return ""
    cores = max(1, usable_cores() // trainer.num_devices)
    given = threads_set()
    large = 2.0 * sequences * length * shape.d_model * shape.d_ff >= _LARGE_PRODUCT
    if given is not None:
        threads, why = given, "as set"
    elif before is not None and before <= cores:
        threads, why = before, "as before"
    elif cores == 1:
        threads, why = 1, "its share of the cores"
    elif large:
        threads, why = cores, "all its cores"
    elif trainer.num_devices > 1:  # timed apart, the processes might choose differently
        threads, why = 1, "small products"
    else:
        one, several = (_block_seconds(shape, sequences, length, trainer.precision, n) for n in (1, cores))
        threads, other = (cores, 1) if several < one else (1, cores)
        why = f"{max(one, several) / min(one, several):.1f} times as fast as {other}"
    torch.set_num_threads(threads)
    return f", {threads} thread{'s' * (threads > 1)} ({why})"


def _block_seconds(shape: Shape, sequences: int, length: int, precision: object, threads: int) -> float:
    """The least seconds of a forward and backward pass of a model of one block."""
    torch.set_num_threads(threads)
    taken = []
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        model = Transformer(replace(shape, n_layers=1), vocab_size=2)
        tokens_BL = torch.zeros(sequences, length, dtype=torch.long)
        for _ in range(1 + _TIMED_STEPS):  # the first one warms up
            start = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16, enabled=str(precision).startswith("bf16")):
                hidden_BLD = model.hidden(tokens_BL, causal=True)
            hidden_BLD.float().sum().backward()
            taken.append(time.perf_counter() - start)
    return min(taken[1:])


# --- the settings of speed, applied ----------------------------------------------------------------------------------


def apply_speed(model: Transformer, speed: Speed, whole_blocks: bool = True) -> None:
    """Set a model, in place, to compute as resolved settings say; before it is sharded.

    Args:
        whole_blocks: Whether whole blocks are compiled; False: tensor parallelism compiles their parts later.
    """
    model.attend_with(speed.attention)
    if speed.fp8:
        _convert_to_fp8(model)
    for block in model.blocks:
        assert isinstance(block, Block)
        block.recompute = speed.recompute
        if speed.padding:
            block.feed_forward.padding = -block.feed_forward.up_proj.out_features % _WIDTH
        if speed.compile and whole_blocks:
            # One graph for each kind of micro-batch (padded or not, training or validation), shared by all blocks.
            block.compile(dynamic=False)
    if speed.compile:
        model.head.compiled = True


def _compiler_trouble(device: torch.device) -> str | None:
    """Why torch.compile cannot work here, or None."""
    if device.type == "cuda":
        return None if has_triton() else "Triton is missing, or does not know this GPU"
    return None if has_cpp_compiler() else "there is no C++ compiler here (install g++, or name one in CXX)"


def _check_fp8(device: torch.device, sharded: bool) -> None:
    if sharded:
        raise UserError("speed.fp8: true given, but the strategy shards the weights; use --trainer.strategy=ddp")
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < _FP8_CAPABILITY:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"the {device.type.upper()}"
        raise UserError(
            f"speed.fp8: true given, but {name} has no 8-bit products (Hopper, Ada and later have); leave it out"
        )
    if importlib.util.find_spec("torchao") is None:
        raise UserError('speed.fp8: true given, but torchao is not installed; pip install "llada-lightning[fp8]"')


def _convert_to_fp8(model: Transformer, **config: Any) -> None:
    """The blocks' linear layers by torchao, scaled tensor by tensor at each product; the head stays as it is."""
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    for block in model.blocks:
        convert_to_float8_training(block, config=Float8LinearConfig(**config), module_filter_fn=_fits_fp8)


def _fits_fp8(module: nn.Module, name: str) -> bool:
    """The hardware takes multiples of 16 only."""
    return isinstance(module, nn.Linear) and module.in_features % 16 == 0 and module.out_features % 16 == 0
