"""Achieved FLOP/s, MFU and peak memory, by hand; an older metrics.csv continues with the columns of today."""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llada_lightning.compute.flops import TrainingFlops
from llada_lightning.training.callbacks import accounting
from llada_lightning.training.callbacks.accounting import Accounting, peak_memory_bytes
from llada_lightning.training.callbacks.loggers import COLUMNS, MetricsCSV

PER_TOKEN = TrainingFlops(flops_6nd=6e9, flops_attention=3e9, flops_head=1e9)


def trainer(device: str = "cpu", world_size: int = 2) -> Any:
    return SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device(device)), world_size=world_size)


def test_a_throughput_by_the_three_counts_and_as_mfu(monkeypatch: pytest.MonkeyPatch) -> None:
    by_count = {
        "tokens_per_second": 100.0,
        "flops_6nd_per_second": 600e9,
        "flops_attention_per_second": 300e9,
        "flops_head_per_second": 100e9,
        "flops_total_per_second": 1000e9,
    }
    counted = Accounting(PER_TOKEN)
    assert counted.rates(trainer(), 100.0) == by_count
    monkeypatch.setattr(accounting, "device_name", lambda trainer: "NVIDIA H100 80GB HBM3")
    assert counted.rates(trainer(), 100.0) == {**by_count, "mfu": 1000e9 / (2 * 989e12)}


def test_rates_are_those_of_the_last_logged_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten tokens in 2 s; a first step of 100 s has left the window of logged steps, and pauses were never in it."""
    now = 0.0
    monkeypatch.setattr(accounting.time, "monotonic", lambda: now)
    counted = Accounting(PER_TOKEN)
    for step in range(22):
        now += 100 if step == 0 else 2
        counted._advance(training=True)
        counted.tokens += 10
        found = counted._rates(trainer())
        now += 1000
        counted.leave_out()  # a validation
    assert found["tokens_per_second"] == pytest.approx(10 / 2)
    assert found["flops_attention_per_second"] == pytest.approx(3e9 * 10 / 2)
    assert counted.settled(trainer()) == (100 + 21 * 2, 220)


def test_peak_memory_is_what_the_system_has_seen() -> None:
    found = peak_memory_bytes(torch.device("cpu"))
    assert found is not None
    status = Path("/proc/self/status")
    if status.exists():  # Linux keeps a second account
        kibibytes = next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        assert found >= 0.95 * 1024 * kibibytes  # more where the process that started this one held more
    assert 1e8 < found < 1e12
    assert peak_memory_bytes(torch.device("meta")) is None


def test_peak_memory_is_unknown_without_the_systems_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "resource", None)
    assert peak_memory_bytes(torch.device("cpu")) is None


def test_an_older_file_goes_on_with_new_columns(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("step,tokens,tokens_per_second,theirs\n1,256,10.5,a\n2,512,11.5,b\n3,768,12.5,c\n")
    log = MetricsCSV(tmp_path)
    for step in (3, 4):
        log.log_metrics({"tokens": 256.0 * step, "flops_total_per_second": 2.5e9, "peak_memory_bytes": 7}, step)
    log.finalize("success")
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == (*COLUMNS, "theirs")
    shown = ("step", "tokens", "tokens_per_second", "flops_total_per_second", "peak_memory_bytes", "theirs")
    assert [[row[key] for key in shown] for row in rows] == [
        ["1", "256", "10.5", "", "", "a"],
        ["2", "512", "11.5", "", "", "b"],
        ["3", "768", "12.5", "2500000000", "7", "c"],
        ["4", "1024", "", "2500000000", "7", ""],
    ]
