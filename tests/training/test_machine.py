"""Devices that are not there are refused in one line, and a faster computation gives the same numbers."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from jsonargparse import Namespace
from torch import Tensor

from helpers import tiny_runs
from helpers.tiny_runs import call_at, fit, fit_arguments, kill_at, losses, metrics, record, run_processes, weights
from llada_lightning.commands.main import main
from llada_lightning.compute.schedule import WSD
from llada_lightning.objectives.batches import TrainingBatch, scored_positions
from llada_lightning.support.errors import UserError
from llada_lightning.training import ArmModule, LladaModule
from llada_lightning.training import machine as module
from llada_lightning.training.language_module import LanguageModule
from llada_lightning.training.machine import Speed, apply_speed, check_devices, resolve_speed, set_threads
from llada_lightning.training.modules import BlockDiffusionModule


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


WORDS, LENGTH = 64, 32
SHAPE = {"n_layers": 2, "d_model": 32, "n_heads": 4, "n_kv_heads": 2, "d_ff": 48}
PLAIN = Speed(compile=False, loss="plain")


@pytest.fixture(autouse=True)
def _forget_what_was_compiled() -> Iterator[None]:
    yield
    torch.compiler.reset()


def batch(padded: bool) -> TrainingBatch:
    generator = torch.Generator().manual_seed(0)
    tokens_BL = torch.randint(0, WORDS - 2, (3, LENGTH), generator=generator)
    p_B = torch.tensor([0.05, 0.4, 0.9])
    masked_BL = torch.rand(tokens_BL.shape, generator=generator) < p_B[:, None]
    attention_mask_BL = None
    if padded:
        attention_mask_BL = torch.arange(LENGTH) < torch.tensor([[LENGTH], [7], [LENGTH]])
        masked_BL &= attention_mask_BL
    scored_M, scored = scored_positions(masked_BL)
    return TrainingBatch(
        tokens_BL, attention_mask_BL, masked_BL, p_B, torch.arange(3), scored_M, scored, 3.0 * LENGTH, 3 * LENGTH
    )


def build(kind: type[LanguageModule], speed: Speed) -> LanguageModule:
    built = kind(SHAPE, WORDS, WORDS - 1, WORDS - 2, schedule=WSD(lr=1e-3).resolve(10, 1000, 1e-3))
    built.speed = speed
    built.configure_model()
    return built


def step(kind: type[LanguageModule], speed: Speed, padded: bool, bf16: bool) -> tuple[float, list[Tensor]]:
    built = build(kind, speed)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = built.training_loss(batch(padded))
    loss.backward()
    return loss.item(), [parameter.grad for parameter in built.parameters() if parameter.grad is not None]


FAST = [
    Speed(compile=False),
    Speed(compile=False, recompute="full"),
    Speed(compile=False, recompute="selective"),
    Speed(compile=False, loss="plain", recompute="selective"),
    Speed(compile=False, padding=True),
    Speed(compile=False, last_block="scored"),
    Speed(compile=False, last_block="scored", recompute="full", padding=True),
]
COMPILED = Speed(compile=True, recompute="selective")


@pytest.mark.parametrize(
    ("kind", "speed"),
    [*product([ArmModule, LladaModule], FAST), pytest.param(LladaModule, COMPILED, marks=pytest.mark.slow)],
)
def test_loss_and_gradients_are_those_of_the_plain_path(kind: type[LanguageModule], speed: Speed) -> None:
    for padded in (False, True):
        loss, gradients = step(kind, PLAIN, padded, bf16=False)
        fast_loss, fast_gradients = step(kind, speed, padded, bf16=False)
        assert fast_loss == pytest.approx(loss, rel=1e-6)
        for fast, plain in zip(fast_gradients, gradients, strict=True):
            assert float((fast - plain).norm() / plain.norm()) < 1e-5


@pytest.mark.parametrize("kind", [ArmModule, LladaModule])
@pytest.mark.parametrize("speed", FAST[:3], ids=lambda s: s.recompute)
def test_bf16_differs_by_roundings_only(kind: type[LanguageModule], speed: Speed) -> None:
    exact = step(kind, PLAIN, padded=True, bf16=False)[1]
    plain_loss, plain = step(kind, PLAIN, padded=True, bf16=True)
    fast_loss, fast = step(kind, speed, padded=True, bf16=True)
    assert fast_loss == pytest.approx(plain_loss, rel=1e-5)
    for mine, theirs, true in zip(fast, plain, exact, strict=True):
        error, plain_error = float((mine - true).norm()), float((theirs - true).norm())
        assert error < 1.5 * plain_error + 1e-6 * float(true.norm())


def test_recomputation_keeps_less() -> None:
    def kept(recompute: Any) -> int:
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            held.append(tensor)
            return tensor

        held: list[Tensor] = []
        model = build(LladaModule, Speed(compile=False, recompute=recompute)).model
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model.blocks[0](
                torch.randn(2, LENGTH, 32, requires_grad=True), (torch.ones(LENGTH, 8),) * 2, False, None, None
            )
        parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
        return sum(size for place, size in sizes.items() if place not in parameters)

    assert 0 < kept("full") < kept("none")


def test_all_blocks_share_one_graph_for_each_kind_of_micro_batch() -> None:
    """A graph for each block would make a run's start longer with its depth; a fifth kind of batch, ever longer."""
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    built = build(LladaModule, PLAIN)
    for block in built.model.blocks:
        block.compile(dynamic=False, backend=counter)
    for _ in range(2):
        for padded in (False, True):
            built.training_loss(batch(padded)).backward()
    assert counter.frame_count == 2


