"""The covariance of losses: what is in it, and what it says of differences."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.studies import record
from llada_lightning.records import read_validation, write_validation
from llada_lightning.study import results
from llada_lightning.study.results import Row, covariance_of_means, read_covariance, write_covariance
from llada_lightning.support.errors import UserError


def row(folder: Path | None, name: str, losses: list[float], sequences: list[int] | None = None, **other: Any) -> Row:
    """A result of 10 steps, with its validation file in ``folder/name``."""
    if folder is not None:
        counts = sequences or [1] * len(losses)
        write_validation(
            folder / name, 10, [(50 * n, *pair) for n, pair in enumerate(zip(counts, losses, strict=True))]
        )
    values = {"run": name, "steps": 10, **other}
    return Row(record("arm", "107k", 1e12, 4.0, **values), folder and folder / name)


@given(st.integers(0, 2**32), st.integers(2, 9), st.integers(1, 4))
def test_the_covariance_is_that_of_the_paired_differences(seed: int, groups: int, runs: int) -> None:
    """Law: the variance of i's loss minus j's is that of the mean of the differences, taken as one run's values."""
    generator = np.random.default_rng(seed)
    values_GR, sequences_G = generator.normal(3, 1, (groups, runs)), generator.integers(1, 5, groups)
    matrix = covariance_of_means(values_GR, sequences_G)
    assert matrix == pytest.approx(matrix.T)
    assert np.linalg.eigvalsh(matrix).min() > -1e-12
    difference = covariance_of_means(values_GR[:, :1] - values_GR[:, -1:], sequences_G)[0, 0]
    assert matrix[0, 0] + matrix[-1, -1] - 2 * matrix[0, -1] == pytest.approx(difference, abs=1e-12)


def test_one_sequence_a_document_is_the_plain_standard_error() -> None:
    values_GR = np.array([[1.0], [2.0], [6.0]])
    assert covariance_of_means(values_GR, np.ones(3))[0, 0] == pytest.approx(values_GR.var(ddof=1) / 3)


def test_shared_documents_make_a_difference_sure(tmp_path: Path) -> None:
    hard = np.random.default_rng(0).normal(0, 1, 40)
    rows = [row(tmp_path, name, list(3 + shift + hard)) for name, shift in (("a", 0.0), ("b", 0.1))]
    report = write_covariance(rows, tmp_path / "results.csv")
    assert (report.rows, report.left_out) == (2, {})
    matrix = read_covariance(report.path or "")
    assert list(matrix.index) == list(matrix.columns) == ["a@10", "b@10"]
    of_difference = matrix.loc["a@10", "a@10"] + matrix.loc["b@10", "b@10"] - 2 * matrix.loc["a@10", "b@10"]
    assert math.sqrt(matrix.loc["a@10", "a@10"]) == pytest.approx(hard.std(ddof=1) / math.sqrt(40))
    assert of_difference == pytest.approx(0, abs=1e-15)


def test_what_cannot_be_compared_is_named(tmp_path: Path) -> None:
    losses = [1.0, 2.0, 4.0]
    rows = [
        row(tmp_path, "a", losses),
        row(tmp_path, "b", losses),
        row(tmp_path, "other-documents", [*losses, 5.0]),
        row(tmp_path, "other-counts", losses, [1, 1, 2]),
        row(tmp_path, "other-data", losses, data_fingerprint="another"),
        row(tmp_path, "diverged", losses, val_nats_per_token=None),
        row(tmp_path, "alone", [1.0]),
        row(tmp_path, "old", losses, steps=20),
        row(None, "remote", losses),
        row(None, "nameless", losses, run=None),
        Row(record("arm", "107k", 1e12, 4.0, run="bare", steps=1), tmp_path / "bare"),
        row(tmp_path, "torn", losses),
    ]
    (tmp_path / "torn/validation.csv").write_text("steps\n")
    report = write_covariance(rows, tmp_path / "results.parquet")
    assert report.path == str(tmp_path / "results.covariance.csv")
    assert list(read_covariance(report.path)) == ["a@10", "b@10"]
    torn = report.left_out.pop(next(reason for reason in report.left_out if "torn/validation.csv" in reason))
    assert torn == ["torn@10"]
    assert report.left_out == {
        "other validation documents than most": ["other-counts@10", "other-data@10", "other-documents@10"],
        "loss not finite": ["diverged@10"],
        "fewer than two validation documents": ["alone@10"],
        "not in validation.csv": ["old@20"],
        "from W&B, which does not hold the losses by document": ["remote@10"],
        "a record without a run's name": ["None@10"],
        "no validation.csv": ["bare@1"],
    }
    assert "covariance: 1 results left out (no validation.csv): bare@1" in report.lines()


