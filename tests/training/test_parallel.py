"""Fully sharded runs (FSDP2) on two processes: the same run, with checkpoints in shards that any other run reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy

from helpers.tiny_runs import fit, fit_process, kill_at, losses, metrics, record, weights
from llada_lightning.checkpoints.run_folder import (
    META,
    content_hash,
    discard,
    is_sharded,
    last_checkpoint,
    put_in_place,
    read_sharded,
    saved_identity,
)
from llada_lightning.commands.main import main
from llada_lightning.support.errors import UserError
from llada_lightning.training.parallel import check_strategy

SHARDED = ("--trainer.devices=2", "--trainer.strategy=fsdp2")


@pytest.fixture(scope="module", params=[pytest.param("arm", marks=pytest.mark.slow), "llada"])
def runs(request: pytest.FixtureRequest, prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same run on one process and, sharded, on two."""
    root = tmp_path_factory.mktemp("runs")
    one = fit(request.param, prepared, root / "one")
    done = fit_process(request.param, prepared, root / "two", *SHARDED)
    assert done.returncode == 0, done.stderr
    return one, root / "two" / "test" / "run"


def columns(folder: Path, *names: str) -> list[float]:
    return [float(row[name]) for row in metrics(folder) for name in names if row[name]]


def test_a_sharded_run_is_the_same_run(runs: tuple[Path, Path]) -> None:
    one, two = runs
    for name in ("train_nats_per_token", "grad_norm", "lr", "val_nats_per_token", "val_stderr"):
        assert columns(two, name) == pytest.approx(columns(one, name), abs=1e-5), name
    assert record(two)["run"] == record(one)["run"]
    assert record(two)["val_nats_per_token"] == pytest.approx(record(one)["val_nats_per_token"], abs=1e-5)


def test_its_checkpoints_are_folders_pruned_and_named_like_files(runs: tuple[Path, Path]) -> None:
    one, two = runs
    names = [p.name for p in sorted((two / "checkpoints").iterdir())]
    assert names == ["step=00000020.ckpt", "step=00000024.ckpt"]
    last = last_checkpoint(two / "checkpoints")
    assert last is not None and last.name == names[-1] and is_sharded(last)
    assert saved_identity(last) == saved_identity(one / "checkpoints" / names[-1])


def test_shards_read_whole_are_what_one_process_would_have_saved(runs: tuple[Path, Path]) -> None:
    one, two = (folder / "checkpoints" / "step=00000024.ckpt" for folder in runs)
    shards, whole = read_sharded(two), torch.load(one)
    torch.save(shards, two.with_name("whole.pt"))
    assert content_hash(two.with_name("whole.pt")) == content_hash(two) != content_hash(one)
    assert shards.keys() == whole.keys()
    assert list(shards["state_dict"]) == list(whole["state_dict"])
    for key, value in whole["state_dict"].items():
        assert torch.allclose(shards["state_dict"][key], value, atol=1e-5), key
    [mine], [theirs] = shards["optimizer_states"], whole["optimizer_states"]
    assert mine["param_groups"] == theirs["param_groups"]
    assert mine["state"].keys() == theirs["state"].keys()
    for number, state in theirs["state"].items():
        assert state.keys() == mine["state"][number].keys()
        assert all(torch.allclose(mine["state"][number][key], value, atol=1e-5) for key, value in state.items())


