"""The scores of a run's checkpoints on tasks, on disk and as columns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llada_lightning.records import EVALUATIONS_FILE, read_evaluations, task_columns, write_evaluations
from llada_lightning.support.errors import UserError


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
def test_a_damaged_file_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / EVALUATIONS_FILE).write_text(text)
    with pytest.raises(UserError, match=r"evaluations\.csv.*delete it and evaluate again"):
        read_evaluations(tmp_path)
