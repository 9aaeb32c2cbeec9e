"""The ablations of the paper's Tables 6 to 10 by name: what is varied, and in which rows; without torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llada_lightning.support.errors import UserError

Measured = Mapping[str, tuple[float, float | None]]
"""By task: the score and its standard error, both as shares of 1; no error where there is no telling."""
Evaluate = Callable[[dict[str, Any]], Measured]


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
        name: as the paper has it.
        settings: of the likelihood (guidance) or of ``generate``; they go over the user's own.
        group: of the rows of one group the best is shown as well, as Table 6 does over scales.
    """

    name: str
    settings: dict[str, Any]
    group: str | None = None


@dataclass(frozen=True)
class Ablation:
    """A table of the paper.

    Attributes:
        table: its number.
        question: what it asks, for the table's title.
        scored: "likelihood": it is about rankings; "generation": about sampled answers.
    """

    table: int
    question: str
    scored: str
    rows: tuple[Row, ...]


CFG_SCALES = (0.5, 1.0, 1.5, 2.0)  # B.3
BLOCKS = (2, 4, 8, 32)  # Table 7
LENGTHS = (256, 512, 1024)  # Table 10


def ablation(name: str, blocks: Sequence[int] = (), lengths: Sequence[int] = ()) -> Ablation:
    """An ablation by name, with the paper's block lengths and generation lengths where none are given.

    Raises:
        UserError: there is none of this name; blocks or lengths are not positive or have no place in it.
    """
    if name not in ABLATIONS:
        raise UserError(f"no ablation '{name}'; there are {', '.join(ABLATIONS)}")
    for option, values, places in (("blocks", blocks, ("strategies",)), ("lengths", lengths, ("length",))):
        if any(value < 1 for value in values):
            raise UserError(f"--{option} {min(values)}: give lengths of at least 1 token")
        if values and name not in places:
            raise UserError(f"--{option}: '{name}' does not vary it; leave it out")
    return ABLATIONS[name](blocks, lengths)


def _guidance(_: Sequence[int], __: Sequence[int]) -> Ablation:
    guided = (Row(f"CFG, w = {scale:g}", {"cfg_scale": scale}, group="w/ CFG") for scale in CFG_SCALES)
    return Ablation(6, "classifier-free guidance", "likelihood", (Row("w/o CFG", {"cfg_scale": 0.0}), *guided))


def _strategies(blocks: Sequence[int], _: Sequence[int]) -> Ablation:
    rows = [Row("autoregressive", {"strategy": "autoregressive", "block_length": None})]
    for name, strategy in (("block diffusion", "block_diffusion"), ("block diffusion LLaDA", "diffusion")):
        rows += [
            Row(f"{name}, L' = {block}", {"strategy": strategy, "block_length": block}) for block in blocks or BLOCKS
        ]
    return Ablation(7, "sampling strategies", "generation", (*rows, _pure()))


def _instruct_strategies(_: Sequence[int], __: Sequence[int]) -> Ablation:
    """B.4: blocks of 32, and under pure diffusion the confidence of EOS is zero."""
    first = [row for row in _strategies((32,), ()).rows if row.name != _pure().name]
    return Ablation(8, "sampling strategies after SFT", "generation", (*first, _pure(zero_eos_confidence=True)))


def _pure(**more: Any) -> Row:
    return Row("pure diffusion", {"strategy": "diffusion", "block_length": None, **more})


def _remasking(_: Sequence[int], __: Sequence[int]) -> Ablation:
    rows = [
        Row(f"{name} remasking", {**_pure().settings, "remasking": remasking})
        for name, remasking in (("random", "random"), ("low-confidence", "low_confidence"))
    ]
    return Ablation(9, "remasking", "generation", tuple(rows))


def _length(_: Sequence[int], lengths: Sequence[int]) -> Ablation:
    rows = [Row(f"length {n}", {**_pure().settings, "length": n, "steps": n}) for n in lengths or LENGTHS]
    return Ablation(10, "generation length", "generation", tuple(rows))


ABLATIONS: dict[str, Callable[[Sequence[int], Sequence[int]], Ablation]] = {
    "cfg": _guidance,
    "strategies": _strategies,
    "strategies-instruct": _instruct_strategies,
    "remasking": _remasking,
    "length": _length,
}


@dataclass(frozen=True)
class Cell:
    """What was measured: a share of 1 with its standard error, and, of a group's best, in which row."""

    value: float
    stderr: float | None
    of: str | None = None


def run_ablation(what: Ablation, evaluate: Evaluate) -> dict[str, dict[str, Cell]]:
    """Evaluates row after row; a group's best row follows its last one.

    A group's best is picked by the very scores that it shows, so it is optimistic; its cell names the row.

    Args:
        evaluate: gives the scores by task under a row's settings.

    Returns:
        By row and task the cells.
    """
    table: dict[str, dict[str, Cell]] = {}
    for row in what.rows:
        table[row.name] = {task: Cell(*measured) for task, measured in evaluate(row.settings).items()}
    for group in dict.fromkeys(row.group for row in what.rows if row.group is not None):
        members = [row.name for row in what.rows if row.group == group]
        table[f"{group} (the best)"] = {task: _best(table, members, task) for task in table[members[0]]}
    return table


def _best(table: Mapping[str, Mapping[str, Cell]], rows: Sequence[str], task: str) -> Cell:
    name = max(rows, key=lambda row: table[row][task].value)
    return Cell(table[name][task].value, table[name][task].stderr, of=name)
