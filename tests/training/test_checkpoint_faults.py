"""A run goes on from its last whole checkpoint, whatever befell the others, and keeps the ones that it was told to."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import IO

import pytest
import torch

from helpers.tiny_runs import fit, fit_arguments, fit_process, losses, metrics, record, weights
from llada_lightning.checkpoints.run_folder import checkpoints_by_step
from llada_lightning.commands.main import main
from llada_lightning.support import files
from llada_lightning.training.callbacks import checkpoints
from llada_lightning.training.callbacks.checkpoints import BEST

SAVED = ("--run.checkpoint_every_steps=8", "--run.keep_checkpoints=3")


def stopped(prepared: Path, root: Path, *extra: str) -> Path:
    """A run as a kill leaves it: checkpoints of steps 8, 16 and 24, and no result."""
    folder = fit("llada", prepared, root, *SAVED, *extra)
    (folder / "result.json").unlink()
    return folder


def flip(checkpoint: Path) -> None:
    """Flip a bit in the middle of a checkpoint, which is weights or moments."""
    content = bytearray(checkpoint.read_bytes())
    content[len(content) // 2] ^= 16
    checkpoint.write_bytes(content)


@pytest.fixture(scope="module")
def whole(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fit("llada", prepared, tmp_path_factory.mktemp("whole"), *SAVED)


@pytest.mark.parametrize("damaged", [(24,), pytest.param((16, 24), marks=pytest.mark.slow), (8, 16, 24)])
def test_damaged_checkpoints_are_passed_over_with_a_warning(
    whole: Path, prepared: Path, tmp_path: Path, damaged: tuple[int, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = stopped(prepared, tmp_path)
    for step in damaged:
        flip(folder / "checkpoints" / f"step={step:08d}.ckpt")
    capsys.readouterr()
    fit("llada", prepared, tmp_path, *SAVED)
    said = capsys.readouterr().err
    assert said.count("is damaged") == len(damaged)
    assert ("going on from" in said) == (8 not in damaged)
    assert losses(folder) == losses(whole)
    assert all(torch.equal(weights(folder)[key], value) for key, value in weights(whole).items())
    aside = sorted(path.name for path in (folder / "checkpoints").glob("*.damaged"))
    assert aside == [f"step={step:08d}.ckpt.damaged" for step in damaged]
    assert sorted(checkpoints_by_step(folder / "checkpoints")) == [8, 16, 24]


def test_a_damaged_checkpoint_is_neither_validated_nor_branched_from(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = stopped(prepared, tmp_path)
    last = folder / "checkpoints" / "step=00000024.ckpt"
    flip(last)
    capsys.readouterr()
    for words in (
        ["validate", "--config", str(folder / "config.yaml")],
        ["validate", "--config", str(folder / "config.yaml"), f"--ckpt_path={last}"],
        ["generate", str(last), "--prompt", "1 plus", "--length", "4"],
        fit_arguments("llada", prepared, tmp_path, f"--ckpt_path={last}", "--run.name=other"),
    ):
        assert main(words) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: checkpoint") and "is damaged" in error and "fails its checksum" in error
    assert not (tmp_path / "test" / "other").exists()


class SmallDisk:
    """A file on a disk that takes no more than so many bytes."""

    def __init__(self, file: IO[bytes], room: int) -> None:
        self._file, self._room = file, room

    def write(self, part: bytes) -> int:
        self._room -= len(part)
        if self._room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self._file.write(part)

    def flush(self) -> None:
        self._file.flush()


def test_a_copy_of_a_run_is_validated_by_its_own_checkpoint(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its config.yaml still names the run that it was copied from."""
    shutil.copytree(whole, tmp_path / "copy")
    assert main(["validate", "--config", str(tmp_path / "copy" / "config.yaml")]) == 0
    assert f"reading {tmp_path / 'copy' / 'checkpoints' / 'step=00000024.ckpt'}" in capsys.readouterr().err
    flip(tmp_path / "copy" / "checkpoints" / "step=00000024.ckpt")
    assert main(["validate", "--config", str(tmp_path / "copy" / "config.yaml")]) == 2
    assert "copy/checkpoints/step=00000024.ckpt' is damaged" in capsys.readouterr().err


