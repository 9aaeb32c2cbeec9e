"""What the growth benchmarks make of their figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import growth
from curves_overlay import PLAIN, WAYS, beside_plain
from growth_point import measure
from long_run import constant, decades
from long_run import table as decade_table
from start_cost import CASES, PARTS, import_seconds, parts_of
from start_cost import table as start_table

AXES: dict[str, tuple[Any, ...]] = {
    "sequence_length": (16, 32),
    "shape": ("107k", "214k"),
    "vocab_size": (64, 128),
    "micro_batch": (2, 4),
}


def test_growth_beside_the_account(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Time that follows the account, but for the vocabulary, where it is taken to be twice as much."""

    def measured(point: dict[str, Any], objective: str, device: str, steps: int) -> dict[str, Any]:
        tokens = point["micro_batch"] * point["sequence_length"]
        seconds = growth.account(point, objective) * tokens * (2 if point["vocab_size"] == 128 else 1)
        return {"step_seconds": seconds, "baseline_bytes": 100, "peak_bytes": 100 + tokens}

    monkeypatch.setattr(growth, "measure", measured)
    path = tmp_path / "growth.json"
    assert growth.main(["--device", "cpu", "--json", str(path)], AXES) == 0
    rows = json.loads(path.read_text())["rows"]
    assert [row["axis"] for row in rows] == ["", *AXES]
    assert {row["axis"]: row["follows"] for row in rows if row["axis"]} == {
        "sequence_length": True, "shape": True, "vocab_size": False, "micro_batch": True,
    }  # fmt: skip
    assert rows[3]["time_over_flops"] == pytest.approx(2)
    assert rows[4]["flops_per_token_ratio"] == 1 and rows[4]["memory_bytes_ratio"] == 2
    assert "| vocab size | 128 |" in capsys.readouterr().out


def test_a_point_is_measured() -> None:
    point = {axis: values[0] for axis, values in AXES.items()}
    found = measure({**point, "objective": "arm", "device": "cpu", "steps": 1, "warmup": 1})
    assert found["step_seconds"] > 0
    assert found["peak_bytes"] >= found["baseline_bytes"] > 0


def test_decades_of_a_run() -> None:
    """Steps of 2 ms, the first three of a second each; from step 101 on they take 3 ms."""
    rows, clock = [], 0.0
    for step in range(1, 1001):
        clock += 1.0 if step <= 3 else 0.002 if step <= 100 else 0.003
        rows.append({"step": str(step), "seconds": str(clock), "peak_memory_bytes": "1e8", "train_nats_per_token": "1"})
        if step == 500:  # a validation's row
            rows.append({"step": str(step), "val_nats_per_token": "1"})
    found = decades(rows)
    assert [decade["steps"] for decade in found] == [[4, 10], [11, 100], [101, 1000]]
    assert [decade["median_seconds_ratio"] for decade in found] == pytest.approx([1, 1, 1.5])
    assert constant(found[:2]) and not constant(found)
    assert "| 101 to 1000 | 3.00 | 1.50 |" in decade_table(found)
    grown = [{**found[0]}, {**found[0], "peak_memory_bytes_ratio": 1.2}]
    assert not constant(grown)


def test_parts_of_a_start_add_up() -> None:
    moments = dict(zip(["start", *PARTS], range(0, 70, 10), strict=False)) | {"last_step": 33.0}
    found = parts_of({name: float(moment) for name, moment in moments.items()})
    assert sum(found[name] for name in PARTS) == 60
    assert (found["start_to_first_step"], found["end_to_exit"], found["fixed"]) == (30, 27, 57)
    text = start_table(dict.fromkeys(CASES, found))
    assert "| to reach | 15: not met | 30: not met | 30: not met |" in text


def test_imports_by_package() -> None:
    found = import_seconds("import json.tool")
    assert next(iter(found)) == "all" and "json" in found and "argparse" in found
    assert found["all"] == pytest.approx(sum(found.values()) - found["all"])


def test_curves_beside_the_plain_one() -> None:
    curves = {way: [5.0, 4.0] for way in WAYS}
    curves["fp32, chunked loss"] = [5.0, 4.001]
    found = beside_plain(curves)
    assert found[PLAIN]["agrees"] is None
    assert found["fp32, chunked loss"]["agrees"] is False
    assert found["fp32, chunked loss"]["all_steps"] == pytest.approx(0.001)
    assert found["fp32, chunked loss, compiled"]["agrees"] is True
