"""Runs notebooks from top to bottom in this process and stores what they show: `make notebooks`.

A cell shows what it prints and the value of its last expression, as Jupyter would, through ``_repr_png_``,
``_repr_html_`` or ``repr``. No kernel is needed, and the same results give the same file.
"""

from __future__ import annotations

import ast
import base64
import contextlib
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent


def run_notebook(path: Path) -> dict[str, Any]:
    """The notebook with fresh outputs, run in the current directory. An error in a cell is raised."""
    notebook: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    names: dict[str, Any] = {"__name__": "__main__"}
    count = 0
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            count += 1
            cell["outputs"] = _run_cell("".join(cell["source"]), names, count)
            cell["execution_count"] = count
    return notebook


def _run_cell(source: str, names: dict[str, Any], count: int) -> list[dict[str, Any]]:
    module = ast.parse(source)
    last = module.body.pop() if module.body and isinstance(module.body[-1], ast.Expr) else None
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(module, "<cell>", "exec"), names)
        value = eval(compile(ast.Expression(last.value), "<cell>", "eval"), names) if last else None  # type: ignore[attr-defined]
    outputs: list[dict[str, Any]] = []
    if printed.getvalue():
        outputs.append({"name": "stdout", "output_type": "stream", "text": _lines(printed.getvalue())})
    if value is not None:
        shown = {"data": _bundle(value), "execution_count": count, "metadata": {}, "output_type": "execute_result"}
        outputs.append(shown)
    return outputs


def _bundle(value: Any) -> dict[str, Any]:
    """What a reader may show of a value, by MIME type."""
    bundle: dict[str, Any] = {"text/plain": _lines(repr(value))}
    if hasattr(value, "_repr_png_"):
        bundle["image/png"] = base64.b64encode(value._repr_png_()).decode()
    elif hasattr(value, "_repr_html_"):
        bundle["text/html"] = _lines(value._repr_html_())
    return bundle


def _lines(text: str) -> list[str]:
    return text.splitlines(keepends=True)


def main(paths: list[str]) -> None:
    for path in [Path(path).resolve() for path in paths] or sorted(FOLDER.resolve().glob("*.ipynb")):
        os.chdir(path.parent)
        notebook = run_notebook(path)
        path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"{path.name}: {path.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main(sys.argv[1:])
