"""A run killed with -9 and started again ends bit for bit as one that was not stopped."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from helpers.tiny_runs import fit, fit_arguments, fit_process, kill_at, losses, metrics, record, weights
from llada_lightning.commands.main import main


@pytest.mark.parametrize("objective", ["arm", "llada", "block", "uniform"])
@pytest.mark.parametrize(("workers", "step"), [(0, 17), pytest.param(2, 13, marks=pytest.mark.slow)])
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


def test_a_run_killed_in_its_validation_misses_no_row(prepared: Path, tmp_path: Path) -> None:
    """The step of a checkpoint has its validation: here both fall on step 10, and the kill between them."""
    both = ("--run.checkpoint_every_steps=5", "--trainer.val_check_interval=5")
    whole = fit("llada", prepared, tmp_path / "whole", *both)
    callbacks = "--trainer.callbacks=[{class_path: helpers.tiny_runs.KillInValidation, init_args: {step: 10}}]"
    assert fit_process("llada", prepared, tmp_path / "killed", *both, callbacks).returncode == -signal.SIGKILL
    folder = fit("llada", prepared, tmp_path / "killed", *both)
    kept = ("step", "tokens", "train_nats_per_token", "val_nats_per_token", "val_stderr")
    assert [[row[key] for key in kept] for row in metrics(folder)] == [
        [row[key] for key in kept] for row in metrics(whole)
    ]


@pytest.mark.parametrize(
    "then",
    [pytest.param((), marks=pytest.mark.slow), ("--trainer.accumulate_grad_batches=2",)],
    ids=["whole", "accumulated"],
)
def test_a_run_killed_on_two_ranks_goes_on_on_one(prepared: Path, tmp_path: Path, then: tuple[str, ...]) -> None:
    whole = fit("llada", prepared, tmp_path / "whole")
    ranks = ("--trainer.devices=2", "--trainer.strategy=ddp")
    killed = fit_process("llada", prepared, tmp_path / "killed", *ranks, kill_at(13))
    assert killed.returncode != 0
    folder = fit("llada", prepared, tmp_path / "killed", *then)
    assert [int(row["step"]) for row in metrics(folder)] == list(range(1, 25))
    assert losses(folder) == pytest.approx(losses(whole), abs=1e-5)
    for key, value in weights(whole).items():
        assert torch.allclose(weights(folder)[key], value, atol=1e-5)


@pytest.mark.parametrize(
    ("before", "after"),
    [pytest.param(1, 2, marks=pytest.mark.slow), (2, 1), pytest.param(4, 2, marks=pytest.mark.slow)],
)
def test_another_accumulation_goes_on_with_the_same_batches(
    prepared: Path, tmp_path: Path, before: int, after: int
) -> None:
    """From an odd step, where a count of micro-batches does not divide by the new accumulation."""
    whole = fit("llada", prepared, tmp_path / "whole")
    odd = ("--run.checkpoint_every_steps=15", "--run.keep_checkpoints=9")
    folder = fit("llada", prepared, tmp_path / "changed", f"--trainer.accumulate_grad_batches={before}", *odd)
    (folder / "result.json").unlink()
    (folder / "checkpoints" / "step=00000024.ckpt").unlink()
    fit("llada", prepared, tmp_path / "changed", f"--trainer.accumulate_grad_batches={after}", *odd)
    assert losses(folder) == pytest.approx(losses(whole), abs=1e-5)
    assert [row["step"] for row in metrics(folder) if row["val_nats_per_token"]] == [
        row["step"] for row in metrics(whole) if row["val_nats_per_token"]
    ]


@pytest.mark.parametrize(
    ("name", "code"), [("SIGTERM", 143), ("SIGINT", 130), pytest.param("SIGHUP", 129, marks=pytest.mark.slow)]
)
def test_a_signal_saves_the_step_and_the_run_goes_on(prepared: Path, tmp_path: Path, name: str, code: int) -> None:
    whole = fit("arm", prepared, tmp_path / "whole")
    stopped = fit_process("arm", prepared, tmp_path / "stopped", kill_at(13, name))
    assert stopped.returncode == code, stopped.stderr
    assert "saved step 14; the same command resumes from there" in stopped.stderr
    folder = tmp_path / "stopped" / "test" / "run"
    assert (folder / "checkpoints" / "step=00000014.ckpt").exists()  # the step that the signal fell into
    fit("arm", prepared, tmp_path / "stopped")
    assert losses(folder) == losses(whole)
    assert all(torch.equal(weights(folder)[key], value) for key, value in weights(whole).items())


def test_a_given_checkpoint_that_is_none_is_refused(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "garbage.ckpt").write_bytes(b"no checkpoint")
    for name, said in {"garbage.ckpt": "damaged", "absent.ckpt": "does not exist"}.items():
        assert main(fit_arguments("arm", prepared, tmp_path, f"--ckpt_path={tmp_path / name}")) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "test").exists()


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
    folder = fit("arm", prepared, tmp_path, "--trainer.max_steps=10")
    last, run = folder / "checkpoints" / "step=00000010.ckpt", record(folder)["run"]

    def error(root: Path, *extra: str) -> str:
        assert main(fit_arguments("arm", prepared, root, "--trainer.max_steps=10", change, *extra)) == 2
        return capsys.readouterr().err.splitlines()[-1]

    finished = error(tmp_path)
    start, _, rest = finished.partition(" (")
    differences, _, rest = rest.partition("): ")
    assert start == f"error: run.name: {folder} holds the finished run of other settings"
    assert named in differences.split("; ")
    assert rest.startswith(f"{run}, not arm-")
    assert rest.endswith("; restore them, choose another --run.name, or leave it out")
    of_another = f"error: checkpoint: '{last}' is of another run ({differences}); restore these settings"
    assert error(tmp_path / "other", f"--ckpt_path={last}") == f"{of_another}, or leave --ckpt_path out"
    (folder / "result.json").unlink()
    assert error(tmp_path) == f"{of_another}, or start a new --run.name"


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"no checkpoint")])
def test_a_finished_run_whose_checkpoint_tells_nothing_is_refused_by_its_name(
    prepared: Path, tmp_path: Path, damage: Callable[[Path], object], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = fit("arm", prepared, tmp_path, "--trainer.max_steps=4")
    run = record(folder)["run"]
    damage(folder / "checkpoints" / "step=00000004.ckpt")
    capsys.readouterr()
    assert main(fit_arguments("arm", prepared, tmp_path, "--trainer.max_steps=4", "--seed_everything=5")) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: run.name: {folder} holds the finished run {run}, not arm-")
    assert error.endswith("; choose another --run.name, or leave it out\n")


def test_a_checkpoint_of_other_data_is_refused(
    prepared: Path, prepared_second: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = fit("llada", prepared, tmp_path, "--trainer.max_steps=10")
    (folder / "result.json").unlink()
    assert main(fit_arguments("llada", prepared_second, tmp_path, "--trainer.max_steps=10")) == 2
    assert "data.fingerprint was" in capsys.readouterr().err


def test_a_checkpoint_of_the_run_itself_does_not_take_it_back_at_every_start(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The last one counts: a preempted job is started again with the very same words."""
    folder = fit("arm", prepared, tmp_path, "--run.checkpoint_every_steps=10", "--run.keep_checkpoints=3")
    (folder / "result.json").unlink()
    capsys.readouterr()
    fit("arm", prepared, tmp_path, f"--ckpt_path={folder / 'checkpoints' / 'step=00000010.ckpt'}")
    said = capsys.readouterr().err
    assert "resumes from its last one" in said
    assert "going on from" in said and "step=00000024.ckpt" in said


def test_no_more_checkpoints_stay_than_wanted_after_a_resume(prepared: Path, tmp_path: Path) -> None:
    stopped = fit_process("arm", prepared, tmp_path, kill_at(6, "SIGTERM"))
    assert stopped.returncode == 143
    folder = fit("arm", prepared, tmp_path)
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == [
        "step=00000020.ckpt",
        "step=00000024.ckpt",
    ]


def test_half_a_checkpoint_is_not_taken_for_one(prepared: Path, tmp_path: Path) -> None:
    folder = fit("arm", prepared, tmp_path, "--trainer.max_steps=10")
    (folder / "result.json").unlink()
    (folder / "checkpoints" / "step=00000099.ckpt.partial").write_bytes(b"cut short")
    fit("arm", prepared, tmp_path, "--trainer.max_steps=10")
    assert record(folder)["steps"] == 10
