"""Milestones: results on the way, without a decay, each the result of a run that would have ended there."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.tiny_runs import fit, fit_arguments, fit_process, kill_at, losses, metrics, timeless
from llada_lightning.commands.main import main
from llada_lightning.compute.shapes import Shape
from llada_lightning.records import expected_records, is_done
from llada_lightning.study.collect import collect

SHAPE = Shape(n_layers=2, d_model=32, n_heads=2, n_kv_heads=1, d_ff=64)
FLOPS = 6.0 * SHAPE.params_nonembedding * 8 * 32
WARMUP = "--model.schedule.warmup_steps=2"
SAME = ("val_nats_per_token", "val_stderr", "tokens", "flops_6nd", "unique_tokens", "steps", "decay_steps", "run",
        "variant")  # fmt: skip


def budget(*steps: int, milestones: tuple[float, ...] = ()) -> list[str]:
    given = [FLOPS * n for n in steps]
    on_the_way = [f"--budget.milestones={[FLOPS * n for n in milestones]}"] if milestones else []
    return [
        f"--budget.flops={given if len(given) > 1 else given[0]}",
        *on_the_way,
        "--trainer.max_steps=-1",
        "--data.random_length_share=0",
        WARMUP,
    ]


def records(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "result.json").read_text())


def test_a_milestone_is_the_run_that_ends_there_and_changes_nothing_else(prepared: Path, tmp_path: Path) -> None:
    run = fit("llada", prepared, tmp_path / "run", *budget(24, milestones=(7, 15)))
    assert [record["steps"] for record in records(run)] == [7, 15, 24]
    assert [record["decay_steps"] for record in records(run)] == [0, 0, 5]
    assert [record["variant"] for record in records(run)] == ["decay_steps=0", "decay_steps=0", None]
    without = fit("llada", prepared, tmp_path / "without", *budget(24))
    assert [record[key] for record in records(run)[-1:] for key in SAME] == [records(without)[0][key] for key in SAME]
    assert losses(run) == losses(without)
    alone = fit("llada", prepared, tmp_path / "alone", *budget(15), "--model.schedule.decay_steps=0")
    theirs = torch.load(alone / "checkpoints" / "step=00000015.ckpt")["state_dict"]
    mine = torch.load(run / "checkpoints" / "step=00000015.ckpt")["state_dict"]
    assert all(torch.equal(mine[key], theirs[key]) for key in theirs)
    assert [records(run)[1][key] for key in SAME] == [records(alone)[0][key] for key in SAME]
    assert is_done(run) and expected_records(run) == 3
    table, report = collect([tmp_path / "run"])
    assert len(table) == 3 and not report.unfinished
    before = (run / "result.json").read_bytes()
    assert main(fit_arguments("llada", prepared, tmp_path / "run", *budget(24, milestones=(7,)))) == 0  # one left out
    assert (run / "result.json").read_bytes() == before


def test_a_killed_run_ends_with_the_same_milestones(prepared: Path, tmp_path: Path) -> None:
    words = budget(24, 36, milestones=(1, 19, 25))  # 1 is within the warmup, 19 is where the first branch leaves
    whole = fit("arm", prepared, tmp_path / "whole", *words)
    assert [record["steps"] for record in records(whole)] == [1, 19, 24, 25, 36]
    killed = fit_process("arm", prepared, tmp_path / "killed", *words, kill_at(21))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    folder = fit("arm", prepared, tmp_path / "killed", *words)
    assert timeless(folder) == timeless(whole)
    assert losses(folder) == losses(whole)
    validated = [[int(row["step"]) for row in metrics(run) if row["val_nats_per_token"]] for run in (folder, whole)]
    assert validated[0] == validated[1]


@pytest.mark.parametrize(
    ("milestones", "said"),
    [
        ((30,), "is at step 30, and the last budget ends at step 24; leave it out"),
        ((24,), "is at step 24, and the last budget ends at step 24; leave it out"),
        ((9, 9), "is at step 9, not behind the one before it; milestones must ascend by a step each"),
        ((0.1,), "is at step 0 of 2.856e+07 FLOPs each; raise it"),
        ((22,), "is at step 22, within the last decay, from step 19 on"),
    ],
)
def test_milestones_that_are_not_on_the_way_are_refused(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], milestones: tuple[float, ...], said: str
) -> None:
    assert main(fit_arguments("arm", prepared, tmp_path, *budget(24, milestones=milestones))) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: budget.milestones: ") and said in error, error
    assert not any(tmp_path.iterdir())


def test_a_milestone_that_a_run_has_passed_is_refused(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    killed = fit_process("arm", prepared, tmp_path, *budget(24), kill_at(17))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert main(fit_arguments("arm", prepared, tmp_path, *budget(24, milestones=(7,)))) == 2
    assert "has passed step 7, where a new milestone would have been" in capsys.readouterr().err


def test_milestones_count_tokens_where_the_budget_does(prepared: Path, tmp_path: Path) -> None:
    words = [
        f"--budget.tokens={24 * 256}",
        f"--budget.milestones=[{10 * 256}]",
        "--trainer.max_steps=-1",
        "--data.random_length_share=0",
        WARMUP,
    ]
    run = fit("arm", prepared, tmp_path, *words)
    assert [(record["steps"], record["tokens"]) for record in records(run)] == [(10, 2560), (24, 6144)]