def test_positions_beyond_the_masked_ones_change_nothing() -> None:
    built, whole = build(LladaModule, Speed(compile=False)), batch(padded=False)
    longer = torch.nn.functional.pad(whole.scored_M, (0, 640))
    assert len(whole.scored_M) % 64 == 0 and whole.scored == int(whole.masked_BL.sum())
    assert built.training_loss(whole._replace(scored_M=longer)).item() == pytest.approx(
        built.training_loss(whole).item(), rel=1e-6
    )


@pytest.mark.parametrize(
    ("objective", "compiled"), [pytest.param("arm", "true", marks=pytest.mark.slow), ("llada", "false")]
)
def test_the_fast_runs_curve_lies_on_the_plain_ones(
    objective: str, compiled: str, prepared: Path, tmp_path: Path
) -> None:
    plain = fit(objective, prepared, tmp_path / "plain", "--speed.loss=plain")
    fast = fit(objective, prepared, tmp_path / "fast", f"--speed.compile={compiled}", "--speed.recompute=selective")
    assert losses(fast) == pytest.approx(losses(plain), abs=2e-5)
    mine, theirs = record(fast), record(plain)
    assert mine["run"] == theirs["run"]  # speed is no part of what a run is
    assert mine["val_nats_per_token"] == pytest.approx(theirs["val_nats_per_token"], abs=2e-5)


def test_a_line_says_what_is_live(prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit("arm", prepared, tmp_path, "--speed.recompute=full", "--trainer.max_steps=1")
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("speed: ")]
    expected = "speed: attention sdpa (flash kernel), blocks not compiled, chunked loss, full recomputation, 1 thread"
    assert line == f"{expected} (as set)"


def trainer_on_the_cpu() -> Any:
    return SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("cpu")), precision="bf16-mixed")


def test_without_a_compiler_a_run_goes_on_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import cpp_builder

    def none_there() -> str:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none_there)
    shape = build(ArmModule, PLAIN).shape
    resolved, lines = resolve_speed(Speed(compile=True), shape, trainer_on_the_cpu(), training=True)
    assert resolved == Speed(compile=False, padding=False)
    assert lines[0] == (
        "note: speed.compile: there is no C++ compiler here (install g++, or name one in CXX); running without it, "
        "which changes no figure"
    )


def test_what_is_compiled_by_itself() -> None:
    shape = build(ArmModule, PLAIN).shape
    assert resolve_speed(Speed(), shape, trainer_on_the_cpu(), training=True)[0].compile is False
    assert resolve_speed(Speed(compile=True), shape, trainer_on_the_cpu(), training=True)[0].compile is True


@pytest.mark.parametrize("kind", [LladaModule, partial(BlockDiffusionModule, block_length=8)])
def test_the_last_block_computes_the_scored_positions_alone(kind: Any) -> None:
    """Its feed-forward part takes as many rows as there are scored positions; the validation is as before."""
    rows: list[int] = []
    built = build(kind, Speed(compile=False, last_block="scored"))
    for block in built.model.blocks:
        block.feed_forward.register_forward_hook(lambda _, inputs, __: rows.append(inputs[0][..., 0].numel()))
    given = batch(padded=False)
    loss = built.training_loss(given)
    assert rows[-1] == len(given.scored_M) < rows[0]
    assert loss.item() == pytest.approx(build(kind, PLAIN).training_loss(given).item(), rel=1e-6)


