"""Each notebook runs from top to bottom on committed results, and what is committed shows its tables."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MOST_BYTES = 50_000
SLOW = ("study", "published_isoflop", "own_objective")
"""Other tests make their fits (tests/experiments/test_study.py) and their training (tests/test_extending.py)."""
RUN = [pytest.param(path, marks=[pytest.mark.slow] if path.stem in SLOW else [], id=path.stem) for path in NOTEBOOKS]


@pytest.fixture(scope="module")
def render() -> ModuleType:
    spec = importlib.util.spec_from_file_location("render", ROOT / "notebooks" / "render.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def kinds(notebook: dict[str, Any]) -> list[list[str]]:
    """What each code cell shows: streams, and the MIME types of its value."""
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    return [
        [kind for output in cell["outputs"] for kind in (sorted(output["data"]) if "data" in output else ["stream"])]
        for cell in cells
    ]


@pytest.mark.parametrize("path", RUN)
def test_a_notebook_runs_and_shows_what_is_committed(path: Path, render: ModuleType, tmp_path: Path) -> None:
    for name in ("quickstart", "study"):
        shutil.copytree(ROOT / "experiments" / name, tmp_path / "experiments" / name)
    (tmp_path / "notebooks").mkdir()
    fresh = render.run_notebook(path, tmp_path / "notebooks")
    assert sum("image/png" in shown for shown in kinds(fresh)) >= 1
    render.remove_figures(fresh)
    assert kinds(json.loads(path.read_text(encoding="utf-8"))) == kinds(fresh)  # else: make notebooks


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_committed_notebook_is_small_and_names_no_machine(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.encode()) < MOST_BYTES
    cells = json.loads(text)["cells"]
    shown = "".join(line for cell in cells for output in cell.get("outputs", []) for line in output.get("text", []))
    assert str(ROOT) not in text and "Traceback" not in shown
    assert all(len("".join(cell["source"]).splitlines()) <= 25 for cell in cells)


def test_the_notebooks_are_there() -> None:
    names = {path.stem for path in NOTEBOOKS}
    assert names >= {"paper_figure3", "published_isoflop", "your_study", "plan_a_study", "study", "own_objective"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_no_notebook_shows_a_multiplier_that_the_command_withholds(path: Path) -> None:
    cells = ["".join(cell["source"]) for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]]
    listed = [text for text in cells if "in fits.compute_multiplier" in text]
    assert all("if entry.shown" in text for text in listed) and (listed or path.stem != "your_study")
