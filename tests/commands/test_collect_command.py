"""``llada collect``, called as the command calls it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from helpers.studies import record
from llada_lightning.commands.collect import main as collect
from llada_lightning.records import write_records, write_validation
from llada_lightning.study.results import read_covariance, read_results
from llada_lightning.support.errors import UserError

Captured = pytest.CaptureFixture[str]


def test_collect_writes_the_table_and_names_what_is_not_sound(tmp_path: Path, capsys: Captured) -> None:
    write_records(tmp_path / "runs/a", [record("arm", "107k", 1e12, 4.0)])
    (tmp_path / "runs/b").mkdir()
    (tmp_path / "runs/b/config.yaml").touch()
    out = tmp_path / "results.csv"
    assert collect([str(tmp_path / "runs"), "--out", str(out)]) == 0
    assert len(read_results(out)) == 1
    captured = capsys.readouterr()
    assert "1 results of 2 run folders" in captured.out
    assert captured.err.splitlines() == [
        f"unfinished: {tmp_path}/runs/b (no result.json)",
        "covariance: 1 results left out (no validation.csv): arm-107k-1e+12@762",
    ]
    assert not (tmp_path / "results.covariance.csv").exists()


def test_collect_writes_the_joint_errors_beside_the_table(tmp_path: Path, capsys: Captured) -> None:
    for number, name in enumerate("ab"):
        found = record("arm", "107k", 1e12, 4.0, run=name, steps=5)
        write_validation(tmp_path / name, 5, [(0, 2, 3.0), (7, 1, 6.0 + number)])
        write_records(tmp_path / name, [found])
    out = tmp_path / "results.parquet"
    pytest.importorskip("pyarrow")
    assert collect([str(tmp_path), "--out", str(out), "--json"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    written = json.loads(captured.out)["covariance"]
    assert written == {"path": str(tmp_path / "results.covariance.csv"), "rows": 2, "left_out": {}}
    assert list(read_covariance(written["path"]).index) == ["a@5", "b@5"]
    assert len(read_results(out)) == 2


def test_collect_as_json(tmp_path: Path, capsys: Captured) -> None:
    for name in "ab":
        write_records(tmp_path / name, [record("arm", "107k", 1e12, 4.0)])
    assert collect([str(tmp_path), "--out", str(tmp_path / "r.csv"), "--json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    written = json.loads(line)
    assert (written["folders"], written["records"]) == (2, 1)
    assert written["duplicates"][0]["dropped"] == str(tmp_path / "b")


def test_collect_without_results_writes_nothing(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    with pytest.raises(UserError, match="no results under"):
        collect([str(tmp_path / "runs"), "--out", str(tmp_path / "r.csv")])
    assert not (tmp_path / "r.csv").exists()


def test_what_a_killed_collect_left_is_removed(tmp_path: Path) -> None:
    for name in "ab":
        write_validation(tmp_path / "runs" / name, 762, [(0, 2, 3.0), (7, 1, 6.0)])
        write_records(tmp_path / "runs" / name, [record("arm", "107k", 1e12, 4.0, run=name)])
    half = "0123456789abcdef" * 2
    for stem in ("results", "results.covariance"):
        (tmp_path / f".{stem}.{half}.csv").write_text("run,objec")
    assert collect([str(tmp_path / "runs"), "--out", str(tmp_path / "results.csv")]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.covariance.csv", "results.csv", "runs"]


def test_damaged_and_left_out_runs_are_in_both_reports_and_the_exit_code_is_0(tmp_path: Path, capsys: Captured) -> None:
    write_records(tmp_path / "runs/a", [record("arm", "107k", 1e12, 4.0)])
    (tmp_path / "runs/a/faults.csv").write_bytes(b"\xff")
    write_records(tmp_path / "runs/.b", [record("arm", "107k", 1e12, 4.0, run="b")])
    (tmp_path / "runs/c").mkdir()
    (tmp_path / "runs/c/result.json").write_text("[" * 100_000)
    assert collect([str(tmp_path / "runs"), "--out", str(tmp_path / "r.csv"), "--json"]) == 0
    captured = capsys.readouterr()
    assert [line.split(" (")[0] for line in captured.err.splitlines()] == [
        f"unfinished: {tmp_path}/runs/c", f"damaged: {tmp_path}/runs/a", f"left out: {tmp_path}/runs/.b",
        "covariance: 1 results left out",
    ]  # fmt: skip
    written = json.loads(captured.out)
    assert list(written["damaged"]) == [f"{tmp_path}/runs/a"]
    assert list(written["left_out"]) == [f"{tmp_path}/runs/.b"]
    assert list(written["unfinished"]) == [f"{tmp_path}/runs/c"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("r.txt", r"named \.csv or \.parquet"),
        ("runs/.csv", "named"),
        ("d.csv", "no regular file"),
        ("n" * 300 + ".csv", "name a file"),
    ],
)
def test_a_table_that_cannot_be_written_is_refused_before_anything_is_read(
    tmp_path: Path, name: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "d.csv").mkdir()
    monkeypatch.setattr("llada_lightning.study.collect.gather", None)
    with pytest.raises(UserError, match=words):
        collect([str(tmp_path), "--out", str(tmp_path / name)])