def test_an_inner_width_that_is_padded_keeps_weights_and_line(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--model.shape={n_layers: 1, d_model: 32, n_heads: 2, n_kv_heads: 1, d_ff: 50}", "--trainer.max_steps=5")
    padded = fit("llada", prepared, tmp_path / "padded", "--speed.padding=true", *words)
    assert "chunked loss, inner width padded to 64, 1 thread" in capsys.readouterr().err
    plain = fit("llada", prepared, tmp_path / "plain", *words)
    assert losses(padded) == pytest.approx(losses(plain), abs=1e-5)
    shapes = [{name: value.shape for name, value in weights(run, 5).items()} for run in (padded, plain)]
    assert shapes[0] == shapes[1] and record(padded)["run"] == record(plain)["run"]


def test_compiled_blocks_want_one_number_of_scored_positions(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--speed.last_block=scored", "--speed.compile=true")
    assert main(fit_arguments("llada", prepared, tmp_path, *words)) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "error: speed.last_block: scored given, but blocks are compiled for a fixed number of positions, which steps "
        "as graphs have; leave it out, or give --speed.compile=false"
    )


def test_fp8_on_hardware_without_it_is_refused(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(fit_arguments("llada", prepared, tmp_path, "--speed.fp8=true")) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "error: speed.fp8: true given, but the CPU has no 8-bit products (Hopper, Ada and later have); leave it out"
    )


def test_fp8_makes_another_run(prepared: Path, tmp_path: Path) -> None:
    from llada_lightning.training.cli import LladaCLI

    arguments = [a for a in fit_arguments("llada", prepared, tmp_path) if not a.startswith("--run.name")]
    names = [LladaCLI([*arguments, *extra], execute=False).run_name for extra in ([], ["--speed.fp8=true"])]
    assert names[0] != names[1]


def test_fp8_converts_the_blocks_products_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchao's emulation on the CPU: near the plain loss, gradients everywhere, the head and the names untouched."""
    pytest.importorskip("torchao.float8")
    plain = build(LladaModule, PLAIN)
    eight = build(LladaModule, PLAIN)
    module._convert_to_fp8(eight.model, emulate=True)
    kinds = {name: type(part).__name__ for name, part in eight.model.named_modules()}
    assert kinds["blocks.0.attention.q_proj"] == kinds["blocks.1.feed_forward.down_proj"] == "Float8Linear"
    assert kinds["head"] == "OutputHead"
    assert list(eight.state_dict()) == list(plain.state_dict())
    loss, rounded = plain.training_loss(batch(False)), eight.training_loss(batch(False))
    rounded.backward()
    assert loss.item() != rounded.item() == pytest.approx(loss.item(), rel=0.05)
    assert all(parameter.grad is not None for parameter in eight.parameters())


def test_an_unknown_back_end_is_refused(prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, fix in {"fa3": "speed.attention: fa3 given", "flash": "use sdpa", "flex": "use sdpa"}.items():
        assert main(fit_arguments("llada", prepared, tmp_path, f"--speed.attention={name}")) == 2
        assert fix in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "test").exists()


def test_settings_apply_to_every_block() -> None:
    model = build(ArmModule, PLAIN).model
    apply_speed(model, replace(PLAIN, recompute="full"))
    assert [block.recompute for block in model.blocks] == ["full", "full"]


# --- threads of the CPU ----------------------------------------------------------------------------------------------

SMALL, LARGE = (8, 32), (64, 4096)
"""Sequences and their length, whose products are below and above what threads always compute faster."""


@pytest.fixture
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine with eight cores whose user has set nothing, and the seconds of a block by the number of threads."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "LLADA_CORES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(module, "usable_cores", lambda: 8)
    monkeypatch.setattr(module, "_block_seconds", lambda *given: {1: 3.0, 8: 1.5}[given[-1]])
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def threads_of(batch: tuple[int, int], before: int | None = None, devices: int = 1) -> tuple[int, str]:
    own = SimpleNamespace(**vars(trainer_on_the_cpu()), num_devices=devices)
    words = set_threads(own, build(ArmModule, PLAIN).shape, *batch, before)
    return torch.get_num_threads(), words


@pytest.mark.usefixtures("eight_cores")
def test_the_faster_number_of_threads_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    assert threads_of(SMALL) == (8, ", 8 threads (2.0 times as fast as 1)")
    monkeypatch.setattr(module, "_block_seconds", lambda *given: {1: 1.0, 8: 4.0}[given[-1]])
    assert threads_of(SMALL) == (1, ", 1 thread (4.0 times as fast as 8)")
    assert threads_of(SMALL, devices=2) == (1, ", 1 thread (small products)")
    assert threads_of((64, 16_384), devices=2) == (4, ", 4 threads (all its cores)")


@pytest.mark.usefixtures("eight_cores")
def test_a_run_keeps_the_number_it_began_with_where_the_cores_are_there() -> None:
    assert threads_of(SMALL, before=3) == (3, ", 3 threads (as before)")
    assert threads_of(SMALL, before=16)[0] == 8


@pytest.mark.usefixtures("eight_cores")
@pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "MKL_NUM_THREADS"])
def test_what_the_user_has_set_stands(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "2")
    assert threads_of((64, 16_384), before=1) == (2, ", 2 threads (as set)")


@pytest.mark.usefixtures("eight_cores")
def test_a_run_beside_others_has_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "usable_cores", lambda: 1)
    assert threads_of((64, 16_384)) == (1, ", 1 thread (its share of the cores)")


def test_a_block_is_timed_without_a_trace() -> None:
    """The weights that a run draws afterwards are the same."""
    shape, threads = build(ArmModule, PLAIN).shape, torch.get_num_threads()
    state = torch.random.get_rng_state()
    assert module._block_seconds(shape, 2, 8, "bf16-mixed", threads) > 0
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_killed_run_goes_on_with_the_threads_it_began_with(prepared: Path, tmp_path: Path) -> None:
    words = fit_arguments("arm", prepared, tmp_path)
    assert run_processes([*words, kill_at(12)], 1, {"OMP_NUM_THREADS": "2"}).returncode == -9
    ended = run_processes(words, 1, {"OMP_NUM_THREADS": "", "LLADA_CORES": "2"})
    assert ended.returncode == 0, ended.stderr
    assert ", 2 threads (as before)" in ended.stderr
