"""The results table, and the covariance of its losses: what is in them, and what is said of wrong ones."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.studies import record, sound, study
from llada_lightning.records import (
    LATER_COLUMNS,
    RESULT_COLUMNS,
    read_records,
    read_validation,
    write_records,
    write_validation,
)
from llada_lightning.study import results
from llada_lightning.study.results import (
    LARGEST_NUMBER,
    Row,
    covariance_of_means,
    read_covariance,
    read_results,
    table_of_records,
    write_covariance,
    write_results,
)
from llada_lightning.support.errors import UserError


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_table_comes_back_as_it_was(tmp_path: Path, suffix: str) -> None:
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    table = study()
    path = write_results(table, tmp_path / f"results{suffix}")
    again = read_results(path)
    pd.testing.assert_frame_equal(again, table)
    assert again["tokens"].dtype == "Int64"
    assert again["lr"].dtype == "float64"
    assert again["shape"].dtype == "string"
    assert json.loads(again["versions"][0]) == {"python": "3.11.7", "torch": "2.13.0"}
    assert ": " not in again["versions"][0]


def test_names_that_look_like_numbers_stay_names(tmp_path: Path) -> None:
    table = table_of_records([sound("0012", git_commit="1e5", tokenizer="NA", seed=2**63 - 1)])
    again = read_results(write_results(table, tmp_path / "r.csv"))
    assert list(again.loc[0, ["run", "git_commit", "tokenizer", "seed"]]) == ["0012", "1e5", "NA", 2**63 - 1]


@settings(deadline=None)
@given(loss=st.floats(-LARGEST_NUMBER, LARGEST_NUMBER), seed=st.integers(0, 2**62))
def test_csv_keeps_every_digit(tmp_path_factory: pytest.TempPathFactory, loss: float, seed: int) -> None:
    path = tmp_path_factory.getbasetemp() / "digits.csv"
    write_results(table_of_records([sound(val_nats_per_token=loss, seed=seed)]), path)
    assert list(read_results(path).loc[0, ["val_nats_per_token", "seed"]]) == [loss, seed]


def test_records_and_tables_from_before_later_columns_are_read_and_written_again(tmp_path: Path) -> None:
    """They count as the default recipe of their objective."""
    old = {key: value for key, value in record("llada", "107k", 1e12, 4.0).items() if key not in LATER_COLUMNS}
    write_records(tmp_path, [old])
    assert read_records(tmp_path) == [{**old, **dict.fromkeys(LATER_COLUMNS)}]
    path = tmp_path / "results.csv"
    study().drop(columns=list(LATER_COLUMNS)).to_csv(path, index=False)
    table = read_results(path)
    assert list(table.columns) == list(RESULT_COLUMNS) and table[list(LATER_COLUMNS)].isna().all(axis=None)
    pd.testing.assert_frame_equal(table, study())


def test_further_columns_are_kept(tmp_path: Path) -> None:
    path = write_results(study().assign(mmlu=0.25), tmp_path / "r.csv")
    assert list(read_results(path).columns) == [*RESULT_COLUMNS, "mmlu"]


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_every_type_comes_back_with_missing_values(tmp_path: Path, suffix: str) -> None:
    """Text, whole numbers beyond 2^53, numbers and nested versions; beside them a row where all may be missing is."""
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    bare = {"run": "bare", "objective": "arm", "val_nats_per_token": math.nan, "mfu": math.inf}
    full = {**sound(seed=2**62 + 1, mfu=0.1 + 0.2, parent_checkpoint="0" * 64), "shape": "1e5"}
    table = table_of_records([full, bare])
    again = read_results(write_results(table, tmp_path / f"r{suffix}"))
    pd.testing.assert_frame_equal(again, table, check_exact=True)
    assert again.loc[0, "seed"] == 2**62 + 1
    assert again.loc[1, "seed"] is pd.NA
    assert again.loc[1, "mfu"] == math.inf


def test_without_pyarrow_one_line_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for action in (
        lambda: write_results(study(), tmp_path / "r.parquet"),
        lambda: read_results(tmp_path / "r.parquet"),
    ):
        (tmp_path / "r.parquet").touch()
        with pytest.raises(UserError, match=r"parquet needs pyarrow; pip install pyarrow, or use a \.csv name"):
            action()


def test_a_table_without_rows_is_named(tmp_path: Path) -> None:
    path = write_results(study().iloc[:0], tmp_path / "r.csv")
    with pytest.raises(UserError, match="a table without rows"):
        read_results(path)


def test_missing_columns_are_named(tmp_path: Path) -> None:
    path = write_results(study().drop(columns=["tokens", "val_kind"]), tmp_path / "r.csv")
    with pytest.raises(UserError, match="columns missing: tokens, val_kind"):
        read_results(path)


def test_a_plan_is_called_a_plan(tmp_path: Path) -> None:
    path = tmp_path / "plan.csv"
    path.write_text("objective,shape,budget,tokens,seed,trunk\narm,107k,1e12,1000,0,arm-107k-s0\n", encoding="utf-8")
    with pytest.raises(UserError, match="this is a plan, not results; run it with `llada sweep run`"):
        read_results(path)


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
@pytest.mark.parametrize(
    ("column", "value", "words"),
    [
        ("lr", "fast", "'fast', which is not a number"),
        ("steps", "1.5", "'1.5', which is not a whole number"),
        ("steps", "--5", "'--5', which is not a number"),
        ("seed", "9" * 400, "which takes more than 64 bits"),
        ("seed", "9" * 5_000, "which takes more than 64 bits"),
        ("seed", "1e30", "'1e30', which takes more than 64 bits"),
        ("flops_6nd", "9" * 400, "the largest number is 1e+100"),
        ("flops_6nd", "-" + "9" * 5_000, "the largest number is 1e+100"),
        ("val_stderr", "1e300", "'1e300'; the largest number is 1e+100"),
        ("val_nats_per_token", "-1e101", "'-1e101'; the largest number is 1e+100"),
        ("run", "a\0b", "which is not text"),
    ],
)
def test_wrong_values_are_named_with_their_line(
    tmp_path: Path, column: str, value: str, words: str, suffix: str
) -> None:
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    table = study().astype("string").astype(object)
    table.loc[2, column] = value
    path = write_results(table, tmp_path / f"r{suffix}")
    with pytest.raises(UserError) as raised:
        read_results(path)
    place = "line 4" if suffix == ".csv" else "row 3"
    assert f"r{suffix}', {place}: column {column} holds " in str(raised.value) and words in str(raised.value)
    assert len(str(raised.value)) < 400 and len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda lines: [lines[0], "x," + lines[1], *lines[2:]], r"line 2: 42 cells under 41 columns"),
        (lambda lines: [*lines[:3], lines[3] + ",", *lines[4:]], r"line 4: 42 cells under 41 columns"),
        (lambda lines: [*lines[:-1], lines[-1][:40]], r"line 13: \d+ cells under 41 columns"),
        (lambda lines: [lines[0], '"' + lines[1]], r"line \d+: not CSV"),
        (lambda lines: [f"{lines[0]},run", *(f"{line},x" for line in lines[1:])], "there twice: run"),
        (lambda lines: [*lines, "x" * 200_000], "line 14: not CSV"),
    ],
)
def test_rows_that_are_cut_short_or_too_long_are_named_with_their_line(
    tmp_path: Path, change: Callable[[list[str]], list[str]], words: str
) -> None:
    path = write_results(study(), tmp_path / "r.csv")
    path.write_text("\n".join(change(path.read_text().splitlines())))
    with pytest.raises(UserError, match=words) as raised:
        read_results(path)
    assert len(str(raised.value).splitlines()) == 1


def test_a_table_that_an_office_program_saved_is_read(tmp_path: Path) -> None:
    path = write_results(study(), tmp_path / "r.csv")
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n") + b"\r\n")
    pd.testing.assert_frame_equal(read_results(path), study())


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
@pytest.mark.parametrize("stem", ["n" * 260, "a\0b"])
def test_names_that_no_file_can_have_are_one_line(tmp_path: Path, stem: str, suffix: str) -> None:
    for action in (lambda path: write_results(study(), path), read_results):
        with pytest.raises(UserError) as raised:
            action(tmp_path / f"{stem}{suffix}")
        assert "\0" not in str(raised.value) and len(str(raised.value)) < 400


def test_what_is_no_file_is_not_read_as_a_table(tmp_path: Path) -> None:
    for suffix in (".csv", ".parquet"):
        os.mkfifo(tmp_path / f"pipe{suffix}")
        (tmp_path / f"folder{suffix}").mkdir()
        for name in ("pipe", "folder"):
            with pytest.raises(UserError, match=r"regular file|cannot be read"):
                read_results(tmp_path / f"{name}{suffix}")


def test_wrong_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty.csv").touch()
    (tmp_path / "text.parquet").write_text("no parquet")
    for name, words in [
        ("none.csv", "no such file"), ("r.txt", r"\.csv or \.parquet"), ("empty.csv", "not a CSV"),
        ("text.parquet", "parquet"),
    ]:  # fmt: skip
        with pytest.raises(UserError, match=words):
            read_results(tmp_path / name)


@pytest.mark.parametrize(("separator", "shown"), [(";", "';'"), ("\t", r"'\\t'")])
def test_another_separator_is_named(tmp_path: Path, separator: str, shown: str) -> None:
    path = tmp_path / "results.csv"
    path.write_text(f"{separator.join(RESULT_COLUMNS)}\n{separator.join(['1,5'] * len(RESULT_COLUMNS))}\n")
    with pytest.raises(UserError, match=f"its columns are separated by {shown}, as some spreadsheets write them"):
        read_results(path)


# --- the covariance of losses -----------------------------------------------------------------------------------------


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
