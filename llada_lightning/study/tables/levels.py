"""The loss of one run by noise level, as ``llada curves --by-level`` prints it."""

from __future__ import annotations

from rich.table import Table

from llada_lightning.records import NOISE_LEVELS
from llada_lightning.study.levels import RunLevels
from llada_lightning.study.tables.style import known, titled
from llada_lightning.support.printing import people_console


def print_levels(levels: RunLevels, files: list[str]) -> None:
    """Prints the first and the last loss of each noise level, in training and in validation."""
    console = people_console()
    title = f"{levels.run}: {levels.unit}, by noise level, up to a step"
    console.print(title, highlight=False, soft_wrap=True)  # not that of the table, which is narrower than most names
    console.print(levels_table(levels))
    console.print(f"-> {', '.join(files)}", soft_wrap=True)


def levels_table(levels: RunLevels) -> Table:
    """The loss of each noise level in the first and the last window of each split, named by the window's last step."""
    shown = [
        (f"  {split} {own.steps[window]}", own.nats_WT[window])
        for split, own in levels.curves.items()
        for window in sorted({0, len(own.steps) - 1})
    ]
    printed = titled("", "level", *(name for name, _ in shown))
    for n in range(NOISE_LEVELS):
        bounds = f"{n / NOISE_LEVELS:g}–{(n + 1) / NOISE_LEVELS:g}"
        printed.add_row(bounds, *(known(nats_T[n], ".3f") for _, nats_T in shown))
    return printed