@pytest.mark.parametrize("room", [10, pytest.param(1000, marks=pytest.mark.slow), 100_000])
def test_a_full_disk_leaves_the_checkpoints_before_it(
    whole: Path,
    prepared: Path,
    tmp_path: Path,
    room: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Also where torch's writer covers the disk's refusal with one of its own."""
    save = torch.save

    def full(content: dict, file: IO[bytes]) -> None:
        save(content, file if content["global_step"] < 16 else SmallDisk(file, room))

    monkeypatch.setattr(checkpoints.torch, "save", full)
    assert main(fit_arguments("llada", prepared, tmp_path, *SAVED)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: checkpoint: '")
    assert "step=00000016.ckpt' cannot be written (No space left on device); the ones before it are whole" in error
    folder = tmp_path / "test" / "run"
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step=00000008.ckpt"]
    monkeypatch.undo()
    fit("llada", prepared, tmp_path, *SAVED)
    assert losses(folder) == losses(whole)


@pytest.mark.parametrize("name", ["metrics.csv", "result.json", "validation.csv"])
def test_a_full_disk_under_the_other_files(
    whole: Path,
    prepared: Path,
    tmp_path: Path,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The rows and records that were there before stay, and the same command ends as if nothing had been."""
    replace = os.replace

    def full(source: Path, target: Path) -> None:
        if Path(target).name == name:
            raise OSError(errno.ENOSPC, "No space left on device", str(target))
        replace(source, target)

    monkeypatch.setattr(files.os, "replace", full)
    assert main(fit_arguments("llada", prepared, tmp_path, *SAVED)) == 2
    assert f"{name}': No space left on device; free space" in capsys.readouterr().err.splitlines()[-1]
    monkeypatch.undo()
    folder = fit("llada", prepared, tmp_path, *SAVED)
    assert losses(folder) == losses(whole)
    assert record(folder)["val_nats_per_token"] == record(whole)["val_nats_per_token"]
    assert not [path for path in folder.rglob(".*") if path.is_file()]


def test_a_fault_of_ours_while_saving_is_not_laid_on_the_disk(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(content: dict, file: object) -> None:
        raise RuntimeError("cannot pickle this")

    monkeypatch.setattr(checkpoints.torch, "save", broken)
    with pytest.raises(RuntimeError, match="cannot pickle this"):
        main(fit_arguments("llada", prepared, tmp_path, *SAVED))


def test_the_best_stays_beside_the_last(prepared: Path, tmp_path: Path) -> None:
    """A rate that climbs to absurdity: the lowest validation loss comes early."""
    often = ("--trainer.val_check_interval=4", "--run.keep_checkpoints=1", "--run.keep_best=true")
    bad = ("--model.schedule.lr=3", "--model.schedule.warmup_steps=22", "--model.schedule.decay_steps=0")
    folder = fit("arm", prepared, tmp_path, *often, *bad)
    by_step = {
        int(row["step"]): float(row["val_nats_per_token"]) for row in metrics(folder) if row["val_nats_per_token"]
    }
    by_step[24] = record(folder)["val_nats_per_token"]
    best = min(by_step, key=by_step.__getitem__)
    assert 0 < best < 24
    link = folder / "checkpoints" / BEST
    assert link.resolve().name == f"step={best:08d}.ckpt"
    assert torch.load(link)["global_step"] == best
    assert sorted(checkpoints_by_step(folder / "checkpoints")) == [best, 24]


def test_the_best_may_be_the_last(prepared: Path, tmp_path: Path) -> None:
    folder = fit("arm", prepared, tmp_path, "--run.keep_best=true", "--run.keep_checkpoints=1")
    assert (folder / "checkpoints" / BEST).resolve().name == "step=00000024.ckpt"
    assert sorted(checkpoints_by_step(folder / "checkpoints")) == [24]


def test_checkpoints_by_time(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that goes a second a reading: every step is later than a hundredth of a minute."""
    readings = iter(range(10**6))
    monkeypatch.setattr(checkpoints.time, "monotonic", lambda: next(readings))
    seldom = ("--run.checkpoint_every_steps=1000", "--run.keep_checkpoints=99")
    folder = fit("arm", prepared, tmp_path / "time", *seldom, "--run.checkpoint_every_minutes=0.01")
    assert len(checkpoints_by_step(folder / "checkpoints")) == 24
    folder = fit("arm", prepared, tmp_path / "steps", *seldom)
    assert sorted(checkpoints_by_step(folder / "checkpoints")) == [24]
    assert main(fit_arguments("arm", prepared, tmp_path, "--run.checkpoint_every_minutes=0")) == 2


def test_checkpoints_beside_training_are_the_same(whole: Path, prepared: Path, tmp_path: Path) -> None:
    folder = fit("llada", prepared, tmp_path, *SAVED, "--run.async_checkpoints=true")
    assert sorted(checkpoints_by_step(folder / "checkpoints")) == [8, 16, 24]
    for step in (8, 16, 24):
        mine, theirs = (torch.load(run / "checkpoints" / f"step={step:08d}.ckpt") for run in (folder, whole))
        assert all(torch.equal(mine["state_dict"][key], value) for key, value in theirs["state_dict"].items())
        moments = [saved["optimizer_states"][0]["state"] for saved in (mine, theirs)]
        assert all(torch.equal(moments[0][n]["exp_avg"], state["exp_avg"]) for n, state in moments[1].items())


@pytest.mark.slow
def test_a_signal_within_a_validation_costs_no_row(whole: Path, prepared: Path, tmp_path: Path) -> None:
    often = ("--trainer.val_check_interval=6", "--data.val_batch=4")
    undisturbed = fit("llada", prepared, tmp_path / "undisturbed", *SAVED, *often)
    callback = "--trainer.callbacks=[{class_path: helpers.tiny_runs.SignalInValidation, init_args: {step: 12}}]"
    left = fit_process("llada", prepared, tmp_path / "left", *SAVED, *often, callback)
    assert left.returncode == 143, left.stderr
    assert "saved step 12" in left.stderr
    folder = fit("llada", prepared, tmp_path / "left", *SAVED, *often)
    kept = ("step", "tokens", "train_nats_per_token", "val_nats_per_token", "val_stderr")
    rows = [[[row[key] for key in kept] for row in metrics(run)] for run in (folder, undisturbed)]
    assert rows[0] == rows[1]
    assert all(torch.equal(weights(folder)[key], value) for key, value in weights(undisturbed).items())
