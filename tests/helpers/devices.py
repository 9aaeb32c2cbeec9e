"""The devices that a test runs on: the CPU always, and a GPU where there is one."""

from __future__ import annotations

from typing import Any

import pytest


def on_gpu(*values: Any) -> Any:
    """The values of a test's parameters with which it runs on a GPU."""
    return pytest.param(*values, marks=pytest.mark.gpu)


DEVICES = pytest.mark.parametrize("device", ["cpu", on_gpu("cuda")])
"""Runs a test on the CPU and, marked `gpu`, with the same body on a GPU."""


def on(device: str) -> tuple[str, ...]:
    """Arguments of a tiny run that put it on a device. Nothing is compiled, which would take most of the time."""
    return (f"--trainer.accelerator={device}", "--trainer.devices=1", "--speed.compile=false")
