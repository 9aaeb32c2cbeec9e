"""The modules of the objectives, the error of a validation loss, and one loss whatever the batch is cut into."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from helpers.tiny_runs import MODELS, fit, fit_command, losses, record
from llada_lightning.data.datasets import document_numbers
from llada_lightning.objectives.batches import TrainingBatch, ValidationBatch, scored_positions
from llada_lightning.objectives.standard_errors import clustered_mean_and_stderr, mean_by_cluster
from llada_lightning.records import read_validation
from llada_lightning.study.collect import gather
from llada_lightning.study.results import covariance_of_means, read_covariance, write_covariance
from llada_lightning.training.language_module import LanguageModule
from llada_lightning.training.modules import ArmModule, LladaModule
from llada_lightning.training.validation import ValidationLoss

WORDS, EOS, MASK, LENGTH = 23, 0, 22, 40
SHAPE = {"n_layers": 2, "d_model": 32, "n_heads": 4, "n_kv_heads": 2, "d_ff": 48}
ENDS = (0, 8, 9, 30, LENGTH)
"""Of the documents: one is EOS alone."""


@pytest.fixture(params=[ArmModule, LladaModule])
def module(request: pytest.FixtureRequest) -> LanguageModule:
    module = request.param(shape=SHAPE, vocab_size=WORDS, mask_token_id=MASK, eos_token_id=EOS)
    module.configure_model()
    return module


def packed() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens_1L = torch.randint(1, MASK, (1, LENGTH), generator=generator)
    tokens_1L[0, torch.tensor(ENDS[1:]) - 1] = EOS
    masked_1L = torch.rand(1, LENGTH, generator=generator) < 0.5
    masked_1L[0, ENDS[1:3]] = True
    return tokens_1L, masked_1L


def batch_of(tokens_BL: Tensor, masked_BL: Tensor, documents_BL: Tensor | None = None) -> TrainingBatch:
    p_B, ordinals_B = torch.full((len(tokens_BL),), 0.5), torch.arange(len(tokens_BL))
    scored = scored_positions(masked_BL)
    return TrainingBatch(tokens_BL, None, masked_BL, p_B, ordinals_B, *scored, float(LENGTH), LENGTH, documents_BL)


def parts(tokens_1L: Tensor, masked_1L: Tensor) -> list[tuple[Tensor, Tensor]]:
    return [(tokens_1L[:, a:b], masked_1L[:, a:b]) for a, b in pairwise(ENDS)]


def test_the_training_loss_of_packed_documents_is_that_of_each_alone(module: LanguageModule) -> None:
    tokens_1L, masked_1L = packed()
    documents_1L = document_numbers(tokens_1L, EOS)
    assert documents_1L[0, [0, 7, 8, 9, 29, 30, 39]].tolist() == [0, 0, 1, 2, 2, 3, 3]
    together = module.training_loss(batch_of(tokens_1L, masked_1L, documents_1L))
    alone = torch.stack([module.training_loss(batch_of(*part)) for part in parts(tokens_1L, masked_1L)]).sum()
    across = module.training_loss(batch_of(tokens_1L, masked_1L))
    assert together.item() == pytest.approx(alone.item(), rel=1e-5)
    assert abs(across.item() - alone.item()) > 1e-3
    found, expected = (torch.autograd.grad(loss, list(module.parameters())) for loss in (together, alone))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_the_exact_likelihood_of_packed_documents_is_the_sum_of_each_alone() -> None:
    module = ArmModule(shape=SHAPE, vocab_size=WORDS, mask_token_id=MASK, eos_token_id=EOS)
    module.configure_model()
    tokens_1L, masked_1L = packed()

    def nll(tokens_BL: Tensor, documents_BL: Tensor | None = None) -> float:
        one = torch.ones(1, dtype=torch.bool)
        batch = ValidationBatch(tokens_BL, masked_1L, one, torch.zeros(1, dtype=torch.long), documents_BL)
        return float(module.sequence_nll(batch).detach())

    alone = sum(nll(tokens_BL) for tokens_BL, _ in parts(tokens_1L, masked_1L))
    assert nll(tokens_1L, document_numbers(tokens_1L, EOS)) == pytest.approx(alone, rel=1e-5)
    assert abs(nll(tokens_1L) - alone) > 1e-3


@given(st.integers(0, 2**32), st.integers(2, 30), st.integers(2, 6))
def test_the_covariances_diagonal_is_the_standard_error_squared(seed: int, sequences: int, documents: int) -> None:
    generator = np.random.default_rng(seed)
    values = torch.from_numpy(generator.normal(3, 1, sequences))
    clusters = torch.from_numpy(generator.integers(0, documents, sequences))
    clusters[:2] = torch.tensor([0, 1])  # at least two documents
    mean, stderr = clustered_mean_and_stderr(values, clusters)
    clusters_G, counts_G, means_G = mean_by_cluster(values, clusters)
    assert clusters_G.tolist() == sorted(set(clusters.tolist()))
    assert counts_G.sum() == sequences
    assert float((means_G * counts_G).sum() / sequences) == pytest.approx(mean, rel=1e-12)
    matrix = covariance_of_means(means_G[:, None].numpy(), counts_G.numpy())
    assert math.sqrt(matrix[0, 0]) == pytest.approx(stderr, rel=1e-9)


def test_the_metric_gives_each_documents_mean() -> None:
    metric = ValidationLoss()
    metric.update(torch.tensor([1.0, 3.0]), torch.tensor([40, 7]))
    metric.update(torch.tensor([5.0]), torch.tensor([7]))
    mean, stderr, by_document = metric.compute()
    assert mean == 3.0
    assert stderr == pytest.approx(math.sqrt(2 * ((2 / 3) ** 2 + (2 / 3) ** 2)))
    assert by_document == [(7, 2, 4.0), (40, 1, 1.0)]


def test_one_document_has_no_standard_error() -> None:
    metric = ValidationLoss()
    metric.update(torch.tensor([1.0, 2.0]), torch.tensor([3, 3]))
    assert metric.compute() == (1.5, pytest.approx(math.nan, nan_ok=True), [(3, 2, 1.5)])


def test_the_joint_error_of_two_fits(prepared: Path, tmp_path: Path) -> None:
    """Both objectives on the same validation set: the diagonal is what each run says of itself."""
    folders = {objective: fit(objective, prepared, tmp_path / objective) for objective in MODELS}
    for folder in folders.values():
        validation, found = read_validation(folder), record(folder)
        assert set(validation["steps"]) == {found["steps"]}
        assert validation["sequences"].sum() == 24
        mean = np.average(validation["nats_per_token"], weights=validation["sequences"])
        assert mean == pytest.approx(found["val_nats_per_token"], rel=1e-12)
    report = write_covariance(gather([tmp_path]).rows(), tmp_path / "results.csv")
    assert (report.rows, report.left_out) == (2, {})
    matrix = read_covariance(report.path or "")
    for folder in folders.values():
        found = record(folder)
        label = f"{found['run']}@{found['steps']}"
        assert matrix.loc[label, label] == pytest.approx(found["val_stderr"] ** 2, rel=1e-9)


def test_the_validation_is_there_before_the_result(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run is done once it has its result: a kill between the two must not leave one without its validation."""
    folder = tmp_path / "test" / "run"

    def killed(*_: object) -> None:
        raise KeyError("killed")

    monkeypatch.setattr("llada_lightning.training.record.write_records", killed)
    with pytest.raises(KeyError, match="killed"):
        fit("arm", prepared, tmp_path, "--trainer.max_steps=2")
    assert set(read_validation(folder)["steps"]) == {2}
    assert not (folder / "result.json").exists()


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


@pytest.mark.slow
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
