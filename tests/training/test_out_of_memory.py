"""Memory runs out: one line says which micro-batch fits, found by trying, and the run goes on with it."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.tiny_runs import fit, fit_arguments, losses, metrics
from llada_lightning.commands.main import main
from llada_lightning.model import Transformer
from llada_lightning.objectives.batches import BUCKET, TrainingBatch, ValidationBatch
from llada_lightning.training.callbacks.leaving import is_out_of_memory, worst_case

CPU = "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"


class Small:
    """A device with room for a number of sequences: beyond, the Transformer's hidden states are refused."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, room: int, error: Exception, training: bool = True) -> None:
        self.tried: list[int] = []
        hidden = Transformer.hidden

        def refusing(model: Transformer, tokens_BL: torch.Tensor, **keywords: Any) -> torch.Tensor:
            if torch.is_grad_enabled() == training:
                self.tried.append(len(tokens_BL))
                if len(tokens_BL) > room:
                    raise error
            return hidden(model, tokens_BL, **keywords)

        monkeypatch.setattr(Transformer, "hidden", refusing)


@pytest.mark.parametrize(
    ("objective", "error"), [("arm", torch.OutOfMemoryError("CUDA out of memory.")), ("llada", MemoryError())]
)
def test_the_line_names_what_fits_and_the_run_goes_on_with_it(
    prepared: Path,
    tmp_path: Path,
    objective: str,
    error: Exception,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    accumulated = "--trainer.accumulate_grad_batches=1"
    arguments = fit_arguments(objective, prepared, tmp_path, "--trainer.max_steps=3", accumulated)
    with monkeypatch.context() as small:
        device = Small(small, 2, error)
        assert main(arguments) == 2
    assert device.tried == [8, 4, 2]
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("error: data.micro_batch: 8 sequences of 32 tokens do not fit in memory")
    tried = "as tried" + " with every token masked" * (objective == "llada")
    assert line.endswith(
        f"2 fit, {tried}: give --data.micro_batch 2 --trainer.accumulate_grad_batches 4, and the run resumes from its "
        "last checkpoint"
    )
    with monkeypatch.context() as small:
        Small(small, 2, error)
        corrected = ["--data.micro_batch", "2", "--trainer.accumulate_grad_batches", "4", "--data.val_batch", "2"]
        assert main([*arguments, *corrected]) == 0
    assert len(losses(tmp_path / "test" / "run")) == 3


def test_memory_that_runs_out_late_leaves_the_checkpoints(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = fit("arm", prepared, tmp_path / "whole", "--trainer.max_steps=12")
    arguments = fit_arguments("arm", prepared, tmp_path, "--trainer.max_steps=12")
    device = Small(monkeypatch, 8, torch.OutOfMemoryError("CUDA out of memory."))
    monkeypatch.setattr(device, "tried", Countdown(8))
    assert main(arguments) == 2
    assert "give --data.micro_batch 4" in capsys.readouterr().err
    folder = tmp_path / "test" / "run"
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step=00000005.ckpt"]
    monkeypatch.undo()
    assert main(arguments) == 0
    assert losses(folder) == losses(whole)
    assert [row["step"] for row in metrics(folder)] == [row["step"] for row in metrics(whole)]


class Countdown(list[int]):
    """Raises once, at the n-th forward pass."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def append(self, size: int) -> None:
        super().append(size)
        if len(self) == self.number:
            raise torch.OutOfMemoryError("CUDA out of memory.")


def test_a_validation_batch_without_room(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Small(monkeypatch, 3, RuntimeError(CPU), training=False)
    assert main(fit_arguments("llada", prepared, tmp_path, "--trainer.max_steps=2", "--data.val_batch=6")) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("error: data.val_batch: 6 sequences of 32 tokens do not fit in memory")
    assert line.endswith("3 fit, as tried with every token masked: give --data.val_batch 3")


def test_where_not_even_one_fits(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Small(monkeypatch, 0, RuntimeError(CPU))
    assert main(fit_arguments("arm", prepared, tmp_path, "--trainer.max_steps=2")) == 2
    assert "nor does one; use --trainer.strategy=fsdp2" in capsys.readouterr().err


def test_another_error_of_a_step_stays_what_it_is(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Small(monkeypatch, 2, RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        main(fit_arguments("arm", prepared, tmp_path, "--trainer.max_steps=2"))


def test_what_the_allocator_says_is_known() -> None:
    """A real refusal: more than the address space that this process may have."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (1 << 28), before[1]))
    try:
        with pytest.raises(RuntimeError) as refused:
            torch.empty(1 << 32, dtype=torch.uint8)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert is_out_of_memory(refused.value)
    assert not is_out_of_memory(RuntimeError("expected scalar type"))


def test_the_trial_batch_is_the_worst_of_its_size() -> None:
    tokens, masked = torch.arange(12).view(4, 3), torch.zeros(4, 3, dtype=torch.bool)
    nothing = torch.zeros(0, dtype=torch.int64)
    training = TrainingBatch(tokens, None, masked, torch.rand(4), torch.arange(4), nothing, 0, 3.0, 12)
    validation = ValidationBatch(tokens, masked, torch.ones(4, dtype=torch.bool), torch.arange(4))
    for batch in (worst_case(training, 2), worst_case(validation, 2)):
        assert batch.tokens_BL.tolist() == tokens[:2].tolist()
        assert batch.masked_BL.shape == (2, 3) and batch.masked_BL.all()
    worst = worst_case(training, 2)
    assert worst.scored == 6 and worst.scored_M[:6].tolist() == [0, 1, 2, 3, 4, 5] and len(worst.scored_M) == BUCKET
