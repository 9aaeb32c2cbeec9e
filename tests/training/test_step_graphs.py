"""Steps as graphs, by a stand-in for CUDA's that records operations: the same run as without, to the last bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning import Trainer

from helpers.recorded_operations import RecordedOperations
from helpers.tiny_runs import CALLS, call_at, fit, fit_arguments, losses, metrics, record, weights
from llada_lightning.commands.main import main
from llada_lightning.data.datamodule import TokenDataModule
from llada_lightning.objectives import batches
from llada_lightning.records import read_faults
from llada_lightning.training import step_graphs
from llada_lightning.training.modules import LladaModule

SHORT = ("--trainer.max_steps=12", "--data.val_sequences=6")
WITHOUT = ("--speed.graph=false", "--speed.last_block=scored")
"""No graphs, and the last block as where there are some."""
PADDED = ("--data.random_length_share=0.25",)
OF_THE_MOMENT = ("seconds", "mfu", "peak_memory_bytes")
MOST = 192
"""Scored positions that those of a micro-batch of 8 x 32 are padded to in these tests."""


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[RecordedOperations]:
    """Runs record their steps on the CPU; returns the recordings."""
    made: list[RecordedOperations] = []

    def new() -> RecordedOperations:
        made.append(RecordedOperations())
        return made[-1]

    monkeypatch.setattr("llada_lightning.training.cli.why_not_graphed", lambda *_: None)
    monkeypatch.setattr(step_graphs, "new_graphs", lambda: new)
    return made


def padded_alike(patch: pytest.MonkeyPatch, most: int = MOST) -> None:
    """Every micro-batch has as many scored positions, so that both ways round alike."""
    patch.setattr(TokenDataModule, "most_scored", lambda *_: most)
    patch.setattr(batches, "BUCKET", most)


def assert_same(mine: Path, theirs: Path, steps: int) -> None:
    kept = [key for key in metrics(theirs)[0] if not key.endswith("_per_second") and key not in OF_THE_MOMENT]
    rows = [[{key: row[key] for key in kept} for row in metrics(run)] for run in (mine, theirs)]
    assert rows[0] == rows[1]
    mine_state, their_state = weights(mine, steps), weights(theirs, steps)
    assert all(torch.equal(mine_state[key], their_state[key]) for key in their_state)


@pytest.mark.parametrize(
    ("objective", "words"),
    [
        ("arm", ()),
        ("llada", ("--speed.last_block=whole",)),
        ("llada", ("--trainer.accumulate_grad_batches=2", "--model.shift_targets=true", "--data.workers=1")),
        ("llada", ("--data.document_mask=true", "--model.dropout=0.1", "--trainer.precision=bf16-mixed")),
        (
            "block",
            (
                "--model.block_length=4",
                "--model.loss_weight=per_masked_token",
                "--data.density={name: beta, a: 1, b: 2}",
            ),
        ),
        ("uniform", ("--speed.loss=plain",)),
    ],
)
def test_the_run_is_the_same(
    prepared: Path,
    tmp_path: Path,
    graphs: list[RecordedOperations],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    objective: str,
    words: tuple[str, ...],
) -> None:
    """Sequences of all kinds: padded and whole. Noise, rate, clipping and the sums by noise level are in it."""
    padded_alike(monkeypatch)
    words = (*SHORT, *PADDED, *words)
    plain = fit(objective, prepared, tmp_path / "plain", *WITHOUT, *words)
    assert not graphs
    said = capsys.readouterr().err
    mine = fit(objective, prepared, tmp_path / "graphs", *words)
    assert_same(mine, plain, 12)
    assert 2 <= len(graphs) <= 1 + step_graphs.KINDS and all(graph.operations for graph in graphs)
    now = capsys.readouterr().err
    assert "steps as CUDA graphs" in now and "as CUDA graphs" not in said and "without a graph" not in now
    assert record(mine)["val_nats_per_token"] == record(plain)["val_nats_per_token"]


@pytest.mark.parametrize(
    ("objective", "words"),
    [
        ("arm", ("--data.document_mask=true",)),
        ("llada", ("--trainer.precision=bf16-mixed", "--model.shift_targets=true")),
        ("block", ("--model.block_length=4",)),
        ("uniform", ()),
    ],
)
def test_validations_are_the_same(
    prepared: Path,
    tmp_path: Path,
    graphs: list[RecordedOperations],
    monkeypatch: pytest.MonkeyPatch,
    objective: str,
    words: tuple[str, ...],
) -> None:
    """Six of them, of two batches each: of the fourth batch on their passes are a recording."""
    padded_alike(monkeypatch)
    words = (*SHORT, "--trainer.val_check_interval=2", "--data.val_batch=3", *words)
    plain = fit(objective, prepared, tmp_path / "plain", *WITHOUT, *words)
    replayed: list[int] = []
    end = step_graphs.StepGraphs.end

    def watched(self: step_graphs.StepGraphs) -> None:
        passes = self._module.model.pass_graphs
        assert passes is not None
        replayed.append(passes.replayed)
        end(self)

    monkeypatch.setattr(step_graphs.StepGraphs, "end", watched)
    mine = fit(objective, prepared, tmp_path / "graphs", *words)
    assert replayed[0] >= 8 and all(graph.operations for graph in graphs)
    assert_same(mine, plain, 12)
    keys = ("val_nats_per_token", "val_stderr")
    assert [record(mine)[key] for key in keys] == [record(plain)[key] for key in keys]


def test_a_run_that_breaks_off_goes_on_to_the_same_end(
    prepared: Path, tmp_path: Path, graphs: list[RecordedOperations], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With graphs or without: its checkpoints are those of an ordinary run."""
    padded_alike(monkeypatch)
    plain = fit("llada", prepared, tmp_path / "plain", *WITHOUT, *SHORT)

    def stop() -> None:
        raise InterruptedError

    monkeypatch.setitem(CALLS, "stop", stop)
    monkeypatch.setenv("LLADA_TRUSTED_MODULES", "helpers")
    for root, again in ((tmp_path / "graphs", ()), (tmp_path / "mixed", WITHOUT)):
        with pytest.raises(InterruptedError):
            main(fit_arguments("llada", prepared, root, *SHORT, call_at(8, "stop")))
        mine = fit("llada", prepared, root, *SHORT, *again)
        assert_same(mine, plain, 12)
        states = [torch.load(run / "checkpoints" / "step=00000012.ckpt")["optimizer_states"] for run in (mine, plain)]
        groups = [state[0]["param_groups"] for state in states]
        assert groups[0] == groups[1] and all(type(group["lr"]) is float for group in groups[0])


