"""Runs of uniform-state diffusion: through every command, and on any number of devices."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.every_command import through_every_command
from helpers.tiny_runs import fit, fit_arguments, fit_process, losses, record
from llada_lightning.commands.main import main


@pytest.fixture(scope="module")
def run(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process."""
    return fit("uniform", prepared, tmp_path_factory.mktemp("uniform"))


def test_the_record_says_what_it_is(run: Path) -> None:
    found = record(run)
    assert (found["objective"], found["variant"], found["val_kind"]) == ("uniform", None, "bound")
    assert found["flops_total"] == found["flops_6nd"] + found["flops_attention"] + found["flops_head"]
    assert found["flops_head"] == 6 * 32 * 384 * found["tokens"]  # of all positions


def test_it_learns(prepared: Path, run: Path) -> None:
    whole = losses(run)
    assert sum(whole[-8:]) < 0.8 * sum(whole[:8])


def test_micro_batches_only_cut_the_same_batches(prepared: Path, run: Path, tmp_path: Path) -> None:
    cut = fit("uniform", prepared, tmp_path, "--trainer.accumulate_grad_batches=2", "--data.workers=2")
    assert losses(cut) == pytest.approx(losses(run), rel=1e-5)
    assert record(cut)["val_nats_per_token"] == pytest.approx(record(run)["val_nats_per_token"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_make_the_same_run(prepared: Path, run: Path, tmp_path: Path, strategy: str) -> None:
    devices = ("--trainer.devices=2", f"--trainer.strategy={strategy}")
    done = fit_process("uniform", prepared, tmp_path, *devices)
    assert done.returncode == 0, done.stderr
    two = tmp_path / "test" / "run"
    assert losses(two) == pytest.approx(losses(run), rel=1e-5)
    assert record(two)["val_nats_per_token"] == pytest.approx(record(run)["val_nats_per_token"], rel=1e-4)


def test_documents_and_densities_go_together(prepared: Path, tmp_path: Path) -> None:
    more = ("--data.document_mask=true", "--data.density={name: beta, a: 0.5, b: 1}", "--trainer.max_steps=4")
    assert record(fit("uniform", prepared, tmp_path, *more))["variant"] == "density=beta(a=0.5,b=1)"


def test_dropout_is_of_the_sequence(prepared: Path, tmp_path: Path) -> None:
    dropout = ("--model.dropout=0.2", "--model.z_loss=1e-4", "--trainer.max_steps=6")
    whole = fit("uniform", prepared, tmp_path / "whole", *dropout)
    cut = fit("uniform", prepared, tmp_path / "cut", *dropout, "--trainer.accumulate_grad_batches=2")
    assert losses(cut) == pytest.approx(losses(whole), rel=1e-5)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("--model.loss_weight=ce", "'loss_weight'"),
        (
            "--model.token_noise=0.1",
            "model.token_noise: 0.1 given, but uniform corrupts its inputs itself; leave it out",
        ),
        ("--model.compat=llada", "model.compat: llada given, but uniform has no released code here; leave it out"),
        (
            "--data.density={name: beta, a: 3, b: 1}",
            "data.density: beta(a=3,b=1) falls to 0 at t = 0 faster than in proportion to the distance, so that the "
            "average of the loss, whose weight is 1/q(t), does not settle; take a density with more mass at that end "
            "(of beta: a and b up to 2)",
        ),
        (
            "--run.policies={confidence: 1}",
            "policy confidence@1: uniform has no [MASK] and no order in which tokens are revealed; its likelihood is "
            "the bound alone",
        ),
    ],
)
def test_what_it_lacks_is_one_line(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], given: str, said: str
) -> None:
    assert main(fit_arguments("uniform", prepared, tmp_path, given)) == 2
    assert said in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "test").exists()


def test_tensor_parallelism_is_refused(prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shape = "--model.shape={n_layers: 2, d_model: 32, n_heads: 2, n_kv_heads: 2, d_ff: 64}"
    devices = (shape, "--trainer.devices=2", "--trainer.strategy=fsdp2_tp2")
    assert main(fit_arguments("uniform", prepared, tmp_path, *devices)) == 2
    said = "trainer.strategy: fsdp2_tp2 given, but uniform needs whole logits on each device; use fsdp2"
    assert capsys.readouterr().err.splitlines()[-1] == f"error: {said}"


@pytest.mark.slow
def test_it_goes_through_every_command(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    walk = through_every_command("uniform", prepared, capsys, generate_options=("--steps", 3, "--kappa", 0.9))
    first = walk.plan["runs"][0]
    assert first["flops_head"] == pytest.approx(6 * 8 * 384 * first["tokens"])  # of all positions
    assert walk.curves["uniform"]
    settings = walk.answer["settings"]
    assert (settings["strategy"], settings["kappa"], settings["steps"]) == ("ancestral", 0.9, 3)
    assert main(["validate", "--config", str(walk.run / "config.yaml")]) == 0
    assert main(["score", str(walk.run), "--pairs", "pairs.jsonl", "--policy", "confidence"]) == 2
    assert "policy confidence@1: uniform has no [MASK]" in capsys.readouterr().err
    assert main(["convert", str(walk.run), "theirs", "--to", "hf-llada"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
