"""A run killed with -9 and started again ends bit for bit as one that was not stopped."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch

from llada_lightning.cli import main
from runs import fit, fit_process, kill_at, losses, metrics, record, weights

WITHIN_AN_EPOCH, OVER_AN_EPOCHS_END = 13, 17


@pytest.mark.parametrize("objective", ["arm", "llada"])
@pytest.mark.parametrize(("workers", "step"), [(0, 17), (2, 13)])
def test_a_killed_run_ends_bit_for_bit_as_an_uninterrupted_one(
    prepared: Path, tmp_path: Path, objective: str, workers: int, step: int
) -> None:
    long = (f"--data.workers={workers}", "--data.sequence_length=128", "--trainer.max_steps=24")
    whole = fit(objective, prepared, tmp_path / "whole", *long)
    assert record(whole)["epochs"] > 1, "the test is to run over an epoch's end"
    killed = fit_process(objective, prepared, tmp_path / "killed", *long, kill_at(step))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    folder = tmp_path / "killed" / "test" / "run"
    assert not (folder / "result.json").exists()
    fit(objective, prepared, tmp_path / "killed", *long)
    assert losses(folder) == losses(whole)
    assert [row["step"] for row in metrics(folder)] == [row["step"] for row in metrics(whole)]
    mine, theirs = weights(folder), weights(whole)
    assert all(torch.equal(mine[key], theirs[key]) for key in theirs)
    exact = ("val_nats_per_token", "val_stderr", "tokens", "flops_6nd", "unique_tokens", "steps")
    assert [record(folder)[key] for key in exact] == [record(whole)[key] for key in exact]


def test_a_run_killed_on_two_ranks_goes_on_on_one(prepared: Path, tmp_path: Path) -> None:
    whole = fit("llada", prepared, tmp_path / "whole")
    ranks = ("--trainer.devices=2", "--trainer.strategy=ddp")
    killed = fit_process("llada", prepared, tmp_path / "killed", *ranks, kill_at(13))
    assert killed.returncode != 0
    folder = fit("llada", prepared, tmp_path / "killed")
    assert [int(row["step"]) for row in metrics(folder)] == list(range(1, 25))
    assert losses(folder) == pytest.approx(losses(whole), abs=1e-5)
    for key, value in weights(whole).items():
        assert torch.allclose(weights(folder)[key], value, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("--data.global_batch=4", "data.global_batch was 8, is 4"),
        ("--seed_everything=5", "seed was 0, is 5"),
        ("--model.schedule.lr=0.5", "model.init_args.schedule.lr was 0.01, is 0.5"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(
    prepared: Path, tmp_path: Path, change: str, named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from runs import fit_arguments

    folder = fit("arm", prepared, tmp_path, "--trainer.max_steps=10")
    (folder / "result.json").unlink()
    assert main(fit_arguments("arm", prepared, tmp_path, "--trainer.max_steps=10", change)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: checkpoint:")
    assert named in error


def test_a_checkpoint_of_other_data_is_refused(
    prepared: Path, prepared_second: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from runs import fit_arguments

    folder = fit("llada", prepared, tmp_path, "--trainer.max_steps=10")
    (folder / "result.json").unlink()
    assert main(fit_arguments("llada", prepared_second, tmp_path, "--trainer.max_steps=10")) == 2
    assert "data.fingerprint was" in capsys.readouterr().err


def test_half_a_checkpoint_is_not_taken_for_one(prepared: Path, tmp_path: Path) -> None:
    folder = fit("arm", prepared, tmp_path, "--trainer.max_steps=10")
    (folder / "result.json").unlink()
    (folder / "checkpoints" / "step=00000099.ckpt.partial").write_bytes(b"cut short")
    fit("arm", prepared, tmp_path, "--trainer.max_steps=10")
    assert record(folder)["steps"] == 10
