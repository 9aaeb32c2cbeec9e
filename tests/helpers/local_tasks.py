"""Tasks of lm-evaluation-harness whose data are local files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

QUESTIONS = [
    {"question": f"What comes after {n}?", "choices": [f"{n + 1}", "a dog", f"{n}{n}, or so"], "answer": n % 3}
    for n in range(8)
]


def choice_task(folder: Path, name: str = "local_choice", **changes: Any) -> list[dict[str, Any]]:
    """A multiple-choice task in a folder; returns its documents."""
    config = {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}\nAnswer:",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    _write(folder, name, config | changes, QUESTIONS)
    return QUESTIONS


def answer_task(folder: Path, documents: list[dict[str, Any]], name: str = "local_answer", **changes: Any) -> None:
    """A generation task in a folder, by exact match: documents have a `question` and an `answer`."""
    config = {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["zz"], "max_gen_toks": 8, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    _write(folder, name, config | changes, documents)


def _write(folder: Path, name: str, config: dict[str, Any], documents: list[dict[str, Any]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in documents), encoding="utf-8")
    whole = {
        "task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test", **config,
    }  # fmt: skip
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(whole), encoding="utf-8")
