"""The grid of a plan: every planned result is a point, every trunk a line."""

from __future__ import annotations

import numpy as np
import pytest

from llada_lightning.run import Stream
from llada_lightning.study.plan import plan_study
from llada_lightning.study.plots import plan_grid


def test_every_result_is_a_point_and_every_trunk_a_line() -> None:
    plan = plan_study([1e18, 2e18, 4e18], Stream(vocab_size=32_000, sequence_length=1024))
    table = plan.table()
    sizes, ratios = plan_grid(table).axes
    assert len(sizes.get_lines()) == table["trunk"].nunique()
    for axes, column in ((sizes, "params_nonembedding"), (ratios, "tokens_per_param")):
        drawn = np.concatenate([line.get_ydata() for line in axes.get_lines()])
        assert np.sort(drawn) == pytest.approx(np.sort(table[column].to_numpy(float)))


def test_one_objective_in_separate_runs_has_no_word_of_trunks_or_the_other() -> None:
    stream = Stream(vocab_size=32_000, sequence_length=1024)
    table = plan_study([1e18, 2e18], stream, objectives=["llada"], separate=True).table()
    texts = [text.get_text() for text in plan_grid(table).legends[0].get_texts()]
    assert texts == ["llada"]
