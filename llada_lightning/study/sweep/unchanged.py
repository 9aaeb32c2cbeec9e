"""A study and the sweep file that it was begun with: an edit half-way is noticed, and every run's state is listed."""

from __future__ import annotations

from pathlib import Path
from textwrap import shorten
from typing import Literal

from llada_lightning.records import CONFIG_FILE, has_diverged, is_done, read_records
from llada_lightning.study.sweep.file import Sweep, read_sweep, render_command
from llada_lightning.support.errors import UserError
from llada_lightning.support.files import written_atomically

State = Literal["done", "diverged", "begun", "not begun"]


def kept_copy(sweep: Sweep, study: Path) -> Path:
    """Where a study keeps the sweep file that it was begun with."""
    assert sweep.path is not None
    return study / f"{sweep.path.stem}.sweep.yaml"


def check_unchanged(sweep: Sweep, study: Path, *, by_index: bool = False, edited: bool = False) -> int:
    """Compare a sweep file with the copy that its study was begun with, and keep a new copy.

    Runs may be added to a study. Runs that have left the file stay in the study's folder, and would be collected with
    the others as if they belonged to one design: that is refused, unless it is said to be meant.

    Args:
        sweep: as read from its file.
        study: the folder of the study's runs.
        by_index: runs are named by their number, so those that there were must keep theirs.
        edited: the change is meant.

    Returns:
        The number of runs that were added to the file since the study was begun.

    Raises:
        UserError: runs have left the file, or by index changed their number.
    """
    if sweep.path is None:
        return 0
    copy = kept_copy(sweep, study)
    before = _commands(read_sweep(copy)) if copy.is_file() else []
    now = _commands(sweep)
    gone = [command for command in before if command not in now]
    if gone and not edited:
        raise UserError(
            f"sweep: {sweep.path} was edited: {len(gone)} of the {len(before)} runs that {study} was begun with have "
            f"left it; restore the file ({copy} is its copy), choose another run.study, or say --edited to go on with "
            f"both in one study (the first: {shorten(gone[0][-1], 200)})"
        )
    if by_index and not edited and now[: len(before)] != before:
        raise UserError(
            f"sweep: {sweep.path} was edited: its runs have changed their numbers since {study} was begun; add new "
            f"runs at the end ({copy} is the file as it was), or say --edited"
        )
    if now != before:
        assert sweep.path.is_file()
        with written_atomically(copy) as temporary:
            temporary.write_bytes(sweep.path.read_bytes())
    return len([command for command in now if command not in before]) if before else 0


def _commands(sweep: Sweep) -> list[list[str]]:
    return [render_command(sweep, point) for point in sweep.points]


def state_of(folder: Path) -> State:
    """What has become of a run, by its folder."""
    if is_done(folder):
        return "diverged" if has_diverged(folder) else "done"
    return "begun" if (folder / CONFIG_FILE).exists() or read_records(folder) else "not begun"
