"""Shards and tensor parallelism: the same run on any number of processes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy

from helpers import mesh_of_four
from helpers.forked import exit_codes
from helpers.tiny_runs import (
    fit,
    fit_arguments,
    fit_process,
    free_port,
    kill_at,
    losses,
    metrics,
    record,
    run_processes,
    weights,
)
from llada_lightning.checkpoints.run_folder import (
    META,
    ShardedCheckpointReader,
    content_hash,
    discard,
    is_sharded,
    last_checkpoint,
    put_in_place,
    read_sharded,
    saved_identity,
)
from llada_lightning.commands.main import main
from llada_lightning.compute.shapes import get_shape
from llada_lightning.support.errors import UserError
from llada_lightning.training.parallel import FullySharded, check_degree, check_strategy, tensor_parallel, total_norm
from llada_lightning.training.replay import replay_step

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


GROUPED = "--model.shape={n_layers: 2, d_model: 32, n_heads: 4, n_kv_heads: 2, d_ff: 64}"
DDP = (GROUPED, "--trainer.devices=2", "--trainer.strategy=ddp")
FSDP2 = (GROUPED, "--trainer.devices=2", "--trainer.strategy=fsdp2")
TP = (GROUPED, "--trainer.devices=2", "--trainer.strategy=fsdp2_tp2")
FOUR = (GROUPED, "--trainer.devices=4", "--trainer.strategy=fsdp2_tp2")
ACCUMULATED = "--trainer.accumulate_grad_batches=2"


def run(objective: str, data: Path, root: Path, *extra: str) -> Path:
    done = fit_process(objective, data, root, *extra)
    assert done.returncode == 0, done.stderr
    return root / "test" / "run"


@pytest.fixture(scope="module")
def one(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The run of each objective on one process."""
    root = tmp_path_factory.mktemp("one")
    return {objective: fit(objective, prepared, root / objective, GROUPED) for objective in ("llada", "arm")}


