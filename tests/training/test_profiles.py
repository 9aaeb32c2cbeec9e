"""A profile's summary: the page for people, the picture, and what `llada plan` makes of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llada_lightning.commands.main import main
from llada_lightning.compute.hardware import MeasuredRate
from llada_lightning.study.plots.tables import step_phases
from llada_lightning.support.errors import UserError
from llada_lightning.training.profiles import PHASES, page, profiled_rate

SPEED = {
    "tokens_per_second": 40_000.0,
    "flops_6nd_per_second": 4e12,
    "flops_attention_per_second": 3e12,
    "flops_head_per_second": 1e12,
    "flops_total_per_second": 8e12,
    "mfu": 0.4125,
}
MILLISECONDS = dict(zip(PHASES, (1.0, 2.0, 30.0, 50.0, 12.0, 4.0, 1.0), strict=True))


def summary(**changes: Any) -> dict[str, Any]:
    found = {
        "objective": "llada", "shape": "443k", "params_nonembedding": 443_000, "params_total": 1_000_000,
        "vocab_size": 1024, "sequence_length": 128, "global_batch": 64, "micro_batch": 4, "accumulation": 2,
        "device": "8 x NVIDIA H100 80GB HBM3", "devices": 8, "on_gpu": True, "threads": 16, "precision": "bf16-mixed",
        "strategy": "FullySharded", "speed": {"compile": True, "loss": "chunked"},
        "steps": [11, 15], "unprofiled": SPEED,
        "profiled": {**SPEED, "flops_total_per_second": 4e12, "mfu": 0.2}, "peak_memory_bytes": 3 * 2**30,
        "estimated_memory_bytes": 2.5 * 2**30, "step_milliseconds": 100.0, "phase_milliseconds": MILLISECONDS,
        "communication_milliseconds": {"total": 20.0, "alone": 5.0}, "device_busy": 0.875,
        "operations": [{"name": "gemm", "milliseconds": 25.0, "calls": 12.0}],
    }  # fmt: skip
    return {**found, **changes}


def written(folder: Path, **changes: Any) -> Path:
    path = folder / f"{changes.get('objective', 'llada')}.json"
    path.write_text(json.dumps(summary(**changes)))
    return path


def test_the_page_says_what_the_summary_holds() -> None:
    lines = page(summary()).splitlines()
    for line in (
        "# Profile of steps 11-15",
        "| device | 8 x NVIDIA H100 80GB HBM3 |",
        "| batch | 64 sequences = micro-batch 4 x accumulation 2 x 8 device(s) |",
        "| speed | compile True, loss chunked |",
        "| peak memory | 3.00 GiB, 1.20 x what `llada plan` estimates |",
        "| tokens/s | 40,000 | 40,000 |",
        "| GFLOP/s, total | 8,000.0 | 4,000.0 |",
        "| MFU (total) | 41.2% | 20.0% |",
        "| backward | 50.00 | 50.0% |",
        "| gradient clipping and optimizer | 12.00 | 12.0% |",
        "| `gemm` | 12 | 25.00 | 25.0% |",
    ):
        assert line in lines
    assert "5.00 ms (5.0%) nothing is computed meanwhile. The GPU is busy 87.5% of the time." in page(summary())


def test_the_page_says_what_is_not_known() -> None:
    told = page(summary(unprofiled=None, peak_memory_bytes=None, device_busy=None))
    assert "| tokens/s | n/a | 40,000 |" in told and "| peak memory | n/a |" in told and "The GPU is busy" not in told


def test_the_picture_is_a_step_end_to_end() -> None:
    [axes] = step_phases(MILLISECONDS, PHASES).axes
    bars = [bar for container in axes.containers for bar in container]
    assert [bar.get_width() for bar in bars] == list(MILLISECONDS.values())
    assert [bar.get_x() for bar in bars] == pytest.approx([0, 1, 3, 33, 83, 95, 99])
    assert [text.get_text() for text in axes.texts] == ["30%", "50%", "12%"]


def test_a_rate_is_of_one_device_without_the_profiler(tmp_path: Path) -> None:
    assert profiled_rate(written(tmp_path)) == MeasuredRate("llada", 443_000, 1e12, memory_ratio=1.2)
    only = written(tmp_path, unprofiled=None, estimated_memory_bytes=None)
    assert profiled_rate(only) == MeasuredRate("llada", 443_000, 0.5e12, memory_ratio=None)


def test_a_plan_takes_several_profiles(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A device of arm's run makes 2e12 FLOP/s, one of llada's 1e12."""
    files = [written(tmp_path), written(tmp_path, objective="arm", devices=4, estimated_memory_bytes=3 * 2**30)]
    words = ["plan", "--flops", "1e13", "--vocab-size", "1024", "--shapes", "107k", "214k", "443k"]
    assert main([*words, "--devices", "2", "--measured", *map(str, files), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    rates = {"llada": 1e12, "arm": 2e12}
    for row in found["runs"]:
        assert row["wall_hours"] == pytest.approx(row["flops_total"] / (2 * rates[row["objective"]]) / 3600)
    assert (
        "the profiles' peak memory is 1.00 to 1.20 x what this plan would have estimated for them" in found["warnings"]
    )
    assert main([*words, "--measured", str(files[0])]) == 2
    assert "--measured holds no throughput of arm" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        ("{", "is not JSON"),
        ("[" * 100_000, "nested too deeply"),
        ("[]", "no profile's summary.json"),
        ("{}", "no profile's summary.json"),
        (json.dumps(summary(devices=0)), "no profile's summary.json"),
        (json.dumps(summary(unprofiled={**SPEED, "flops_total_per_second": "fast"})), "no profile's summary.json"),
        (json.dumps(summary(unprofiled={**SPEED, "flops_total_per_second": 0})), "no throughput above 0"),
        (json.dumps(summary(unprofiled={**SPEED, "flops_total_per_second": float("nan")})), "no throughput above 0"),
    ],
)
def test_another_file_is_refused_in_one_line(content: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=message) as refused:
        profiled_rate(path)
    assert "\n" not in str(refused.value) and "--profile.steps" in str(refused.value)
