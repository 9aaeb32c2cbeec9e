"""A step of a run, made again in memory, is the step that the run made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from helpers.tiny_runs import fit, metrics
from llada_lightning.commands.main import main

Captured = pytest.CaptureFixture[str]


def replayed(folder: Path, step: int, capsys: Captured, *settings: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["replay", str(folder), "--step", str(step), "--json", *settings]) == 0
    return json.loads(capsys.readouterr().out)


def files(folder: Path) -> dict[Path, tuple[int, int]]:
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")}


@pytest.mark.parametrize(("objective", "accumulation"), [("arm", 1), ("llada", 2), ("block", 1), ("uniform", 2)])
def test_a_replayed_step_is_the_runs_to_the_last_digit(
    prepared: Path, tmp_path: Path, objective: str, accumulation: int, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = fit(objective, prepared, tmp_path, f"--trainer.accumulate_grad_batches={accumulation}")
    before, rows = files(tmp_path), metrics(folder)
    monkeypatch.chdir(tmp_path)
    for step in (3, 23):  # from the beginning, and from the checkpoint of step 20
        found = replayed(folder, step, capsys)
        assert found["loss"] == float(rows[step - 1]["train_nats_per_token"]) == found["seen_loss"]
        assert found["grad_norm"] == float(rows[step - 1]["grad_norm"]) == found["seen_grad_norm"]
        assert found["lr"] == float(rows[step - 1]["lr"])
        assert not found["skipped"]
        sequences = found["sequences"]
        assert [one["ordinal"] for one in sequences] == list(range(8 * (step - 1), 8 * step))
        assert sum(one["loss"] for one in sequences) == pytest.approx(found["loss"], rel=1e-5)
        assert all(one["finite"] and one["source"] == str(prepared) for one in sequences)
        for one in sequences:
            assert 1 <= one["length"] <= 32
            if objective != "arm":
                assert 0 <= one["masked"] <= one["length"] and one["p"] == pytest.approx(0.999 * one["t"] + 0.001)
            else:
                assert one["masked"] is one["p"] is one["t"] is None
    assert any("plus" in one["text"] for one in sequences)
    assert files(tmp_path) == before


def test_a_bad_sequence_is_found_and_a_skipped_update_skipped_again(
    prepared: Path, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sequence 43 gives NaN whenever it is read: its step is skipped, and the steps after it are those of the run."""
    from llada_lightning.data.datasets import TrainingDataset

    made = TrainingDataset.__getitems__

    def damaged(self: TrainingDataset, ordinals: list[int]) -> Any:
        batch = made(self, ordinals)
        batch.p_B[batch.ordinals_B == 43] = float("nan")
        return batch

    monkeypatch.setattr(TrainingDataset, "__getitems__", damaged)
    folder = fit("llada", prepared, tmp_path, "--trainer.max_steps=8")
    found = replayed(folder, 6, capsys)
    assert found["skipped"] and found["loss"] is None and found["seen_loss"] is None  # JSON has no NaN
    assert [one["ordinal"] for one in found["sequences"] if not one["finite"]] == [43]
    assert replayed(folder, 8, capsys)["loss"] == float(metrics(folder)[7]["train_nats_per_token"])
    assert main(["replay", str(folder), "--step", "6"]) == 0
    table = capsys.readouterr().out
    assert "loss nan" in table and "update skipped" in table and table.count("not finite") == 1


def test_a_step_of_a_branch_starts_from_its_trunk(prepared: Path, tmp_path: Path, capsys: Captured) -> None:
    budgets = ("--budget.flops=[3.7748736e+08, 7.5497472e+08]", "--trainer.max_steps=-1")
    folder = fit("arm", prepared, tmp_path, *budgets, "--run.checkpoint_every_steps=100")
    for place in (folder, max((folder / "branches").iterdir(), key=lambda branch: int(branch.name))):
        row = metrics(place)[-2]
        assert replayed(place, int(row["step"]), capsys)["loss"] == float(row["train_nats_per_token"])


def test_what_cannot_be_replayed_is_refused(prepared: Path, tmp_path: Path, capsys: Captured) -> None:
    folder = fit("arm", prepared, tmp_path, "--trainer.max_steps=4")
    (tmp_path / "empty").mkdir()
    for words, said in {
        (str(tmp_path / "empty"), "--step=1"): "has no config.yaml; give the folder of a run",
        (str(folder), "--step=5"): "--step 5 given, but",
        (str(folder), "--step=0"): "has steps 1-4",
        (str(folder), "--step=x"): "step: x given; expected int",
        (str(folder), "--step=2", "--", "--data.global_batch=4"): "data.global_batch was 8, is 4",
    }.items():
        capsys.readouterr()
        assert main(["replay", *words]) == 2, words
        error = capsys.readouterr().err.splitlines()
        assert error[-1].startswith("error: ") and said in error[-1]
