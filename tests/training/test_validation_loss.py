"""The validation loss as a metric, and the validation file of a fit."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.tiny_runs import MODELS, fit, record
from llada_lightning.objectives.standard_errors import clustered_mean_and_stderr, mean_by_cluster
from llada_lightning.records import read_validation
from llada_lightning.study.collect import gather
from llada_lightning.study.results import covariance_of_means, read_covariance, write_covariance
from llada_lightning.training import fit as lightning_cli
from llada_lightning.training.modules import ValidationLoss


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

    monkeypatch.setattr(lightning_cli, "write_records", killed)
    with pytest.raises(KeyError, match="killed"):
        fit("arm", prepared, tmp_path, "--trainer.max_steps=2")
    assert set(read_validation(folder)["steps"]) == {2}
    assert not (folder / "result.json").exists()
