"""Small corpora and undisturbed runs, each made once for all tests of this folder."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from helpers.killed_fits import Cell, Undisturbed
from helpers.run_state import read_state
from processes import child_environment, finish
from small_fits import Corpora, prepare_corpora, run_folder


@pytest.fixture(scope="session")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Corpora:
    return prepare_corpora(tmp_path_factory.mktemp("corpora"))


@pytest.fixture(scope="session")
def undisturbed(corpora: Corpora, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Cell], Undisturbed]:
    """From a cell to its undisturbed run, made when it is first asked for."""
    found: dict[Cell, Undisturbed] = {}

    def get(cell: Cell) -> Undisturbed:
        cell = cell.undisturbed
        if cell not in found:
            root = tmp_path_factory.mktemp("undisturbed")
            run = finish(cell.words(corpora, root), root / "log", child_environment(root / "tmp"))
            found[cell] = Undisturbed(run_folder(root), read_state(run_folder(root)), run.seconds)
        return found[cell]

    return get