def test_another_tables_covariance_does_not_stay(tmp_path: Path) -> None:
    write_covariance([row(tmp_path, "a", [1.0, 2.0])], tmp_path / "results.csv")
    report = write_covariance([row(None, "b", [])], tmp_path / "results.csv")
    assert report.path is None
    assert not (tmp_path / "results.covariance.csv").exists()


def test_more_runs_than_documents_are_written_as_their_deviations(tmp_path: Path) -> None:
    """The file grows with the runs, not with their square, and the matrix is the same to the last bit."""
    generator = np.random.default_rng(3)
    values_GR = generator.normal(3, 1, (5, 40))
    sequences_G = [1, 2, 3, 1, 4]
    names = [f"r{n:02d}" for n in range(40)]
    rows = [row(tmp_path, name, list(values), sequences_G) for name, values in zip(names, values_GR.T, strict=True)]
    report = write_covariance(rows, tmp_path / "results.csv")
    assert report.path == str(tmp_path / "results.covariance.csv") and report.rows == 40
    header, *lines = Path(report.path).read_text().splitlines()
    assert header == "run@steps,document 0,document 50,document 100,document 150,document 200"
    assert len(lines) == 40 and all(line.count(",") == 5 for line in lines)
    matrix = read_covariance(report.path)
    assert list(matrix.index) == list(matrix.columns) == [f"{name}@10" for name in names]
    assert (matrix.to_numpy() == covariance_of_means(values_GR, np.asarray(sequences_G))).all()
    few = read_covariance(write_covariance(rows[:5], tmp_path / "few.csv").path or "")
    assert (tmp_path / "few.covariance.csv").read_text().startswith("run@steps,r00@10,")
    assert few.to_numpy() == pytest.approx(matrix.to_numpy()[:5, :5])


def test_a_document_without_a_loss_costs_its_run_alone(tmp_path: Path) -> None:
    rows = [
        row(tmp_path, "a", [1.0, 2.0]), row(tmp_path, "b", [1.0, 3.0]), row(tmp_path, "blank", [1.0, math.nan]),
        row(tmp_path, "large", [1.0, 1e300]), row(tmp_path, "none", [1.0, 2.0], [1, 0]),
    ]  # fmt: skip
    report = write_covariance(rows, tmp_path / "results.csv")
    reason = "a document without sequences, or without a finite loss, in validation.csv"
    assert report.left_out == {reason: ["blank@10", "large@10", "none@10"]}
    assert np.isfinite(read_covariance(report.path or "").to_numpy()).all()


def test_a_runs_budgets_are_read_from_its_file_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for steps in range(1, 6):
        write_validation(tmp_path / "trunk", steps, [(0, 1, 2.0), (9, 2, 3.0 + steps)])
    rows = [Row(record("arm", "107k", 1e12, 4.0, run="trunk", steps=n), tmp_path / "trunk") for n in range(1, 6)]
    reads: list[Path] = []
    monkeypatch.setattr(results, "read_validation", lambda folder: reads.append(folder) or read_validation(folder))
    assert write_covariance(rows, tmp_path / "results.csv").rows == 5
    assert reads == [tmp_path / "trunk"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("run@steps,document 0,document 1\na@1,2,\xff\n", "not UTF-8"),
        ("run@steps,document 0,document 1\na@1,2,x\n", "not a table of numbers"),
        ("run@steps,document 0\na@1,2\n", "not of the same runs"),
        ("run@steps,a@1\nb@1,2\n", "not of the same runs"),
        ("run@steps,a@1\na@1,x\n", "not a table of numbers"),
        ("", "not a table"),
    ],
)
def test_wrong_covariance_files_are_named(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "c.csv").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=words):
        read_covariance(tmp_path / "c.csv")
    with pytest.raises(UserError, match="cannot be read"):
        read_covariance(tmp_path / "none.csv")
