"""Scores against FLOPs: what the table holds is drawn, where it says."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from llada_lightning.compute.flops import CONVENTIONS, Convention
from llada_lightning.study.plots import paper_figure3, task_accuracy
from llada_lightning.study.plots.tables import task_names
from llada_lightning.study.reference import PAPER_TASKS, paper_scalability
from llada_lightning.support.errors import UserError


def scored(**columns: object) -> pd.DataFrame:
    table = pd.DataFrame({
        "objective": ["arm", "arm", "llada", "llada"],
        "params_nonembedding": [1e6, 1e6, 1e6, 1e6],
        "flops_6nd": [1e12, 1e13, 1e12, 1e13],
        "flops_total": [2e12, 2e13, 3e12, 3e13],
        "task_piqa": [51.0, 60.0, 50.0, 55.0],
    })  # fmt: skip
    return table.assign(**columns)


def words(figure: object) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]  # type: ignore[attr-defined]


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_figure_3_has_six_panels_with_all_scores_at_their_flops(convention: Convention) -> None:
    table = paper_scalability()
    figure = paper_figure3(convention)
    column = {"6nd": "flops_6nd", "total": "flops_total"}[convention]
    assert [axes.get_title() for axes in figure.axes] == list(PAPER_TASKS.values())
    for axes, task in zip(figure.axes, PAPER_TASKS, strict=True):
        drawn = np.concatenate([container[0].get_xydata() for container in axes.containers])  # type: ignore[index]
        expected = table.loc[table[f"task_{task}"].notna(), [column, f"task_{task}"]].to_numpy(float)
        assert sorted(map(tuple, drawn)) == sorted(map(tuple, expected))


def test_figure_3_states_its_convention_and_what_the_total_assumes() -> None:
    assert paper_figure3("6nd").get_supxlabel() == "training FLOPs (6ND)"
    total = paper_figure3("total").get_supxlabel()
    assert total.startswith("training FLOPs (6ND + attention + head)")
    assert "length 4096" in total and "126,464 vocabulary entries" in total and "every position (assumed)" in total
    assert {"arm", "llada", "969m", "5.8b", "6.98b", "guessing"} <= set(words(paper_figure3()))


def test_errors_of_scores_are_bars_where_they_are_known() -> None:
    figure = task_accuracy(scored(task_piqa_stderr=[2.0, np.nan, 2.0, 2.0]))
    bars = figure.axes[0].containers[0][2][0].get_segments()  # type: ignore[index]
    assert [high - low for (_, low), (_, high) in bars] == [4.0, 0.0]
    assert "bars: ± 1 s.e." in words(figure)
    assert "bars: ± 1 s.e." not in words(task_accuracy(scored()))


def test_columns_without_a_score_are_no_panels() -> None:
    table = scored(task_mmlu=np.nan, task_gsm8k=[1.0, np.nan, np.nan, 2.0])
    assert task_names(table) == ["piqa", "gsm8k"]
    figure = task_accuracy(table)
    assert [axes.get_title() for axes in figure.axes if axes.get_visible()] == ["piqa", "gsm8k"]


def test_one_objective_alone_has_a_legend_of_its_own() -> None:
    assert "llada" not in words(task_accuracy(scored().iloc[:2]))


def test_a_table_without_scores_or_flops_is_refused() -> None:
    with pytest.raises(UserError, match="task_<name>"):
        task_accuracy(scored().drop(columns="task_piqa"))
    with pytest.raises(UserError, match="flops_total is missing"):
        task_accuracy(scored(flops_total=np.nan), "total")
