"""Memory and hours of planned runs: against autograd's own account, and by hand."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from llada_lightning.compute import hardware
from llada_lightning.compute.hardware import (
    LOGITS_CHUNK_BYTES,
    PEAK_FLOPS_BF16,
    LossKind,
    MeasuredRate,
    activation_bytes_per_token,
    logits_bytes,
    measured_rates,
    shipped_rates,
    state_bytes,
    training_memory_bytes,
)
from llada_lightning.compute.shapes import Shape, get_shape
from llada_lightning.objectives import get_objective
from llada_lightning.study.plan import Grid, Machine, Recipe, Stream, plan_study
from llada_lightning.support.errors import UserError

KINDS: tuple[LossKind, LossKind] = ("plain", "chunked")


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_activations_are_what_autograd_keeps(kv_heads: int) -> None:
    """Every storage that bf16 autocast keeps for the backward pass, bf16 copies of weights apart."""
    import torch

    from llada_lightning.model import Transformer

    shape, vocab_size = Shape(3, 256, 4, kv_heads, 704), 64
    batch, length = 2, 96
    model = Transformer(shape, vocab_size)
    model.initialise(torch.Generator().manual_seed(0))
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()  # held, so that its address is not used twice
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        model(torch.zeros(batch, length, dtype=torch.long), causal=True)
    copies = 2 * (shape.params_nonembedding - (2 * 3 + 1) * 256 + vocab_size * 256)
    found = (sum(storage.nbytes() for storage in kept.values()) - copies) / (batch * length)
    # The CPU's norm is not fused: it keeps its normalised output too, 4 bytes x width.
    unfused = 4 * 256 * (2 * 3 + 1)
    assert found == pytest.approx(activation_bytes_per_token(shape) + unfused, rel=0.02)


def test_memory_by_hand() -> None:
    """2x64 with SwiGLU 192 at 1024 words: N 106 816, 237 888 in all."""
    shape = get_shape("107k")
    assert state_bytes(shape, 1024) == 16 * 237_888 + 2 * (106_816 + 1024 * 64)
    assert activation_bytes_per_token(shape) == 2 * (26 * 64 + 8 * 192) + 6 * 64
    assert logits_bytes(1024, 512, "plain") == 12 * 1024 * 512
    assert logits_bytes(1024, 512, "chunked") == 8 * 1024 * 512
    whole = training_memory_bytes(shape, 1024, 128, micro_batch=4)
    assert whole == state_bytes(shape, 1024) + 4 * 128 * (2 * (26 * 64 + 8 * 192) + 6 * 64 + 8 * 1024)
    assert training_memory_bytes(shape, 1024, 128, 4, shards=8) == whole - state_bytes(shape, 1024) * 7 / 8


def test_a_chunked_loss_holds_one_chunk_of_logits() -> None:
    """1 GiB of bf16 logits and four times that in all, where a plain loss holds 12 bytes a logit."""
    from llada_lightning.model.head import CHUNK_BYTES

    assert CHUNK_BYTES["cuda"] == LOGITS_CHUNK_BYTES
    words, tokens = 126_464, 8 * 4096
    assert logits_bytes(words, tokens, "chunked") == 4 * LOGITS_CHUNK_BYTES
    plain, chunked = (training_memory_bytes(get_shape("arm-1b"), words, 4096, 8, loss=loss) for loss in KINDS)
    assert plain - chunked == 12 * words * tokens - 4 * LOGITS_CHUNK_BYTES


def test_accumulation_is_the_least_that_fits() -> None:
    machine, shape = Machine("A100"), get_shape("202m")
    accumulation = machine.accumulation(shape, 50_257, 1024, global_batch=256)
    assert accumulation > 1 and machine.memory is not None
    assert machine.memory_of(shape, 50_257, 1024, 256 // accumulation) <= machine.memory
    assert machine.memory_of(shape, 50_257, 1024, 2 * 256 // accumulation) > machine.memory
    assert Machine("Some GPU of tomorrow").accumulation(shape, 50_257, 1024, 256) == 1


def test_what_does_not_fit_is_said() -> None:
    grid = Grid(shapes=["arm-1b", "arm-7b", "llada-8b"])
    alone = plan_study([1e22], Stream(126_464, 4096), grid=grid, machine=Machine("H100", 8))
    assert any("trunks do not fit H100" in note for note in alone.warnings())
    sharded = plan_study([1e22], Stream(126_464, 4096), grid=grid, machine=Machine("H100", 8, sharded=True))
    assert not any("do not fit" in note for note in sharded.warnings())


# --- hours -----------------------------------------------------------------------------------------------------------

GRID = Grid(shapes=["107k", "214k", "443k"])
STREAM = Stream(1024, 128)


def test_hours_from_peak_and_mfu_by_hand() -> None:
    plan = plan_study([1e15], STREAM, grid=GRID, recipe=Recipe(batch=64), machine=Machine("H100", 8, mfu=0.4))
    row = plan.table().iloc[0]
    assert row.wall_hours == pytest.approx(row.flops_total / (8 * 989e12 * 0.4) / 3600)
    assert row.device_hours == pytest.approx(8 * row.wall_hours)
    totals = plan.totals()
    assert totals["wall_hours"] == pytest.approx(totals["flops_total"] / (8 * 989e12 * 0.4) / 3600)
    assert plan.longest_wall_hours() == pytest.approx(plan.table().wall_hours.max())


def measured(**changes: list) -> pd.DataFrame:
    columns: dict[str, list] = {
        "objective": ["arm", "arm", "llada", "llada"],
        "device": ["1 x cpu (x86_64)", "2 x cpu (x86_64)", "1 x cpu (x86_64)", "1 x cpu (x86_64)"],
        "params_nonembedding": [100_000, 500_000, 200_000, 200_000],
        "tokens": [1e6, 1e6, 1e6, 1e6],
        "flops_total": [1e12, 8e12, 2e12, 2e12],
        "tokens_per_second": [20_000.0, 10_000.0, 15_000.0, float("nan")],
    }
    return pd.DataFrame({**columns, **changes})


def test_hours_from_measured_throughput_of_the_nearest_size() -> None:
    """1e6 FLOPs a token at 20 000 tokens/s; 8e6 at 10 000 on two devices; 2e6 at 15 000."""
    rates = measured_rates(measured())
    assert rates == (
        MeasuredRate("arm", 100_000, 2e10, device="cpu (x86_64)"),
        MeasuredRate("arm", 500_000, 4e10, device="cpu (x86_64)"),
        MeasuredRate("llada", 200_000, 3e10, device="cpu (x86_64)"),
    )
    assert measured_rates(measured(params_nonembedding=[0, None, 0, None])) == ()
    machine = Machine(devices=2, measured=rates)
    assert machine.seconds("arm", 110_000, 1e12) == pytest.approx(1e12 / (2 * 2e10))
    assert machine.seconds("arm", 400_000, 1e12) == pytest.approx(1e12 / (2 * 4e10))
    assert machine.seconds("llada", 9e9, 1e12) == pytest.approx(1e12 / (2 * 3e10))


@pytest.mark.parametrize("machine", [Machine(), Machine("H100")])
def test_hours_are_never_guessed(machine: Machine) -> None:
    plan = plan_study([1e12], STREAM, grid=GRID, machine=machine)
    assert plan.table().wall_hours.isna().all()
    assert plan.totals()["wall_hours"] is None and plan.longest_wall_hours() is None


@pytest.mark.parametrize(
    ("machine", "words"),
    [
        (Machine(mfu=0.4), "--mfu needs --device; known: H200"),
        (Machine("B20", mfu=0.4), "--device B20 is not known; the nearest is B200; known: H200"),
        (Machine("H100", mfu=40), "--mfu 40"),
        (Machine("H100", mfu=0.4, measured=measured_rates(measured())), "both given"),
        (Machine("H100", devices=0), "--devices 0"),
        (Machine(micro_batch=0), "--micro-batch 0"),
        (Machine(measured=measured_rates(measured(objective=["arm"] * 4))), "no throughput of llada"),
    ],
)
def test_machines_that_contradict_themselves_are_refused(machine: Machine, words: str) -> None:
    with pytest.raises(UserError, match=words):
        plan_study([1e12], STREAM, grid=GRID, machine=machine)


# --- the speeds that come with the package ---------------------------------------------------------------------------


def test_the_flops_of_the_measured_speeds_are_those_that_are_counted_today() -> None:
    table = pd.read_csv(Path(hardware.__file__).with_name("measured_speeds.csv"))
    for row in table.to_dict("records"):
        shape = get_shape(row["shape"])
        stream = Stream(vocab_size=row["vocab_size"], sequence_length=row["sequence_length"])
        counted = stream.flops_per_token(shape, get_objective(row["objective"]))
        assert row["params_nonembedding"] == shape.params_nonembedding
        assert row["flops_per_token"] == pytest.approx(counted.flops_total, rel=1e-5)
        assert 0 < row["tokens_per_second"] * row["flops_per_token"] < PEAK_FLOPS_BF16[row["device"]]


def test_hours_without_a_rate_are_read_off_between_the_sizes_that_were_measured() -> None:
    machine = Machine("NVIDIA H200", devices=2)
    at_1b = machine.seconds("arm", 1.2e9, 1e18)
    assert at_1b == pytest.approx(1e18 / (2 * 53_704 * 8.47677e9), rel=1e-5)
    at_85m = (370_825 * 8.11789e8 + 504_370 * 8.11789e8) / 2
    assert machine.seconds("llada", 84_953_856, 1e18) == pytest.approx(1e18 / (2 * at_85m), rel=1e-5)
    # Half-way in logs between two sizes the geometric mean of their rates; below the smallest its own.
    between = machine.seconds("llada", (853_120 * 2_656_704) ** 0.5, 1e18)
    rates = 1_190_000 * 8.26602e6, 780_000 * 2.18408e7
    assert between == pytest.approx(1e18 / (2 * (rates[0] * rates[1]) ** 0.5), rel=1e-5)
    assert machine.seconds("llada", 1e4, 1e18) == pytest.approx(1e18 / (2 * rates[0]), rel=1e-5)
    # `arm` was measured at the largest size alone: at others the size counts, not the objective.
    assert machine.seconds("arm", 1e7, 1e18) == machine.seconds("llada", 1e7, 1e18)
    assert machine.speeds is not None
    assert machine.speeds.startswith(
        "speeds measured on one H200 (2026-11-27, commit 7416dd9) for sizes of 853k to 969m"
    )


def test_a_rate_that_is_given_counts_before_those_of_the_package() -> None:
    by_share = Machine("H200", mfu=0.5)
    assert by_share.seconds("arm", 1e9, 989e12) == pytest.approx(2)
    assert by_share.speeds == "50.0% of the dense bf16 peak"
    assert Machine("H200", measured=(MeasuredRate("arm", 1e9, 1e12),)).seconds("arm", 1e6, 1e12) == pytest.approx(1)


@pytest.mark.parametrize("device", ["H100", "B100", "toaster"])
def test_no_speed_is_told_of_a_device_that_was_not_measured(device: str) -> None:
    assert shipped_rates(device)[0] == ()
    assert Machine(device).seconds("llada", 1e9, 1e18) is None
    assert Machine(device).speeds is None
