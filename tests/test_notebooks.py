"""Each notebook runs from top to bottom on committed results, and what is committed shows what it draws."""

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
MOST_BYTES = 300_000


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


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_shows_what_is_committed(
    path: Path, render: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("quickstart", "study"):
        shutil.copytree(ROOT / "experiments" / name, tmp_path / "experiments" / name)
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    fresh = kinds(render.run_notebook(path))
    assert sum("image/png" in shown for shown in fresh) >= 1
    assert kinds(json.loads(path.read_text(encoding="utf-8"))) == fresh  # else: make notebooks


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
    assert names >= {"paper_figure3", "published_isoflop", "your_study", "plan_a_study", "study"}


def test_a_cell_shows_its_prints_and_its_last_value(render: ModuleType, tmp_path: Path) -> None:
    source = {"cells": [{"cell_type": "code", "source": ["print('one')\n", "6 * 7"], "outputs": []}]}
    (tmp_path / "small.ipynb").write_text(json.dumps(source))
    outputs = render.run_notebook(tmp_path / "small.ipynb")["cells"][0]["outputs"]
    assert outputs[0]["text"] == ["one\n"]
    assert outputs[1]["data"] == {"text/plain": ["42"]}
