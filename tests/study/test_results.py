"""Records and the results table."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.studies import record, study
from llada_lightning.records import (
    RESULT_COLUMNS,
    expected_records,
    has_diverged,
    is_done,
    read_records,
    read_validation,
    write_records,
    write_validation,
)
from llada_lightning.study.collect import collect
from llada_lightning.study.results import LARGEST_NUMBER, read_results, table_of_records, write_results
from llada_lightning.support import files
from llada_lightning.support.errors import UserError


def sound(name: str = "a", budget: float = 1e12, **other: object) -> dict[str, object]:
    return record("arm", "107k", budget, 4.0, run=name, **other)


def test_records_come_back_as_they_were(tmp_path: Path) -> None:
    records = [sound(budget=1e12), sound(budget=3e12)]
    write_records(tmp_path / "run", records)
    assert read_records(tmp_path / "run") == records
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["result.json"]


def test_no_result_is_no_records(tmp_path: Path) -> None:
    assert read_records(tmp_path) == []
    assert not is_done(tmp_path)


def test_numbers_that_json_lacks_are_written_as_null(tmp_path: Path) -> None:
    write_records(tmp_path, [sound(val_nats_per_token=math.nan, val_stderr=math.inf)])
    assert "NaN" not in (tmp_path / "result.json").read_text()
    assert read_records(tmp_path)[0]["val_nats_per_token"] is None


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_records(tmp_path, [sound()])
    before = (tmp_path / "result.json").read_bytes()

    def full_disk(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(files.os, "replace", full_disk)
    with pytest.raises(OSError, match="no space"):
        write_records(tmp_path, [sound(name="b")])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"result.json": before}


@pytest.mark.parametrize("change", [{"extra": 1}, {"status": ...}])
def test_foreign_and_missing_keys_are_our_fault(tmp_path: Path, change: dict[str, object]) -> None:
    wrong = {key: value for key, value in {**sound(), **change}.items() if value is not ...}
    with pytest.raises(ValueError, match="missing or foreign"):
        write_records(tmp_path, [wrong])


@pytest.mark.parametrize("text", ["{", '{"run": 1}', "[1]", "[{}]", '[{"run": "a", "steps": "1"}]', "[" * 100_000])
def test_a_damaged_result_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "result.json").write_text(text)
    with pytest.raises(UserError, match=r"result\.json"):
        read_records(tmp_path)
    assert not is_done(tmp_path)
    table, report = collect([tmp_path])
    assert table.empty
    assert list(report.unfinished) == [str(tmp_path)]


def test_done_means_every_record(tmp_path: Path) -> None:
    write_records(tmp_path, [sound(), sound(status="running")])
    assert not is_done(tmp_path)
    write_records(tmp_path, [sound(), sound()])
    assert is_done(tmp_path)


def test_done_means_every_budget(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("budget:\n  flops: [1.0e+12, 3.0e+12]\n  tokens: null\n")
    write_records(tmp_path, [sound(budget=1e12)])
    assert expected_records(tmp_path) == 2
    assert not is_done(tmp_path)
    write_records(tmp_path, [sound(budget=1e12), sound(budget=3e12, status="diverged")])
    assert is_done(tmp_path)
    assert has_diverged(tmp_path)


@pytest.mark.parametrize("text", ["budget: {flops: 1.0e+12}", "budget: {flops: [1.0e+12]}", "budget: {flops: []}",
    "budget: {flops: null, tokens: 1e6}", "budget: null", "", "[1]", None])  # fmt: skip
def test_a_config_that_lists_no_budgets_means_one(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "config.yaml").write_text(text)
    assert expected_records(tmp_path) == 1


def test_a_damaged_config_is_named_and_its_run_not_done(tmp_path: Path) -> None:
    write_records(tmp_path, [sound()])
    assert is_done(tmp_path)
    (tmp_path / "config.yaml").write_text("a: [")
    with pytest.raises(UserError, match=r"config\.yaml"):
        expected_records(tmp_path)
    assert not is_done(tmp_path)


# --- the validation by document ---


@given(st.lists(st.floats(allow_nan=True, allow_infinity=False), min_size=1, max_size=4))
def test_validation_comes_back_to_the_last_digit(tmp_path_factory: pytest.TempPathFactory, losses: list[float]) -> None:
    folder = tmp_path_factory.mktemp("validation")
    documents = [(100 * n, n + 1, loss) for n, loss in enumerate(losses)]
    write_validation(folder, 7, documents)
    again = read_validation(folder)
    expected = pd.DataFrame([(7, *row) for row in documents], columns=list(again.columns))
    pd.testing.assert_frame_equal(again, expected, check_exact=True)
    assert [path.name for path in folder.iterdir()] == ["validation.csv"]


def test_validations_of_several_budgets_share_the_file(tmp_path: Path) -> None:
    write_validation(tmp_path, 20, [(0, 1, 2.0), (9, 2, 3.0)])
    write_validation(tmp_path, 10, [(0, 1, 4.0), (9, 2, 5.0)])
    write_validation(tmp_path, 20, [(0, 1, 2.5), (9, 2, 3.5)])
    found = read_validation(tmp_path)
    assert list(found["steps"]) == [10, 10, 20, 20]
    assert list(found["nats_per_token"]) == [4.0, 5.0, 2.5, 3.5]


@pytest.mark.parametrize("text", ["", "steps,document\n1,2\n", "steps,document,sequences,nats_per_token\n1,x,2,3\n"])
def test_a_damaged_validation_is_named_and_overwritten(tmp_path: Path, text: str) -> None:
    (tmp_path / "validation.csv").write_text(text)
    with pytest.raises(UserError, match=r"validation\.csv"):
        read_validation(tmp_path)
    write_validation(tmp_path, 1, [(0, 1, 2.0)])
    assert len(read_validation(tmp_path)) == 1
    with pytest.raises(UserError, match="cannot be read"):
        read_validation(tmp_path / "none")


# --- table ---


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


def test_records_and_tables_from_before_the_variant_are_read_and_written_again(tmp_path: Path) -> None:
    """They count as the default recipe of their objective."""
    old = {key: value for key, value in record("llada", "107k", 1e12, 4.0).items() if key != "variant"}
    write_records(tmp_path, [old])
    assert read_records(tmp_path) == [{**old, "variant": None}]
    path = tmp_path / "results.csv"
    study().drop(columns="variant").to_csv(path, index=False)
    table = read_results(path)
    assert list(table.columns) == list(RESULT_COLUMNS) and table["variant"].isna().all()
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
        (lambda lines: [lines[0], "x," + lines[1], *lines[2:]], r"line 2: 38 cells under 37 columns"),
        (lambda lines: [*lines[:3], lines[3] + ",", *lines[4:]], r"line 4: 38 cells under 37 columns"),
        (lambda lines: [*lines[:-1], lines[-1][:40]], r"line 13: \d+ cells under 37 columns"),
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
