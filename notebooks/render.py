"""Runs the notebooks from top to bottom: `make notebooks`.

A notebook keeps the text and the tables that its cells show. Its copy in ``notebooks/rendered/``, which git ignores,
holds the figures, too.
"""

from __future__ import annotations

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent


def run_notebook(path: Path, folder: Path | None = None) -> nbformat.NotebookNode:
    """The notebook with fresh outputs.

    Args:
        path: The notebook. The file is left as it is.
        folder: The working directory of its cells. None: the notebook's folder.

    Raises:
        nbclient.exceptions.CellExecutionError: A cell fails.
    """
    notebook = nbformat.read(path, as_version=4)
    language = notebook.metadata.language_info
    place = {"metadata": {"path": str(folder or path.parent)}}
    NotebookClient(notebook, timeout=600, record_timing=False, coalesce_streams=True, resources=place).execute()
    notebook.metadata.language_info = language  # the kernel adds the version of this machine's Python
    return notebook


def remove_figures(notebook: nbformat.NotebookNode) -> None:
    """Remove, in place, the outputs that hold a picture."""
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if "image/png" not in output.get("data", {})]


def main(paths: list[str]) -> None:
    rendered = FOLDER / "rendered"
    rendered.mkdir(exist_ok=True)
    for path in [Path(path) for path in paths] or sorted(FOLDER.glob("*.ipynb")):
        notebook = run_notebook(path)
        nbformat.write(notebook, rendered / path.name)
        remove_figures(notebook)
        nbformat.write(notebook, path)
        print(f"{path.name}: {path.stat().st_size / 1024:.0f} KiB, with figures {rendered / path.name}")


if __name__ == "__main__":
    main(sys.argv[1:])
