"""The paper's ablations: their rows, and the tables that they fill."""

from __future__ import annotations

from typing import Any

import pytest

from llada_lightning.evaluation.ablations import ABLATIONS, Cell, ablation, run_ablation
from llada_lightning.support.errors import UserError


def test_the_rows_are_those_of_the_paper() -> None:
    assert {name: ablation(name).table for name in ABLATIONS} == {
        "cfg": 6, "strategies": 7, "strategies-instruct": 8, "remasking": 9, "length": 10,
    }  # fmt: skip
    assert [len(ablation(name).rows) for name in ABLATIONS] == [5, 10, 4, 2, 3]
    instruct = ablation("strategies-instruct").rows
    assert [row.settings.get("zero_eos_confidence", False) for row in instruct] == [False, False, False, True]
    assert {row.settings["block_length"] for row in instruct} == {None, 32}


def test_rows_differ_in_what_is_varied_and_in_nothing_else() -> None:
    lengths = ablation("length", lengths=[8, 16]).rows
    assert [row.settings["length"] for row in lengths] == [8, 16]
    assert [row.settings["steps"] for row in lengths] == [8, 16]  # one token a step
    blocks = ablation("strategies", blocks=[4]).rows
    assert [(row.settings["strategy"], row.settings["block_length"]) for row in blocks] == [
        ("autoregressive", None), ("block_diffusion", 4), ("diffusion", 4), ("diffusion", None),
    ]  # fmt: skip


def test_the_best_scale_is_taken_for_each_task_and_named() -> None:
    scores = {0.0: (0.9, 0.1), 0.5: (0.3, 0.6), 1.0: (0.5, 0.2), 1.5: (0.4, 0.6), 2.0: (0.1, 0.1)}
    table = run_ablation(
        ablation("cfg"),
        lambda settings: {task: (value, 0.01) for task, value in zip("ab", scores[settings["cfg_scale"]], strict=True)},
    )
    assert table["w/o CFG"]["a"] == Cell(0.9, 0.01)
    assert table["w/ CFG (the best)"] == {
        "a": Cell(0.5, 0.01, of="CFG, w = 1"),
        "b": Cell(0.6, 0.01, of="CFG, w = 0.5"),
    }
    assert list(table)[-1] == "w/ CFG (the best)"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("cfgs",), "no ablation 'cfgs'; there are cfg, strategies"),
        (("cfg", [4]), "--blocks: 'cfg' does not vary it"),
        (("strategies", [0]), "--blocks 0: give lengths of at least 1"),
        (("strategies", [], [8]), "--lengths: 'strategies' does not vary it"),
    ],
)
def test_what_cannot_be_is_refused(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ablation(*arguments)
