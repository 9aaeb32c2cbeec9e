"""The released loop is ours in loss and gradients; what cannot run is a row; a table has what JSON has."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import train_speed
from helpers.recorded_operations import RecordedOperations
from llada_lightning.compute.shapes import Shape
from llada_lightning.training import step_graphs
from llada_lightning.training.machine import Speed
from speed_variants import GATHER, PRESETS, RELEASED, cpu_variants, gpu_variants, step_variants
from step_sizes import EVERYTHING, GRAPHED
from train_speed import MEASURED, Measurement, aim, beside, measure_in_turns, parse, rows_of, table
from train_step import Steps, Variant, Workload, obstacle

CPU = torch.device("cpu")
SHAPE = Shape(n_layers=2, d_model=32, n_heads=2, n_kv_heads=1, d_ff=64)
SMALL = replace(PRESETS["cpu"], turns=2, steps=1, warmup=2)
RELEASED_LOOP = Variant("released", released=True, reference=True)


def workload(objective: str) -> Workload:
    return Workload(objective, SHAPE, vocab_size=61, sequence_length=16, micro_batch=3, device=CPU)


def gradients(variant: Variant, work: Workload) -> tuple[float, dict[str, Tensor]]:
    steps = Steps(variant, work, work.batches(1))
    loss = steps.loss(steps.batches[0])
    loss.backward()
    return loss.item(), {name: p.grad for name, p in steps.module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("objective", ["llada", "arm"])
@pytest.mark.parametrize("loss", ["plain", "chunked"])
def test_the_released_loop_is_ours(objective: str, loss: Any) -> None:
    work = workload(objective)
    theirs, their_gradients = gradients(RELEASED_LOOP, work)
    ours, our_gradients = gradients(Variant("ours", speed=Speed(compile=False, loss=loss)), work)
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert our_gradients.keys() == their_gradients.keys()
    for name, gradient in their_gradients.items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(our_gradients[name], gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("objective", ["llada", "arm"])
def test_variants_take_the_same_steps(objective: str) -> None:
    """Every fp32 variant that is not compiled has the losses of the released loop, updates included."""
    variants = [v for v in cpu_variants(objective) if not v.bf16 and not v.speed.compile]
    found = measure_in_turns(variants, workload(objective), SMALL)
    assert found[0].variant.name == RELEASED and len(found) == (4 if objective == "llada" else 2)
    assert found[0].losses[0] != found[0].losses[1]
    for one in found:
        assert one.status == MEASURED
        assert [len(turn) for turn in one.turns] == [1, 1]
        assert one.losses == pytest.approx(found[0].losses, abs=1e-5)


@pytest.mark.parametrize("objective", ["llada", "arm"])
def test_a_graphed_step_is_the_same_step(objective: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With operations that are recorded on the CPU in place of a CUDA graph."""
    monkeypatch.setattr(step_graphs, "new_graphs", lambda: RecordedOperations)
    work, speed = workload(objective), Speed(compile=False, last_block="scored")
    plain, graphed = (
        Steps(Variant(name, speed=replace(speed, graph=name == "graphed"), fused=True), work, work.batches(2))
        for name in ("plain", "graphed")
    )
    plain.timed(3), graphed.timed(3)
    assert graphed.graphs is not None and graphed.graphs.replayed == 3
    assert graphed.losses == pytest.approx(plain.losses, abs=1e-6) and len(set(plain.losses)) == 3
    weights = dict(plain.module.named_parameters())
    for name, weight in graphed.module.named_parameters():
        torch.testing.assert_close(weight, weights[name], rtol=1e-4, atol=1e-6)


def test_memory_that_runs_out_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    step = Steps.step

    def failing(self: Steps) -> None:
        if self.variant.name == "large":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 32.00 GiB")
        if self.variant.name == "broken":
            raise ValueError("no such kernel\nand more")
        step(self)

    monkeypatch.setattr(Steps, "step", failing)
    work = workload("llada")
    names = ("large", "broken", "small")
    found = measure_in_turns([RELEASED_LOOP, *(Variant(name) for name in names)], work, SMALL)
    rows = rows_of(found, work, "tiny", "tiny")
    assert [row["status"] for row in rows] == [MEASURED, "out of memory", "failed: no such kernel", MEASURED]
    assert "step_seconds" not in rows[1] and rows[3]["ratio"] > 0
    lines = table(rows).splitlines()
    assert lines[5].startswith("| llada | large | out of memory |")
    assert lines[6].startswith("| llada | broken | failed: no such kernel |")
    assert len({line.count(" | ") for line in lines[2:]}) == 1


