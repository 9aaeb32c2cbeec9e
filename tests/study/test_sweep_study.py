"""A sweep file edited half-way is noticed; a run's state is read from its folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.studies import record
from llada_lightning.records import write_records
from llada_lightning.study.sweep import Sweep, check_unchanged, kept_copy, read_sweep, state_of
from llada_lightning.support.errors import UserError


def sweep(folder: Path, *shapes: str) -> Sweep:
    path = folder / "grid.yaml"
    grid = f"parameters: {{shape: {{values: [{', '.join(shapes)}]}}}}"
    path.write_text(f"method: grid\ncommand: [llada, fit, '${{args}}']\n{grid}\n")
    return read_sweep(path)


def test_an_unchanged_file_goes_on(tmp_path: Path) -> None:
    first = sweep(tmp_path, "a", "b")
    assert check_unchanged(first, tmp_path / "study") == 0
    assert kept_copy(first, tmp_path / "study").read_text() == (tmp_path / "grid.yaml").read_text()
    assert check_unchanged(first, tmp_path / "study", by_index=True) == 0


def test_a_comment_is_no_change(tmp_path: Path) -> None:
    check_unchanged(sweep(tmp_path, "a", "b"), tmp_path / "study")
    path = tmp_path / "grid.yaml"
    path.write_text("# a note\n" + path.read_text())
    assert check_unchanged(read_sweep(path), tmp_path / "study", by_index=True) == 0


def test_runs_may_be_added(tmp_path: Path) -> None:
    check_unchanged(sweep(tmp_path, "a", "b"), tmp_path / "study")
    assert check_unchanged(sweep(tmp_path, "a", "b", "c"), tmp_path / "study", by_index=True) == 1
    assert check_unchanged(sweep(tmp_path, "z", "a", "b", "c"), tmp_path / "study") == 1


def test_by_index_no_run_may_change_its_number(tmp_path: Path) -> None:
    check_unchanged(sweep(tmp_path, "a", "b"), tmp_path / "study")
    with pytest.raises(UserError, match="have changed their numbers"):
        check_unchanged(sweep(tmp_path, "b", "a"), tmp_path / "study", by_index=True)


def test_runs_that_have_left_the_file_are_refused_until_it_is_meant(tmp_path: Path) -> None:
    study = tmp_path / "study"
    before = sweep(tmp_path, "a", "b")
    check_unchanged(before, study)
    edited = sweep(tmp_path, "a", "c")
    with pytest.raises(UserError, match=r"was edited: 1 of the 2 runs .* have left it; .*\(the first: --shape=b\)"):
        check_unchanged(edited, study)
    assert "[a, b]" in kept_copy(before, study).read_text()
    assert check_unchanged(edited, study, edited=True) == 1
    assert check_unchanged(edited, study) == 0


def test_the_state_of_a_run(tmp_path: Path) -> None:
    assert state_of(tmp_path / "none") == "not begun"
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "config.yaml").write_text("budget: {flops: 1.0e+12}\n")
    assert state_of(tmp_path / "begun") == "begun"
    write_records(tmp_path / "done", [record("arm", "107k", 1e12, 4.0)])
    assert state_of(tmp_path / "done") == "done"
    write_records(tmp_path / "bad", [record("arm", "107k", 1e12, float("nan"), status="diverged")])
    assert state_of(tmp_path / "bad") == "diverged"
