"""What a configuration asks of the machine, and the machine does not have: said before anything is built."""

from __future__ import annotations

import re
from typing import Any

import torch
from jsonargparse import Namespace
from lightning.pytorch.strategies import StrategyRegistry

from llada_lightning.settings import MAX_PROCESSES
from llada_lightning.support.cluster import device_count
from llada_lightning.support.errors import UserError
from llada_lightning.support.security import not_trusted
from llada_lightning.support.signals import say

_GPU = ("gpu", "cuda")


def check_devices(trainer: Namespace) -> None:
    """Refuse devices that are not there, in words that say what is.

    Args:
        trainer: The settings of the trainer, with the precision filled in. Instances, which only Python can give, pass.

    Raises:
        UserError: no such accelerator, fewer devices than asked for, or a class that is not trusted.
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
        raise UserError(f"trainer.accelerator: mps given, but {_no_gpu('MPS')}; leave it out, or give cpu")
    elif accelerator == "cpu" and not re.fullmatch(r"auto|[1-9]\d*", str(devices).strip()):
        raise UserError(f"trainer.devices: {devices} given; on the CPU it is a number of processes, such as 1")
    elif accelerator in ("cpu", "auto") and (device_count(devices) or 1) > MAX_PROCESSES:
        raise UserError(f"trainer.devices: {devices} given; {MAX_PROCESSES} processes of one machine are the most")
    if _emulates_bf16(trainer):
        say(f"note: {torch.cuda.get_device_name()} computes {trainer.precision} by way of fp32; 32-true is faster")


def _emulates_bf16(trainer: Namespace) -> bool:
    uses_gpu = trainer.accelerator in (*_GPU, "auto") and torch.cuda.is_available()
    asked = str(trainer.precision).startswith("bf16")
    return asked and uses_gpu and not torch.cuda.is_bf16_supported(including_emulation=False)


def _check_gpus(accelerator: str, devices: Any) -> None:
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not there:
        raise UserError(f"trainer.accelerator: {accelerator} given, but {_no_gpu('CUDA')}; leave it out, or give cpu")
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


def _no_gpu(kind: str) -> str:
    return f"torch {torch.__version__} finds no {kind} device here"


def _class_path(given: str) -> str:
    """The dotted path within `a.b`, `{class_path: a.b}` and `{"class_path": "a.b", …}`."""
    path = given.partition("class_path")[2] or given
    return path.strip(" :{}\"'").split(",")[0].strip(" }\"'")
