"""One run for several budgets: a trunk, and for each a branch, which is the run that this budget alone would be."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.tiny_runs import SLOWER, fit, fit_arguments, fit_process, kill_at, losses, metrics, timeless
from llada_lightning.checkpoints.run_folder import content_hash
from llada_lightning.commands.main import main
from llada_lightning.compute.shapes import Shape
from llada_lightning.study.collect import collect

SHAPE = Shape(n_layers=2, d_model=32, n_heads=2, n_kv_heads=1, d_ff=64)
TOKENS_PER_STEP = 8 * 32
STEPS = (12, 24, 36)
WARMUP = "--model.schedule.warmup_steps=2"
EXACT = ("val_nats_per_token", "val_stderr", "tokens", "flops_6nd", "unique_tokens", "steps", "decay_steps", "run")


def flops(steps: int) -> float:
    return 6.0 * SHAPE.params_nonembedding * TOKENS_PER_STEP * steps


def budgets(*steps: int) -> list[str]:
    given = [flops(n) for n in steps]
    several = str(given) if len(given) > 1 else str(given[0])
    return [f"--budget.flops={several}", "--trainer.max_steps=-1", "--data.random_length_share=0", WARMUP]


def records(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "result.json").read_text())


def branch(folder: Path, steps: int) -> Path:
    return folder / "branches" / str(steps)


def weights_of(checkpoints: Path, steps: int) -> dict[str, torch.Tensor]:
    return torch.load(checkpoints / "checkpoints" / f"step={steps:08d}.ckpt")["state_dict"]


@pytest.mark.parametrize("objective", ["llada", *SLOWER])
def test_branches_equal_separate_runs_bit_for_bit(prepared: Path, tmp_path: Path, objective: str) -> None:
    family = fit(objective, prepared, tmp_path / "family", *budgets(*STEPS))
    assert [record["steps"] for record in records(family)] == list(STEPS)
    assert [int(row["step"]) for row in metrics(family)] == list(range(1, 30))  # the trunk ends at the last fork
    for steps, record in zip(STEPS, records(family), strict=True):
        alone = fit(objective, prepared, tmp_path / f"alone{steps}", *budgets(steps))
        [separate] = records(alone)
        assert [record[key] for key in EXACT] == [separate[key] for key in EXACT]
        theirs = weights_of(alone, steps)
        mine = weights_of(branch(family, steps), steps)
        assert all(torch.equal(mine[key], theirs[key]) for key in theirs)
        fork = steps - record["decay_steps"]
        assert losses(branch(family, steps)) == losses(alone)[fork:]
        assert record["parent_checkpoint"] == content_hash(family / "checkpoints" / f"step={fork:08d}.ckpt")
        assert separate["parent_checkpoint"] is None
    table, report = collect([tmp_path])
    assert (len(table), len(report.duplicates), report.unfinished) == (3, 3, {})


@pytest.mark.parametrize(
    "step",
    [
        pytest.param(5, marks=pytest.mark.slow),
        pytest.param(10, marks=pytest.mark.slow),
        11,
        pytest.param(17, marks=pytest.mark.slow),
    ],
    ids=["trunk", "first branch", "its end", "trunk again"],
)
@pytest.mark.parametrize("objective", ["llada", *SLOWER])
def test_a_killed_family_ends_bit_for_bit_as_an_uninterrupted_one(
    prepared: Path, tmp_path: Path, objective: str, step: int
) -> None:
    whole = fit(objective, prepared, tmp_path / "whole", *budgets(*STEPS))
    killed = fit_process(objective, prepared, tmp_path / "killed", *budgets(*STEPS), kill_at(step))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    folder = fit(objective, prepared, tmp_path / "killed", *budgets(*STEPS))
    assert timeless(folder) == timeless(whole) and timeless(whole)[0]["parent_checkpoint"]
    assert losses(folder) == losses(whole)
    for steps in STEPS:
        assert losses(branch(folder, steps)) == losses(branch(whole, steps))
    validated = [[int(row["step"]) for row in metrics(run) if row["val_nats_per_token"]] for run in (folder, whole)]
    assert validated == [[10, 20], [10, 20]]


@pytest.mark.slow
def test_two_ranks_train_the_same_family(prepared: Path, tmp_path: Path) -> None:
    whole = fit("arm", prepared, tmp_path / "whole", *budgets(12, 24))
    ranks = ("--trainer.devices=2", "--trainer.strategy=ddp")
    pair = fit_process("arm", prepared, tmp_path / "pair", *budgets(12, 24), *ranks)
    assert pair.returncode == 0, pair.stderr
    for mine, theirs in zip(records(tmp_path / "pair/test/run"), records(whole), strict=True):
        assert mine["val_nats_per_token"] == pytest.approx(theirs["val_nats_per_token"], abs=1e-5)


def test_few_validation_documents_are_told_once_and_before_the_training(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llada_lightning.training.record.FEW_DOCUMENTS", 10**9)
    fit("arm", prepared, tmp_path, *budgets(12, 24))
    said = capsys.readouterr().err
    assert said.count("the standard error means little") == 1
    assert said.index("the standard error means little") < said.index("branching off")


def test_a_family_done_is_left_alone_and_validated_at_its_largest_budget(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = fit("arm", prepared, tmp_path, *budgets(12, 24))
    before = (folder / "result.json").read_bytes()
    capsys.readouterr()
    assert main(fit_arguments("arm", prepared, tmp_path, *budgets(12, 24))) == 0
    assert capsys.readouterr().err.count("is done") == 2
    assert main(fit_arguments("arm", prepared, tmp_path, *budgets(12, 24), "--model.schedule.lr=0.02")) == 2
    said = capsys.readouterr().err
    assert "holds the finished run of other settings (model.init_args.schedule." in said
    assert "lr was 0.01, is 0.02): " in said
    assert main(fit_arguments("arm", prepared, tmp_path, *budgets(12, 26))) == 2
    assert "schedule.total_steps was 24, is 26" in capsys.readouterr().err  # of the nearest budget
    assert (folder / "result.json").read_bytes() == before
    assert main(["fit", "--config", str(folder / "config.yaml")]) == 0  # resolves to the same run
    assert main(["validate", "--config", str(folder / "config.yaml")]) == 0
    assert f"{records(folder)[-1]['val_nats_per_token']:.4f}" in capsys.readouterr().out


def test_a_larger_budget_goes_on_from_the_trunk_of_another_run(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = fit("arm", prepared, tmp_path / "first", *budgets(12, 24))
    fork = first / "checkpoints" / "step=00000019.ckpt"
    alone = fit("arm", prepared, tmp_path / "alone", *budgets(48))
    more = fit("arm", prepared, tmp_path / "more", *budgets(48), f"--ckpt_path={fork}")
    assert [records(more)[0][key] for key in EXACT] == [records(alone)[0][key] for key in EXACT]
    assert records(more)[0]["parent_checkpoint"] == content_hash(fork)
    again = fit("arm", prepared, tmp_path / "again", *budgets(12, 24))
    assert (again / "checkpoints" / fork.name).read_bytes() != fork.read_bytes()  # clocks
    assert content_hash(again / "checkpoints" / fork.name) == content_hash(fork)
    assert timeless(again) == timeless(first)
    for steps, extra, said in [
        (22, (), "is at step 19, and a budget"),
        (48, ("--model.schedule.lr=0.02",), "model.init_args.schedule.lr was 0.01, is 0.02"),
    ]:
        root = tmp_path / f"refused{steps}{len(extra)}"
        words = budgets(steps // 2, steps) if not extra else budgets(steps)
        assert main(fit_arguments("arm", prepared, root, *words, f"--ckpt_path={fork}", *extra)) == 2
        assert said in capsys.readouterr().err
        assert not root.exists()


def test_the_hash_of_a_parent_is_of_weights_moments_and_counters(prepared: Path, tmp_path: Path) -> None:
    run = fit("arm", prepared, tmp_path, "--trainer.max_steps=3")
    path, other = run / "checkpoints" / "step=00000003.ckpt", tmp_path / "other.ckpt"

    def changed(change: Callable[[dict[str, Any]], Any]) -> str:
        content = torch.load(path)
        change(content)
        torch.save(content, other)
        return content_hash(other)

    def flip(tensor: torch.Tensor) -> None:
        tensor.view(-1).view(torch.int32)[0] ^= 1

    assert changed(lambda content: content["callbacks"]["Accounting"].update(wall_seconds=1e9)) == content_hash(path)
    assert changed(lambda content: content.update({"pytorch-lightning_version": "0"})) == content_hash(path)
    others = [
        changed(lambda content: flip(next(iter(content["state_dict"].values())))),
        changed(lambda content: flip(content["optimizer_states"][0]["state"][1]["exp_avg_sq"])),
        changed(lambda content: content.update(global_step=4)),
        changed(lambda content: content["lr_schedulers"][0].update(last_epoch=4)),
        changed(lambda content: content["guard"].update(skipped=1)),
    ]
    assert len({content_hash(path), *others}) == 6


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (budgets(24, 12), "several budgets must ascend"),
        (["--budget.flops=[]", "--trainer.max_steps=-1"], "budget.flops: [] holds no budget"),
        ([*budgets(12, 24), "--model.schedule.decay_fraction=0"], "several budgets need a decay"),
        ([*budgets(12, 24), "--model.schedule.decay_steps=11"], "they must follow one another"),
        ([*budgets(12, 24), "--trainer.enable_checkpointing=false"], "several budgets branch from checkpoints"),
        (
            ["--budget.flops=[1e9, .nan]", "--trainer.max_steps=-1"],
            "budget.flops: nan given; it must be a finite number",
        ),
    ],
)
def test_budgets_that_make_no_family_are_refused(
    prepared: Path, tmp_path: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(fit_arguments("arm", prepared, tmp_path, *words)) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "test").exists()


def test_a_budget_that_the_trunk_has_passed_is_refused(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = fit("arm", prepared, tmp_path, *budgets(12, 36))
    (folder / "result.json").unlink()
    assert main(fit_arguments("arm", prepared, tmp_path, *budgets(12, 24, 36))) == 2
    assert "has passed step 19, where a new budget would have branched off" in capsys.readouterr().err


# --- runs that continue the trunk of others --------------------------------------------------------------------------


def study_fit(objective: str, data: Path, root: Path, *extra: str) -> Path:
    """Fit in this process, in a folder of the run's own name; returns the folder."""
    before = set(root.glob("test/*"))
    words = [word for word in fit_arguments(objective, data, root, *extra) if not word.startswith("--run.name")]
    assert main(words) == 0
    [folder] = set(root.glob("test/*")) - before
    return folder