def test_a_reference_without_memory_gives_way_to_the_next() -> None:
    """On a GPU the released loop in fp32 may have no room where the one in bf16 has."""
    work = workload("llada")
    first = Measurement(RELEASED_LOOP, "out of memory")
    second = Measurement(Variant("in bf16", reference=True), turns=[[2.0], [2.0]], losses=[3.0, 2.0])
    ours = Measurement(Variant("ours"), turns=[[1.0], [0.5]], losses=[3.0, 2.5])
    rows = rows_of([first, second, ours], work, "tiny", "tiny")
    assert rows[2]["reference"] == "in bf16"
    assert rows[2]["ratio"] == 3.0 and rows[2]["ratio_range"] == [2.0, 4.0]
    assert rows[2]["first_loss_difference"] == 0 and rows[2]["loss_difference"] == 0.5
    assert "ratio" not in rows_of([first, ours], work, "tiny", "tiny")[1]


def test_ratios_compare_turn_by_turn() -> None:
    """A machine that slows down in the second turn slows both, and the ratio stays."""
    reference = Measurement(RELEASED_LOOP, turns=[[2.0], [20.0]], losses=[1.0])
    ours = Measurement(Variant("ours"), turns=[[1.0], [10.0]], losses=[1.0])
    assert beside(ours, reference)["ratio_range"] == [2.0, 2.0]


def test_what_a_machine_cannot_is_said() -> None:
    found = {variant.name: obstacle(variant, workload("llada")) for variant in gpu_variants("llada")}
    assert found[RELEASED] is None and found["selective recomputation"] is None
    for name in ("flash", "flex"):
        assert found[f"attention by {name}"]
    assert "CUDA" in {one.name: obstacle(one, workload("llada")) for one in step_variants("llada")}[GRAPHED]
    assert "8-bit" in (found["fp8 products"] or "")


def test_aims_are_met_or_not_or_missing() -> None:
    row = {"preset": "cpu", "objective": "llada", "vocab_size": 4096, "variant": GATHER, "shape": "10.2m"}
    assert aim({**row, "ratio": 1.06})["aim"] == {"figure": "ratio", "least": 1.05, "met": True}
    assert aim({**row, "ratio": 1.04})["aim"]["met"] is False
    assert aim({**row, "objective": "arm", "ratio": 9}) == {}
    gpu = {"preset": "h200", "objective": "arm", "vocab_size": 126_464, "variant": EVERYTHING, "shape": "llada-1b"}
    assert aim(gpu)["aim"] == {"figure": "mfu", "least": 0.5, "met": None}
    assert aim({**gpu, "mfu": 0.5})["aim"]["met"] is True


def test_a_gpu_preset_without_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its figures are marked as missing, tiny sizes run, and the file has all of it."""
    monkeypatch.setitem(train_speed.PRESETS, "tiny", replace(PRESETS["tiny"], turns=1, steps=1))
    path = tmp_path / "figures" / "speed.json"
    words = ["--preset", "h200", "--device", "cpu", "--objectives", "llada", "--only", "flex", "--json", str(path)]
    assert train_speed.main([*words]) == 0
    out, err = capsys.readouterr()
    assert "tiny sizes" in err
    result = json.loads(path.read_text())
    statuses = {(row["preset"], row["variant"]): row["status"] for row in result["rows"]}
    assert statuses["tiny", RELEASED] == MEASURED
    assert statuses["tiny", "attention by flex"].startswith("missing: torch has no gradients")
    assert result["date"] in out and result["versions"]["torch"] in out
    tables = [part for part in out.split("\n\n") if part.startswith("| ")]
    for part in tables:
        widths = {line.count(" | ") for line in part.strip().splitlines()}
        assert len(widths) == 1


def test_a_gpu_is_taken_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert parse(["--preset", "h200"]).device == "cuda"
    assert parse(["--preset", "cpu"]).device == "cpu"
