"""Devices that are not there, and clocks that jump."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import Namespace

from helpers import tiny_runs
from helpers.tiny_runs import call_at, fit, fit_arguments, losses, metrics, record
from llada_lightning.commands.main import main
from llada_lightning.support.errors import UserError
from llada_lightning.training.machine import check_devices


def trainer(**settings: Any) -> Namespace:
    defaults = {"accelerator": "auto", "devices": "auto", "strategy": "auto", "profiler": None, "precision": "32-true"}
    return Namespace(**{**defaults, **settings})


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with two GPUs that know no bfloat16."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")


@pytest.mark.parametrize("name", ["gpu", "cuda", "mps"])
def test_a_missing_gpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(UserError, match=rf"trainer.accelerator: {name} given, but torch .* finds no .* device here; "):
        check_devices(trainer(accelerator=name))


@pytest.mark.usefixtures("gpus")
@pytest.mark.parametrize("devices", ["8", 8, [0, 7], "0,2", [2]])
def test_more_gpus_than_there_are(devices: Any) -> None:
    with pytest.raises(UserError, match=r"torch finds 2 GPU\(s\) here; give at most 2"):
        check_devices(trainer(accelerator="gpu", devices=devices))


@pytest.mark.usefixtures("gpus")
@pytest.mark.parametrize("devices", ["auto", "-1", 2, "2", [0, 1], "0,1", "1,"])
def test_gpus_that_are_there(devices: Any) -> None:
    check_devices(trainer(accelerator="cuda", devices=devices))


@pytest.mark.parametrize(("accelerator", "devices"), [("cpu", "0"), ("cpu", [0, 1]), ("cpu", "-1"), ("auto", "many")])
def test_devices_that_are_no_number(accelerator: str, devices: Any) -> None:
    with pytest.raises(UserError, match=r"trainer.devices: .* given; "):
        check_devices(trainer(accelerator=accelerator, devices=devices))


@pytest.mark.usefixtures("gpus")
def test_bfloat16_that_is_emulated_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    check_devices(trainer(precision="bf16-mixed"))
    assert capsys.readouterr().err == "note: Tesla T4 computes bf16-mixed by way of fp32; 32-true is faster\n"
    check_devices(trainer(precision="32-true"))
    check_devices(trainer(precision="bf16-mixed", accelerator="cpu"))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("--trainer.accelerator=tpu", "torch_xla"),
        ("--trainer.accelerator=none_such", "invalid accelerator name"),
        ("--trainer.strategy=none_such", "use one of ddp, fsdp2, fsdp2_tp2, fsdp2_tp4, fsdp2_tp8"),
        ("--trainer.strategy=ddp_spawn", "keep what they train to themselves; use ddp"),
        ("--trainer.plugins=[none_such]", "trainer.plugins"),
        ("--trainer.precision=transformer-engine", "transformer_engine"),
        ("--trainer.precision=8-true", "trainer.precision: 8-true given"),
        ("--trainer.profiler=none_such", "profiler"),
        ("--trainer.gradient_clip_val=-1", "trainer.gradient_clip_val: -1 must be above 0"),
    ],
)
def test_a_name_that_lightning_does_not_know_is_one_line(
    prepared: Path, tmp_path: Path, argument: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(fit_arguments("arm", prepared, tmp_path, argument)) == 2
    [line] = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ") and said in line
    assert not list(tmp_path.iterdir())


def test_a_clock_that_jumps_changes_no_figure(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = fit("arm", prepared, tmp_path / "whole", "--trainer.max_steps=6")
    real = time.time
    jumps = iter([-1e6, 1e9, 0.0])

    def jump() -> None:
        offset = next(jumps)
        monkeypatch.setattr(time, "time", lambda: real() + offset)

    monkeypatch.setitem(tiny_runs.CALLS, "jump", jump)
    callbacks = ", ".join(call_at(step, "jump").partition("=[")[2].rstrip("]") for step in (1, 3, 4))
    folder = fit("arm", prepared, tmp_path / "jumped", "--trainer.max_steps=6", f"--trainer.callbacks=[{callbacks}]")
    assert next(jumps, None) is None
    assert losses(folder) == losses(whole)
    seconds = [float(row["seconds"]) for row in metrics(folder) if row["seconds"]]
    assert seconds == sorted(seconds) and 0 < seconds[-1] <= record(folder)["wall_seconds"] < 1e5
    assert all(float(row["tokens_per_second"]) > 0 for row in metrics(folder) if row["tokens_per_second"])
    exact = ("tokens", "flops_6nd", "steps", "val_nats_per_token")
    assert [record(folder)[key] for key in exact] == [record(whole)[key] for key in exact]
