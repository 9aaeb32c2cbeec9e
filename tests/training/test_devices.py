"""A run on a GPU is the run on the CPU up to rounding, and is resumed, converted and advised in the same way."""

from __future__ import annotations

import gc
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from helpers.devices import DEVICES, on, on_gpu
from helpers.tiny_runs import EVERY_MODEL, MODELS, fit, fit_arguments, fit_process, kill_after, losses, metrics, record
from helpers.tiny_runs import weights as weights_of
from llada_lightning import load_model
from llada_lightning.commands.main import main

STEPS = 12
SHORT = (f"--trainer.max_steps={STEPS}",)
ROUNDING = {"rel": 2e-3, "abs": 2e-3}
"""Of losses over a dozen steps in fp32, between kernels that add up in other orders."""


@pytest.mark.parametrize(("objective", "device"), [("llada", "cpu"), *(on_gpu(name, "cuda") for name in EVERY_MODEL)])
def test_a_fit_has_the_losses_of_the_cpu(prepared: Path, tmp_path: Path, objective: str, device: str) -> None:
    """From the same weights, since every device draws others."""
    start = fit(objective, prepared, tmp_path / "start", "--trainer.max_steps=1")
    words = (*SHORT, f"--model.weights={start}")
    here = fit(objective, prepared, tmp_path / "here", *words, *on("cpu"))
    there = fit(objective, prepared, tmp_path / "there", *words, *on(device))
    assert losses(there) == pytest.approx(losses(here), **ROUNDING)
    norms = [[float(row["grad_norm"]) for row in metrics(folder)] for folder in (there, here)]
    assert norms[0] == pytest.approx(norms[1], rel=0.05)
    assert record(there)["val_nats_per_token"] == pytest.approx(record(here)["val_nats_per_token"], **ROUNDING)
    assert record(there)["run"] == record(here)["run"], "the device does not make another run"


@pytest.mark.parametrize(
    ("objective", "device", "precision"),
    [("llada", "cpu", "32-true"), *(on_gpu(name, "cuda", "bf16-mixed") for name in EVERY_MODEL)],
)
def test_a_killed_run_ends_bit_for_bit(
    prepared: Path, tmp_path: Path, objective: str, device: str, precision: str
) -> None:
    """In the precision, the kernels and the graphs that the device has by itself."""
    words = (*on(device), f"--trainer.precision={precision}", "--model.shape=107k")
    whole = fit(objective, prepared, tmp_path / "whole", *words)
    killed = fit_process(objective, prepared, tmp_path / "killed", *words, kill_after(17))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    folder = fit(objective, prepared, tmp_path / "killed", *words)
    assert losses(folder) == losses(whole) and len(losses(whole)) == 24
    mine, theirs = weights_of(folder), weights_of(whole)
    assert all(torch.equal(mine[key], theirs[key]) for key in theirs)
    assert record(folder)["val_nats_per_token"] == record(whole)["val_nats_per_token"]


@pytest.mark.gpu
@pytest.mark.parametrize("objective", MODELS)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_graphs_change_no_loss(prepared: Path, tmp_path: Path, objective: str, precision: str) -> None:
    words = (*SHORT, *on("cuda"), f"--trainer.precision={precision}", "--model.shape=107k")
    with_graphs, without = (
        fit(objective, prepared, tmp_path / graph, *words, f"--speed.graph={graph}") for graph in ("true", "false")
    )
    tolerance = ROUNDING if precision == "32-true" else {"rel": 0.02}
    for name in ("train_nats_per_token", "grad_norm", "lr", "val_nats_per_token"):
        ours, theirs = ([float(row[name]) for row in metrics(run) if row[name]] for run in (with_graphs, without))
        assert ours == pytest.approx(theirs, **({"rel": 0.1} if name == "grad_norm" else tolerance)), name
    assert [row["tokens"] for row in metrics(with_graphs)] == [row["tokens"] for row in metrics(without)]


@DEVICES
def test_a_run_is_converted_and_validated_on_the_cpu(
    prepared: Path, tmp_path: Path, device: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run, converted = fit("llada", prepared, tmp_path, *SHORT, *on(device)), tmp_path / "converted"
    assert main(["convert", str(run), str(converted)]) == 0
    lm, trained = load_model(converted, device="cpu"), weights_of(run, STEPS)
    for name, weight in lm.model.state_dict().items():
        assert torch.equal(weight, trained[f"model.{name}"])
    tokens_BL = torch.arange(32)[None] + 5
    again = load_model(run, device=device)
    torch.testing.assert_close(again.logits(tokens_BL.to(device)).cpu(), lm.logits(tokens_BL), rtol=1e-3, atol=1e-3)
    capsys.readouterr()
    checkpoint = run / "checkpoints" / f"step={STEPS:08d}.ckpt"
    words = [f"--config={run / 'config.yaml'}", f"--ckpt_path={checkpoint}", "--trainer.accelerator=cpu"]
    assert main(["validate", *words]) == 0
    found = re.search(r"(\d+\.\d+) ± ", capsys.readouterr().out)
    assert found is not None
    assert float(found[1]) == pytest.approx(record(run)["val_nats_per_token"], abs=1e-3)


@pytest.fixture
def little_memory() -> Iterator[None]:
    """A GiB of the GPU's memory for this process."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(2**30 / torch.cuda.get_device_properties(0).total_memory)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.gpu
@pytest.mark.parametrize("graph", ["false", "true"])
@pytest.mark.usefixtures("little_memory")
def test_out_of_memory_is_one_line_of_advice(
    prepared: Path, tmp_path: Path, graph: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A step of 262,144 tokens takes some three GiB; what is advised fits."""
    words = (*on("cuda"), "--model.shape=107k", "--data.sequence_length=128", "--data.global_batch=2048")
    words += ("--trainer.max_steps=2", "--trainer.accumulate_grad_batches=1", f"--speed.graph={graph}")
    assert main(fit_arguments("llada", prepared, tmp_path, *words)) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("error: data.micro_batch: 2048 sequences of 128 tokens do not fit in memory")
    advised = re.search(r"give (--data.micro_batch \d+) (--trainer.accumulate_grad_batches \d+)", line)
    assert advised is not None, line
    if graph == "false":  # graphs keep memory of their own
        corrected = " ".join(advised.groups()).split()
        assert main([*fit_arguments("llada", prepared, tmp_path, *words), *corrected]) == 0
        assert len(losses(tmp_path / "test" / "run")) == 2
