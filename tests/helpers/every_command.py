"""An objective through every command: plan, sweep, collect, curves, score, generate, convert and validate."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from llada_lightning.commands.main import main


class Walk(NamedTuple):
    """What the commands printed with `--json`, and the folder of one of the three runs."""

    plan: Any
    curves: Any
    run: Path
    score: Any
    answer: Any


def as_json(capsys: pytest.CaptureFixture[str], *arguments: object) -> Any:
    """What a command prints with `--json`."""
    capsys.readouterr()
    assert main([*map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def through_every_command(
    objective: str,
    data: Path,
    capsys: pytest.CaptureFixture[str],
    plan_options: Sequence[object] = (),
    generate_options: Sequence[object] = (),
) -> Walk:
    """Three tiny runs of an objective in the current folder, from the plan to their curves; and one of them further."""
    base = {
        "trainer": {"accelerator": "cpu", "precision": "32-true"},
        "data": {"class_path": "TokenDataModule", "init_args": {"val_sequences": 8, "workers": 0}},
    }
    Path("base.yaml").write_text(yaml.safe_dump(base))
    shapes = [f"L1-d{width}-h2-kv1-ff{2 * width}" for width in (8, 16, 32)]
    plan = as_json(
        capsys, "plan", "--objectives", objective, *plan_options, "--flops", "1e7", "2e7", "--shapes", *shapes,
        "--data", data, "--sequence-length", 16, "--batch", 4, "--lr", 0.01, "--base", "base.yaml", "--study", "s",
        "--out", "s.yaml",
    )  # fmt: skip
    assert {run["objective"] for run in plan["runs"]} == {objective}
    for index in range(3):  # as the tasks of a job array, in this process
        assert main(["sweep", "run", "s.yaml", "--index", str(index)]) == 0
    assert len(as_json(capsys, "sweep", "run", "s.yaml")["skipped"]) == 3
    as_json(capsys, "collect", "runs/s", "--out", "results.csv")
    curves = as_json(capsys, "curves", "results.csv", "--out", "curves", "--samples", 100)
    assert Path("curves/scaling.png").is_file()

    run = next(Path("runs/s").glob(f"{objective}-*"))
    [first, *_] = json.loads((run / "result.json").read_text())
    assert (first["objective"], first["val_kind"], first["status"]) == (objective, "bound", "done")
    Path("pairs.jsonl").write_text(json.dumps({"prompt": "1 plus", "continuation": " 2 is 3"}) + "\n")
    score = as_json(capsys, "score", run, "--pairs", "pairs.jsonl", "--samples", 16)
    assert (score["objective"], score["kind"]) == (objective, "bound")
    answer = as_json(capsys, "generate", run, "--prompt", "one plus", "--length", 4, *generate_options)
    assert answer["objective"] == objective
    assert main(["convert", str(run), "ours"]) == 0
    again = as_json(capsys, "score", "ours", "--pairs", "pairs.jsonl", "--samples", 16)
    assert again["results"] == score["results"]
    assert main(["convert", str(run), "theirs", "--to", "hf-llama"]) == 2
    assert f"is of {objective}; choose --to llada" in capsys.readouterr().err
    return Walk(plan, curves, run, score, answer)
