"""Runs of block diffusion: through every command, on any number of devices, and with one block that of `llada`."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from helpers.every_command import through_every_command
from helpers.tiny_runs import fit, fit_arguments, fit_process, losses, record, validation_tokens
from llada_lightning.checkpoints import load_model
from llada_lightning.commands.main import main
from llada_lightning.evaluation.likelihood import log_likelihood
from llada_lightning.evaluation.policy import Policy

FOUR = "--model.block_length=4"


@pytest.fixture(scope="module")
def run(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process, blocks of four tokens."""
    return fit("block", prepared, tmp_path_factory.mktemp("block"), FOUR)


def test_with_one_block_the_run_is_that_of_llada(prepared: Path, tmp_path: Path) -> None:
    llada = fit("llada", prepared, tmp_path / "llada")
    one = fit("block", prepared, tmp_path / "one", "--model.block_length=32")
    assert losses(one) == losses(llada)
    same = ("val_nats_per_token", "val_stderr", "tokens", "flops_6nd", "flops_attention", "flops_head", "flops_total")
    assert [record(one)[key] for key in same] == [record(llada)[key] for key in same]


def test_the_record_says_what_it_is(run: Path) -> None:
    found = record(run)
    assert (found["objective"], found["variant"], found["val_kind"]) == ("block", "block_length=4", "bound")
    counted = found["flops_6nd"] + found["flops_attention"] + found["flops_head"]
    assert found["flops_total"] - counted == pytest.approx(found["flops_6nd"] * 28 / 32)  # the clean copy


def test_micro_batches_only_cut_the_same_batches(prepared: Path, run: Path, tmp_path: Path) -> None:
    cut = fit("block", prepared, tmp_path, FOUR, "--trainer.accumulate_grad_batches=2", "--data.workers=2")
    assert losses(cut) == pytest.approx(losses(run), abs=1e-5)
    assert record(cut)["val_nats_per_token"] == pytest.approx(record(run)["val_nats_per_token"], abs=1e-5)


def test_the_exact_losses_are_those_of_the_model_that_is_loaded(prepared: Path, tmp_path: Path) -> None:
    policies = "--run.policies={random_order: 1, left_to_right: 1}"
    folder = fit("block", prepared, tmp_path, FOUR, "--trainer.max_steps=3", "--data.val_sequences=6", policies)
    lm, texts = load_model(folder), validation_tokens(prepared, 6)
    for name in ("random_order", "left_to_right"):
        scores = log_likelihood(lm, [([], text) for text in texts], policy=Policy(name))
        measured = record(folder)["val_policies"][f"{name}@1"]["nats_per_token"]
        assert measured == pytest.approx(-sum(score.mean for score in scores) / (6 * 32), abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_make_the_same_run(prepared: Path, run: Path, tmp_path: Path, strategy: str) -> None:
    devices = ("--trainer.devices=2", f"--trainer.strategy={strategy}")
    done = fit_process("block", prepared, tmp_path, FOUR, *devices)
    assert done.returncode == 0, done.stderr
    two = tmp_path / "test" / "run"
    assert losses(two) == pytest.approx(losses(run), abs=1e-5)
    assert record(two)["val_nats_per_token"] == pytest.approx(record(run)["val_nats_per_token"], abs=1e-5)


def test_documents_and_densities_go_together_with_blocks(prepared: Path, tmp_path: Path) -> None:
    more = ("--data.document_mask=true", "--data.density={name: beta, a: 1.5, b: 1}", "--model.loss_weight=ce")
    found = record(fit("block", prepared, tmp_path, FOUR, *more, "--trainer.max_steps=4"))
    assert found["variant"] == "block_length=4;density=beta(a=1.5,b=1);loss_weight=ce"


def test_blocks_must_divide_the_sequences(prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for given, said in (
        ("5", "model.block_length: 5 given, which does not divide sequences of 32; give 4 or 8"),
        ("64", "model.block_length: 64 given, which does not divide sequences of 32; give 32"),
        ("0", "model.block_length: 0 given, which does not divide sequences of 32; give 1"),
    ):
        assert main(fit_arguments("block", prepared, tmp_path, f"--model.block_length={given}")) == 2
        assert capsys.readouterr().err == f"error: {said}\n"
    assert (
        main(["plan", "--flops", "1e9", "--vocab-size", "384", "--sequence-length", "32", "--block-length", "5"]) == 2
    )
    assert "plan: --block-length: 5 given, which does not divide" in capsys.readouterr().err
    assert not (tmp_path / "test").exists()


def test_tensor_parallelism_is_refused(prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shape = "--model.shape={n_layers: 2, d_model: 32, n_heads: 2, n_kv_heads: 2, d_ff: 64}"
    devices = (shape, "--trainer.devices=2", "--trainer.strategy=fsdp2_tp2")
    assert main(fit_arguments("block", prepared, tmp_path, FOUR, *devices)) == 2
    said = "trainer.strategy: fsdp2_tp2 given, but block needs whole sequences on each device; use fsdp2"
    assert capsys.readouterr().err.splitlines()[-1] == f"error: {said}"


def test_dropout_is_of_the_sequence(prepared: Path, tmp_path: Path) -> None:
    dropout = (FOUR, "--model.dropout=0.2", "--trainer.max_steps=6")
    whole = fit("block", prepared, tmp_path / "whole", *dropout)
    cut = fit("block", prepared, tmp_path / "cut", *dropout, "--trainer.accumulate_grad_batches=2")
    assert losses(cut) == pytest.approx(losses(whole), abs=1e-5)


@pytest.mark.slow  # the walk of the third objective is in the fast suite
def test_it_goes_through_every_command(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    walk = through_every_command("block", prepared, capsys, ("--block-length", 4))
    first = walk.plan["runs"][0]
    counted = first["flops_6nd"] + first["flops_attention"] + first["flops_head"]
    assert first["flops_total"] - counted == pytest.approx(first["flops_6nd"] * 12 / 16)
    assert walk.plan["totals"]["flops_copy"] > 0
    assert walk.curves["block [block_length=4]"]
    assert walk.answer["settings"]["strategy"] == "block_diffusion" and walk.answer["settings"]["block_length"] == 4
    config = yaml.safe_load((walk.run / "config.yaml").read_text())
    assert config["model"]["init_args"]["block_length"] == 4
    assert main(["validate", "--config", str(walk.run / "config.yaml")]) == 0