@pytest.fixture(scope="module")
def two(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `llada` run on a group of two processes."""
    return run("llada", prepared, tmp_path_factory.mktemp("two"), *TP)


def assert_same_figures(folder: Path, expected: Path, abs: float = 1e-5) -> None:
    for name in ("step", "tokens", "train_nats_per_token", "grad_norm", "lr", "val_nats_per_token", "val_stderr"):
        mine, theirs = ([float(row[name]) for row in metrics(run) if row[name]] for run in (folder, expected))
        assert mine == pytest.approx(theirs, abs=abs), name
    for name in ("val_nats_per_token", "val_stderr", "tokens", "steps"):
        assert record(folder)[name] == pytest.approx(record(expected)[name], abs=abs), name


def as_at_step_20(folder: Path, root: Path) -> None:
    """A copy of a run whose last steps are yet to be made."""
    copy = shutil.copytree(folder, root / "test" / "run")
    (copy / "result.json").unlink()
    last = copy / "checkpoints" / "step=00000024.ckpt"
    shutil.rmtree(last) if last.is_dir() else last.unlink()


def test_a_group_of_two_makes_the_same_run(one: dict[str, Path], two: Path) -> None:
    assert_same_figures(two, one["llada"])
    assert record(two)["run"] == record(one["llada"])["run"]


def test_its_shards_read_whole_are_what_one_process_would_have_saved(one: dict[str, Path], two: Path) -> None:
    last = Path("checkpoints") / "step=00000024.ckpt"
    shards, whole = read_sharded(two / last), torch.load(one["llada"] / last)
    assert list(shards["state_dict"]) == list(whole["state_dict"])
    for key, value in whole["state_dict"].items():
        assert torch.allclose(shards["state_dict"][key], value, atol=1e-5), key
    [mine], [theirs] = shards["optimizer_states"], whole["optimizer_states"]
    assert mine["param_groups"] == theirs["param_groups"]
    for number, state in theirs["state"].items():
        assert all(torch.allclose(mine["state"][number][key], value, atol=1e-5) for key, value in state.items())


def test_one_process_validates_its_shards(two: Path, capsys: pytest.CaptureFixture[str]) -> None:
    single = ("--trainer.strategy=auto", "--trainer.devices=1")
    assert main(["validate", f"--config={two / 'config.yaml'}", *single]) == 0
    assert f"{record(two)['val_nats_per_token']:.4f}" in capsys.readouterr().out


def test_one_process_replays_its_steps(two: Path) -> None:
    replayed = replay_step(two, 22)
    assert replayed.loss == pytest.approx(losses(two)[21], abs=1e-5)
    assert [sequence.ordinal for sequence in replayed.sequences] == list(range(21 * 8, 22 * 8))


@pytest.mark.slow
def test_a_killed_run_goes_on_as_one_process(prepared: Path, tmp_path: Path, one: dict[str, Path]) -> None:
    """And accumulated micro-batches are the same batch."""
    assert fit_process("arm", prepared, tmp_path, *TP, ACCUMULATED, kill_at(13)).returncode != 0
    [*_, last] = sorted((tmp_path / "test" / "run" / "checkpoints").glob("*.ckpt"))
    assert last.name == "step=00000010.ckpt" and last.is_dir()
    assert_same_figures(fit("arm", prepared, tmp_path, GROUPED), one["arm"])


def test_the_run_of_one_process_goes_on_as_a_group(prepared: Path, tmp_path: Path, one: dict[str, Path]) -> None:
    as_at_step_20(one["llada"], tmp_path)
    done = fit_process("llada", prepared, tmp_path, *TP, "--speed.loss=plain")
    assert "going on from" in done.stderr and "view tensor" not in done.stderr
    assert_same_figures(tmp_path / "test" / "run", one["llada"])


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("four")
    port = free_port()
    assert exit_codes(mesh_of_four.work, *((rank, port, folder) for rank in range(4))) == [0] * 4
    return folder


@pytest.mark.parametrize(("part", "factor"), [("initial", 1), ("skipped", 1), ("filled", 2)])
def test_weights_in_two_dimensions_of_shards_are_the_same_bits(four: Path, part: str, factor: int) -> None:
    """As drawn, after an update that the guard skips, and as taken from a whole model."""
    layouts = json.loads((four / "figures.json").read_text())["layouts"]
    assert "_StridedShard" in layouts["embedding.weight"][0] or "_S(" in layouts["embedding.weight"][0]
    reader = ShardedCheckpointReader(four / part)
    for name, whole in mesh_of_four.initialised().state_dict().items():
        assert torch.equal(reader.read_tensor(f"{part}.{name}"), factor * whole), name


def test_gradients_and_their_norm_in_two_dimensions_of_shards(four: Path) -> None:
    model = mesh_of_four.initialised()
    (sum(mesh_of_four.loss(model, mesh_of_four.tokens(replica)) for replica in range(2)) / 2).backward()
    reader = ShardedCheckpointReader(four / "gradients")
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert torch.allclose(reader.read_tensor(f"gradients.{name}"), parameter.grad, atol=2e-5), name
    norm = float(total_norm([p.grad for p in model.parameters() if p.grad is not None]))
    assert json.loads((four / "figures.json").read_text())["norm"] == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        (["--trainer.strategy=fsdp2_tp4"], "the number of processes 2"),
        (["--model.shape={n_layers: 1, d_model: 6, n_heads: 3, n_kv_heads: 3, d_ff: 8}"], "n_heads 3"),
        (["--model.shape={n_layers: 1, d_model: 8, n_heads: 2, n_kv_heads: 1, d_ff: 8}"], "n_kv_heads 1"),
        (["--model.shape={n_layers: 1, d_model: 8, n_heads: 2, n_kv_heads: 2, d_ff: 9}"], "d_ff 9"),
        (["--data.sequence_length=31"], "data.sequence_length 31"),
        (["--model.vocab_size=385"], "model.vocab_size 385"),
    ],
)
def test_a_degree_that_does_not_divide_is_one_line(
    settings: list[str], complaint: str, prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(fit_arguments("llada", prepared, tmp_path, *TP, *settings)) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: trainer.strategy: tensor_parallel ") and f"does not divide {complaint};" in line
    assert "degrees that fit here: 1" in line
    assert ("--model.vocab_size=386" in line) == ("vocab_size" in complaint)
    assert not (tmp_path / "test").exists()


def test_the_degrees_that_fit_are_named() -> None:
    with pytest.raises(UserError, match=r"tensor_parallel 4 does not divide d_ff 5634; .*: 1, 2$"):
        check_degree(4, 8, get_shape("llada-1b"), 126_464, 4096)
    with pytest.raises(UserError, match=r"tensor_parallel 0 does not divide .*: 1, 2, 4, 8$"):
        check_degree(0, 8, get_shape("llada-8b"), 126_464, 4096)
    check_degree(8, 16, get_shape("llada-8b"), 126_464, 4096)


def test_the_degree_of_what_a_configuration_says() -> None:
    named = {"class_path": "llada_lightning.training.parallel.FullySharded", "init_args": {"tensor_parallel": 4}}
    settings = ["auto", "ddp", "fsdp2", "fsdp2_tp2", "fsdp2_tp8", named, FullySharded(tensor_parallel=3)]
    assert [tensor_parallel(setting) for setting in settings] == [1, 1, 1, 2, 8, 4, 3]


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["llada", "arm"])
@pytest.mark.parametrize("spread", [DDP, FSDP2, TP, FOUR, (*FSDP2, ACCUMULATED)], ids=" ".join)
def test_however_it_is_spread(
    objective: str, spread: tuple[str, ...], prepared: Path, tmp_path: Path, one: dict[str, Path]
) -> None:
    assert_same_figures(run(objective, prepared, tmp_path, *spread), one[objective])


@pytest.mark.slow
@pytest.mark.parametrize("after", [TP, FSDP2, FOUR], ids=" ".join)
def test_it_goes_on_however_it_is_spread(
    after: tuple[str, ...], prepared: Path, tmp_path: Path, one: dict[str, Path], two: Path
) -> None:
    as_at_step_20(two, tmp_path)
    assert_same_figures(run("llada", prepared, tmp_path, *after), one["llada"])


@pytest.mark.slow
def test_one_file_gathered_from_two_dimensions_of_shards(prepared: Path, tmp_path: Path, one: dict[str, Path]) -> None:
    strategy = "{class_path: llada_lightning.training.parallel.FullySharded, init_args: {tensor_parallel: 2, "
    strategy += "save_distributed_checkpoint: false}}"
    folder = run("llada", prepared, tmp_path, *FOUR, f"--trainer.strategy={strategy}")
    for step in (20, 24):
        last = Path("checkpoints") / f"step={step:08d}.ckpt"
        mine, theirs = (torch.load(run / last) for run in (folder, one["llada"]))
        for key, value in theirs["state_dict"].items():
            assert torch.allclose(mine["state_dict"][key], value, atol=1e-5), key


@pytest.mark.slow
@pytest.mark.parametrize("compiled", ["true", "false"])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_however_it_is_computed(
    compiled: str, recompute: str, prepared: Path, tmp_path: Path, one: dict[str, Path]
) -> None:
    speed = (f"--speed.compile={compiled}", f"--speed.recompute={recompute}")
    assert_same_figures(run("llada", prepared, tmp_path, *TP, *speed), one["llada"], abs=1e-4)


@pytest.mark.slow
def test_bf16_stays_near_replicas(prepared: Path, tmp_path: Path) -> None:
    """Sums over the group are rounded to bf16, too, so the figures are near, and not the same."""
    short = ("--trainer.precision=bf16-mixed", "--trainer.max_steps=6")
    folders = [run("llada", prepared, tmp_path / name, *spread, *short) for name, spread in (("d", DDP), ("t", TP))]
    assert losses(folders[1]) == pytest.approx(losses(folders[0]), abs=0.02)
    saved = read_sharded(folders[1] / "checkpoints" / "step=00000006.ckpt")
    assert {value.dtype for value in saved["state_dict"].values()} == {torch.float32}


@pytest.mark.slow
def test_each_sequence_is_predicted_once(two: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = run_processes(["predict", f"--config={two / 'config.yaml'}"], 2)
    assert done.returncode == 0, done.stderr
    nats = [float(line) for line in done.stdout.splitlines()]
    assert len(nats) == 24
    assert sum(nats) / 24 / 32 == pytest.approx(record(two)["val_nats_per_token"], abs=1e-5)