def test_one_process_validates_shards_to_the_same_figure(
    runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = runs
    shards = two / "checkpoints" / "step=00000024.ckpt"
    assert main(["validate", f"--config={one / 'config.yaml'}", f"--ckpt_path={shards}"]) == 0
    assert f"{record(two)['val_nats_per_token']:.4f}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("before", "after"), [pytest.param((), SHARDED, marks=pytest.mark.slow), (SHARDED, ())], ids=["file", "shards"]
)
def test_a_killed_run_goes_on_on_another_number_of_processes(
    prepared: Path, tmp_path: Path, before: tuple[str, ...], after: tuple[str, ...]
) -> None:
    whole = fit("llada", prepared, tmp_path / "whole")
    assert fit_process("llada", prepared, tmp_path / "killed", *before, kill_at(13)).returncode != 0
    folder = tmp_path / "killed" / "test" / "run"
    assert [p.is_dir() for p in (folder / "checkpoints").glob("*.ckpt")] == [before == SHARDED] * 2
    done = fit_process("llada", prepared, tmp_path / "killed", *after)
    assert done.returncode == 0, done.stderr
    assert "going on from" in done.stderr
    assert losses(folder) == pytest.approx(losses(whole), abs=1e-5)


def test_a_signal_to_one_process_stops_all_at_the_same_step(prepared: Path, tmp_path: Path) -> None:
    stopped = fit_process("arm", prepared, tmp_path / "stopped", *SHARDED, kill_at(13, "SIGTERM", rank=1))
    assert stopped.returncode == 143, stopped.stderr
    assert stopped.stderr.count("saved step 14; the same command resumes from there") == 1
    folder = tmp_path / "stopped" / "test" / "run"
    assert is_sharded(folder / "checkpoints" / "step=00000014.ckpt")
    fit("arm", prepared, tmp_path / "stopped")
    whole = fit("arm", prepared, tmp_path / "whole")
    assert losses(folder) == pytest.approx(losses(whole), abs=1e-5)
    assert all(torch.allclose(weights(folder)[k], v, atol=1e-5) for k, v in weights(whole).items())


@pytest.mark.slow
def test_bf16_rounds_where_an_unsharded_run_does(prepared: Path, tmp_path: Path) -> None:
    """On the same two processes as replicas: what is rounded, and summed, is the same, so the losses are."""
    short = ("--trainer.devices=2", "--trainer.precision=bf16-mixed", "--trainer.max_steps=6")
    folders = {}
    for strategy in ("ddp", "fsdp2"):
        done = fit_process("llada", prepared, tmp_path / strategy, *short, f"--trainer.strategy={strategy}")
        assert done.returncode == 0, done.stderr
        folders[strategy] = tmp_path / strategy / "test" / "run"
    assert losses(folders["fsdp2"]) == pytest.approx(losses(folders["ddp"]), abs=1e-6)
    saved = read_sharded(folders["fsdp2"] / "checkpoints" / "step=00000006.ckpt")
    assert {value.dtype for value in saved["state_dict"].values()} == {torch.float32}


def test_lightnings_own_class_is_refused() -> None:
    with pytest.raises(UserError, match=r"trainer.strategy: ModelParallelStrategy given; use --trainer.strategy=fsdp2"):
        check_strategy(ModelParallelStrategy())


def shards_of(folder: Path, content: str) -> Path:
    folder.mkdir()
    (folder / META).write_text(content)
    return folder


@pytest.mark.parametrize("kinds", ["fd", "df", "dd", "ff"])
def test_a_checkpoint_takes_its_name_from_one_of_either_kind(tmp_path: Path, kinds: str) -> None:
    def made(path: Path, kind: str, content: str) -> Path:
        if kind == "d":
            return shards_of(path, content)
        path.write_text(content)
        return path

    target, partial = tmp_path / "step=1.ckpt", tmp_path / "step=1.ckpt.partial"
    made(target, kinds[0], "old")
    put_in_place(made(partial, kinds[1], "new"), target)
    assert [p.name for p in tmp_path.iterdir()] == [target.name]
    assert (target / META if target.is_dir() else target).read_text() == "new"


def test_a_removal_that_is_cut_short_leaves_no_half_of_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = shards_of(tmp_path / "step=00000007.ckpt", "whole")

    def killed(*arguments: Any, **keywords: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("shutil.rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        discard(checkpoint)
    assert last_checkpoint(tmp_path) is None or (last_checkpoint(tmp_path) / META).exists()  # type: ignore[operator]
