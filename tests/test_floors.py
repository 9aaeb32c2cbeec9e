"""The floors of the house: imports go down, never in a circle, and the lower floors know no torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import llada_lightning

PACKAGE = Path(llada_lightning.__file__).parent
FLOORS = (
    ("support",),
    ("compute",),
    ("objectives", "model"),
    ("settings", "identity", "run", "records"),
    ("study",),
    ("data",),
    ("checkpoints",),
    ("generation",),
    ("evaluation",),
    ("training",),
    ("commands",),
)
"""From the lowest to the highest. A floor may import itself and the floors below."""

WITHOUT_TORCH = ("compute", "settings", "identity", "run", "records", "study")


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


SOURCES = {module_name(path): path for path in PACKAGE.rglob("*.py")}


@cache
def imported(name: str, everywhere: bool = True) -> frozenset[str]:
    """The modules of the package that a module imports: everywhere in it, or when it is imported itself."""
    tree = ast.parse(SOURCES[name].read_text(encoding="utf-8"))
    statements = list(ast.walk(tree)) if everywhere else tree.body
    found = set()
    for statement in statements:
        if isinstance(statement, ast.ImportFrom) and (statement.module or "").startswith("llada_lightning"):
            parent = (statement.module or "").removeprefix("llada_lightning").removeprefix(".")
            for alias in statement.names:
                below = f"{parent}.{alias.name}".removeprefix(".")
                found.add(below if below in SOURCES else parent)
        elif isinstance(statement, ast.Import):
            found |= {a.name.removeprefix("llada_lightning.") for a in statement.names if "llada_lightning." in a.name}
    return frozenset(found - {name, ""})


def floor(name: str) -> int:
    room = name.split(".")[0]
    return next(number for number, rooms in enumerate(FLOORS) if room in rooms)


def test_every_module_is_on_a_floor() -> None:
    rooms = {name.split(".")[0] for name in SOURCES} - {"", "__main__"}
    assert rooms == {room for rooms in FLOORS for room in rooms}


@pytest.mark.parametrize("name", sorted(set(SOURCES) - {"", "__main__"}))
def test_imports_go_down(name: str) -> None:
    assert not {other for other in imported(name) if floor(other) > floor(name)}


def test_no_modules_import_one_another_in_a_circle() -> None:
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, f"circle: {' -> '.join([*above[above.index(name) :], name])}"
        if name not in done:
            for other in sorted(imported(name, everywhere=False)):
                visit(other, (*above, name))
            done.add(name)

    for name in sorted(SOURCES):
        visit(name, ())


def test_the_lower_floors_import_neither_torch_nor_lightning() -> None:
    modules = [f"llada_lightning.{name}" for name in sorted(SOURCES) if name.split(".")[0] in WITHOUT_TORCH]
    assert {"llada_lightning.study.sweep.runner", "llada_lightning.study.fits.parametric"} <= set(modules)
    script = f"import sys, {', '.join(modules)}\nprint(*sorted({{'torch', 'lightning'}} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == ""