def trunks(*runs: tuple[int, ...]) -> str:
    return f"--budget.trunks={[[flops(steps) for steps in run] for run in runs]}"


@pytest.mark.slow
def test_a_run_of_other_budgets_continues_the_trunks_of_its_study(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Larger budgets start from the last fork, one between from the fork before it, one below all from zero."""
    together = fit("llada", prepared, tmp_path / "together", *budgets(8, 12, 18, 24, 36, 48))
    wanted = {record["run"]: record for record in records(together)}
    root, keep = tmp_path / "grown", "--run.keep_fork=true"
    first = study_fit("llada", prepared, root, *budgets(12, 24))
    second = study_fit("llada", prepared, root, *budgets(36), trunks((12, 24)), keep)
    third = study_fit("llada", prepared, root, *budgets(48), trunks((12, 24), (36,)))
    between = study_fit("llada", prepared, root, *budgets(18), trunks((12, 24), (36,), (48,)))
    below = study_fit("llada", prepared, root, *budgets(8), trunks((12, 24), (36,)))
    grown = [record for run in (first, second, third, between, below) for record in records(run)]
    assert len(grown) == 6
    for record in grown:
        assert [record[key] for key in EXACT] == [wanted[record["run"]][key] for key in EXACT]
    steps = {run: [int(row["step"]) for row in metrics(run)] for run in (first, second, third, between, below)}
    assert steps[first] == list(range(1, 20)) and steps[second] == list(range(20, 37))
    assert steps[third] == list(range(30, 49)) and steps[between] == list(range(11, 19))
    assert steps[below] == list(range(1, 9))
    fork = first / "checkpoints" / "step=00000019.ckpt"
    assert records(second)[0]["parent_checkpoint"] == content_hash(fork)
    assert (second / "checkpoints" / "step=00000029.ckpt").exists()

    # the same command again leaves it alone, and its last checkpoint is its own
    capsys.readouterr()
    words = fit_arguments("llada", prepared, root, *budgets(36), trunks((12, 24)), keep, f"--run.name={second.name}")
    assert main(words) == 0
    assert "is done" in capsys.readouterr().err
    assert main(["validate", "--config", str(second / "config.yaml")]) == 0
    assert f"{records(second)[0]['val_nats_per_token']:.4f}" in capsys.readouterr().out


@pytest.mark.slow
def test_a_continued_run_that_is_killed_keeps_the_start_that_it_began_with(prepared: Path, tmp_path: Path) -> None:
    root = tmp_path / "grown"
    words = (*budgets(48), trunks((12,), (12, 24)), "--run.name=late")
    start = study_fit("llada", prepared, root, *budgets(12), "--run.keep_fork=true")
    killed = fit_process("llada", prepared, root, *words, kill_at(17))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    study_fit("llada", prepared, root, *budgets(12, 24))  # has a later fork, which comes too late
    assert main(fit_arguments("llada", prepared, root, *words)) == 0
    fork = content_hash(start / "checkpoints" / "step=00000010.ckpt")
    assert records(root / "test/late")[0]["parent_checkpoint"] == fork
    assert [int(row["step"]) for row in metrics(root / "test/late")] == list(range(11, 49))


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ([trunks((12, 24)), "--trainer.max_steps=48"], "budget.trunks: given without budget.flops"),
        (["--budget.trunks=[[]]", *budgets(48)], "budget.trunks: [] holds no budget"),
        (["--budget.trunks=[[2e9, 1e9]]", *budgets(48)], "budget.trunks: 2e+09 and 1e+09 make"),
        (["--budget.trunks=12", *budgets(48)], "budget.trunks: 12 given"),
    ],
)
def test_trunks_that_no_run_has_are_one_line(
    extra: list[str], said: str, prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(fit_arguments("arm", prepared, tmp_path / "runs", *extra)) == 2
    shown = capsys.readouterr().err
    assert said in shown and shown.count("\n") == 1
    assert not (tmp_path / "runs").exists()
