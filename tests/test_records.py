"""What a run leaves in its folder: what is read is what was written, and what is damaged is named."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.studies import sound
from llada_lightning.records import (
    EVALUATIONS_FILE,
    FAULT_COLUMNS,
    expected_records,
    has_diverged,
    is_done,
    read_evaluations,
    read_faults,
    read_records,
    read_validation,
    skipped_updates,
    task_columns,
    write_evaluations,
    write_faults,
    write_records,
    write_validation,
)
from llada_lightning.study.collect import collect
from llada_lightning.support import files
from llada_lightning.support.errors import UserError


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


# --- evaluations ------------------------------------------------------------------------------------------------------


def row(steps: int, task: str, score: float) -> dict[str, Any]:
    return {
        "steps": steps, "task": task, "score": score, "stderr": 1.5, "n": 100, "metric": "acc,none", "settings": "{}",
    }  # fmt: skip


def test_a_later_score_of_the_same_step_and_task_replaces_the_first(tmp_path: Path) -> None:
    write_evaluations(tmp_path, [row(10, "piqa", 50.25), row(20, "piqa", 51.0)])
    write_evaluations(tmp_path, [row(10, "piqa", 52.0), row(10, "mmlu", 25.5)])
    assert task_columns(tmp_path, 10) == {
        "task_mmlu": 25.5, "task_mmlu_stderr": 1.5, "task_piqa": 52.0, "task_piqa_stderr": 1.5,
    }  # fmt: skip
    assert task_columns(tmp_path, 20)["task_piqa"] == 51.0
    assert len(read_evaluations(tmp_path)) == 3


def test_a_run_without_evaluations_has_none(tmp_path: Path) -> None:
    assert task_columns(tmp_path, 10) == {} and read_evaluations(tmp_path).empty


@pytest.mark.parametrize("text", ["steps,task\n1,piqa\n", "no table", "steps,task,score,stderr,n,metric,settings\nx\n"])
def test_damaged_evaluations_are_named(tmp_path: Path, text: str) -> None:
    (tmp_path / EVALUATIONS_FILE).write_text(text)
    with pytest.raises(UserError, match=r"evaluations\.csv.*delete it and evaluate again"):
        read_evaluations(tmp_path)


# --- faults -----------------------------------------------------------------------------------------------------------


def fault(step: int, action: str) -> dict[str, str]:
    return dict.fromkeys(FAULT_COLUMNS, "") | {"step": str(step), "action": action}


def test_skipped_updates_are_those_of_the_run_and_its_branches(tmp_path: Path) -> None:
    assert read_faults(tmp_path) == [] and skipped_updates(tmp_path) == 0
    rows = [fault(4, "skipped"), fault(6, "reported"), fault(9, "skipped")]
    write_faults(tmp_path, rows)
    assert read_faults(tmp_path) == rows
    (tmp_path / "branches/20").mkdir(parents=True)
    write_faults(tmp_path / "branches/20", [fault(15, "skipped")])
    assert skipped_updates(tmp_path) == 3


@pytest.mark.parametrize(
    "content",
    [
        b"\xff\xfe", b"", b"step\n1\n", b"step,action\n1\n", b"step,action\n1,skipped,x\n",
        b"step,action\n-1,skipped\n",
        b'step,action\n"1,skipped\n', b"step,action\n" + b"9" * 19 + b",skipped\n", b"x" * 200_000,
    ],
)  # fmt: skip
def test_damaged_faults_are_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "faults.csv").write_bytes(content)
    for read in (read_faults, skipped_updates):
        with pytest.raises(UserError, match=r"faults\.csv") as raised:
            read(tmp_path)
        assert len(str(raised.value).splitlines()) == 1 and len(str(raised.value)) < 400
