"""Ranks, accumulation, micro-batch and workers change nothing but rounding."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.tiny_runs import fit, fit_command, losses, record
from llada_lightning.records import read_validation


@pytest.fixture(scope="module", params=[pytest.param("arm", marks=pytest.mark.slow), "llada"])
def reference(request: pytest.FixtureRequest, prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One rank, the global batch at once."""
    return fit(request.param, prepared, tmp_path_factory.mktemp("reference"))


def objective(reference: Path) -> str:
    return str(record(reference)["objective"])


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow), 2])
def test_accumulation_and_workers_give_the_same_curve(
    reference: Path, prepared: Path, tmp_path: Path, workers: int
) -> None:
    split = ("--trainer.accumulate_grad_batches=2", "--data.micro_batch=4", f"--data.workers={workers}")
    folder = fit(objective(reference), prepared, tmp_path, *split)
    assert losses(folder) == pytest.approx(losses(reference), abs=1e-5)
    assert record(folder)["tokens"] == record(reference)["tokens"]
    assert record(folder)["val_nats_per_token"] == pytest.approx(record(reference)["val_nats_per_token"], abs=1e-5)


def test_two_ranks_give_the_same_curve(reference: Path, prepared: Path, tmp_path: Path) -> None:
    ranks = ("--trainer.devices=2", "--trainer.strategy=ddp", "--data.val_batch=5")
    done = fit_command(objective(reference), prepared, tmp_path, *ranks)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "test" / "run"
    assert losses(folder) == pytest.approx(losses(reference), abs=1e-5)
    for key, tolerance in {"val_nats_per_token": 1e-5, "val_stderr": 1e-5, "tokens": 0, "flops_total": 0}.items():
        assert record(folder)[key] == pytest.approx(record(reference)[key], abs=tolerance)
    mine, theirs = read_validation(folder), read_validation(reference)
    whole = ["steps", "document", "sequences"]
    assert mine[whole].equals(theirs[whole])
    assert list(mine["nats_per_token"]) == pytest.approx(list(theirs["nats_per_token"]), abs=1e-5)
