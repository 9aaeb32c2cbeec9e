"""`make paper-rehearsal`: the paper's study at a toy size, from nothing to its figure."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llada_lightning.study.plots.tables import task_names
from llada_lightning.study.reference import PAPER_TASKS
from llada_lightning.study.results import read_results

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_rehearsal_ends_in_the_figure(tmp_path: Path) -> None:
    for name in ("experiments", "sweeps"):
        (tmp_path / name).symlink_to(ROOT / name)
    commands = tmp_path / "bin"
    commands.mkdir()
    modules = {"llada": "-m llada_lightning", "torchrun": "-m torch.distributed.run", "python": ""}
    for name, module in modules.items():
        script = commands / name
        script.write_text(f'#!/bin/bash\nexec "{sys.executable}" {module} "$@"\n')
        script.chmod(0o755)
    environment = os.environ | {"PATH": f"{commands}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    script = ["bash", "experiments/paper/rehearsal/run.sh"]
    done = subprocess.run(script, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "killed arm-7b on its way" in done.stdout
    assert "going on from runs/paper-rehearsal/arm-7b/checkpoints/" in done.stderr
    runs = tmp_path / "runs" / "paper-rehearsal"
    table = read_results(runs / "results.csv")
    assert set(task_names(table)) == set(PAPER_TASKS)
    assert table.groupby(["objective", "params_nonembedding"], observed=True).size().to_list() == [3, 4, 3, 4]
    assert table[[f"task_{task}" for task in PAPER_TASKS]].notna().all(axis=None)
    assert (runs / "paper.png").stat().st_size > 10_000