def test_more_scored_positions_than_there_is_room_for(
    prepared: Path,
    tmp_path: Path,
    graphs: list[RecordedOperations],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Such micro-batches go the ordinary way, are counted and reported; the run is the same to rounding."""
    plain = fit("llada", prepared, tmp_path / "plain", *WITHOUT, *SHORT)
    monkeypatch.setattr(TokenDataModule, "most_scored", lambda *_: 128)
    mine = fit("llada", prepared, tmp_path / "graphs", *SHORT)
    assert losses(mine) == pytest.approx(losses(plain), abs=1e-5)
    note = next(line for line in capsys.readouterr().err.splitlines() if "without a graph" in line)
    count = int(note.split()[1])
    assert 0 < count < 12
    assert note == f"note: {count} of 12 micro-batches ran without a graph: {count} had more than 128 scored positions"


def test_work_that_waits_for_the_device_goes_the_ordinary_way(
    prepared: Path,
    tmp_path: Path,
    graphs: list[RecordedOperations],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def loss(self: LladaModule, batch: Any) -> torch.Tensor:
        found = ordinary(self, batch)
        return found if float(found.detach()) > 0 else found * 2

    ordinary = LladaModule.training_loss
    monkeypatch.setattr(LladaModule, "training_loss", loss)
    mine = fit("llada", prepared, tmp_path / "graphs", *SHORT)
    said = capsys.readouterr().err
    assert "12 of 12 micro-batches ran without a graph: 12 were of a kind that was not recorded; CUDA said: " in said
    plain = fit("llada", prepared, tmp_path / "plain", *WITHOUT, *SHORT)
    assert losses(mine) == losses(plain)


def test_an_update_that_waits_for_the_device_leaves_the_run_without_graphs(
    prepared: Path,
    tmp_path: Path,
    graphs: list[RecordedOperations],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Also where the recording breaks off within the optimizer, whose rates are tensors then."""
    padded_alike(monkeypatch)
    ordinary = torch.optim.AdamW.step

    def step(self: torch.optim.AdamW, closure: Any = None) -> Any:
        done = ordinary(self, closure)
        self.param_groups[0]["params"][0].detach().sum().item()
        return done

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    mine = fit("llada", prepared, tmp_path / "graphs", "--speed.last_block=scored", *SHORT)
    assert "note: speed.graph: CUDA could not record the update (" in capsys.readouterr().err
    [state] = torch.load(mine / "checkpoints" / "step=00000012.ckpt")["optimizer_states"]
    assert all(type(group["lr"]) is float and not group["capturable"] for group in state["param_groups"])
    assert_same(mine, fit("llada", prepared, tmp_path / "plain", *WITHOUT, *SHORT), 12)


def test_more_kinds_than_are_recorded(
    prepared: Path,
    tmp_path: Path,
    graphs: list[RecordedOperations],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    padded_alike(monkeypatch)
    monkeypatch.setattr(step_graphs, "KINDS", 1)
    mine = fit("llada", prepared, tmp_path / "graphs", *SHORT, *PADDED)
    assert len(graphs) == 2 and "were of a kind that was not recorded" in capsys.readouterr().err
    assert_same(mine, fit("llada", prepared, tmp_path / "plain", *WITHOUT, *SHORT, *PADDED), 12)


def test_the_guard_skips_the_same_updates(
    prepared: Path, tmp_path: Path, graphs: list[RecordedOperations], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every loss above the median of the last four is a spike here."""
    padded_alike(monkeypatch)
    monkeypatch.setattr("llada_lightning.training.guard.WINDOW", 4)
    words = (*SHORT, "--guard.spikes=skip", "--guard.spike_zscore=0.1")
    mine = fit("llada", prepared, tmp_path / "graphs", *words)
    plain = fit("llada", prepared, tmp_path / "plain", *WITHOUT, *words)
    assert read_faults(mine) and read_faults(mine) == read_faults(plain)
    assert_same(mine, plain, 12)


def test_what_cannot_be_graphs_is_refused(prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(fit_arguments("llada", prepared, tmp_path, "--speed.graph=true")) == 2
    assert capsys.readouterr().err.strip() == (
        "error: speed.graph: true given, but no CUDA device trains; leave it out"
    )
    assert not (tmp_path / "test").exists()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"density": {"name": "range", "low": 0.05, "high": 0.6}},
        {"time_sampling": "iid"},
        {"block_length": 4},
        {"micro_batch": 1},
    ],
    ids=str,
)
def test_hardly_a_micro_batch_has_more_scored_positions(prepared: Path, settings: dict[str, Any]) -> None:
    """Of 2,000 steps. Few positions are filled up: the ratios of a global batch are spread evenly."""
    settings = dict(settings)
    rows = settings.pop("micro_batch", 16)
    block_length = settings.pop("block_length", None)
    data = TokenDataModule(str(prepared), sequence_length=32, global_batch=16, **settings)
    data.block_length = block_length
    most = data.most_scored(rows, 2_000)
    assert most % batches.BUCKET == 0
    data.trainer = Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
    dataset = data.train_dataloader().dataset
    first_rows = [list(range(step * 16, step * 16 + rows)) for step in range(0, 2_000, 10)]
    counts = [int(dataset.__getitems__(ordinals).scored) for ordinals in first_rows]
    assert np.mean(np.array(counts) > most) <= 0.01
    assert most < np.mean(counts) * 1.3 + batches.BUCKET or settings
