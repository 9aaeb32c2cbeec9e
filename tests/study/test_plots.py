"""What every figure shares, and the figures of tables without a fit."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import rgb_to_hsv, to_rgb

from llada_lightning.compute.flops import CONVENTIONS, Convention
from llada_lightning.run import Stream
from llada_lightning.study.plan import plan_study
from llada_lightning.study.plots import paper_figure3, plan_grid, task_accuracy, write_figure
from llada_lightning.study.plots.style import (
    METHODS,
    Style,
    broken,
    flops_axis,
    interval_bars,
    new_figure,
    note,
    objective_styles,
    plain,
    power_of_ten,
    shades,
    side_legend,
    svg_text,
)
from llada_lightning.study.plots.tables import task_names
from llada_lightning.study.reference import PAPER_TASKS, paper_scalability
from llada_lightning.support.errors import UserError

LUMINANCE = (0.299, 0.587, 0.114)


def test_a_figure_is_a_png_and_an_svg_of_the_same_bytes_each_time(tmp_path: Path) -> None:
    path = write_figure(paper_figure3(), tmp_path / "one", "scores")
    again = write_figure(paper_figure3(), tmp_path / "two", "scores")
    assert path == tmp_path / "one" / "scores.png"
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size < 300_000
    assert path.read_bytes() == again.read_bytes()
    assert path.with_suffix(".svg").read_bytes() == again.with_suffix(".svg").read_bytes()
    assert sorted(file.name for file in path.parent.iterdir()) == ["scores.png", "scores.svg"]


def test_a_notebook_shows_a_figure_by_itself() -> None:
    assert paper_figure3()._repr_png_().startswith(b"\x89PNG")


VARIANTS = ["arm", "llada", "llada [compat=llada]", "llada [weight_decay=0]"]


def test_a_variant_has_a_shade_of_the_colour_of_its_objective() -> None:
    styles = objective_styles(VARIANTS)
    assert [styles[name].label for name in VARIANTS[:3]] == ["arm (exact)", "llada (bound, NELBO)", (
        "llada (bound, NELBO) [compat=llada]"
    )]  # fmt: skip
    assert styles["llada"].color == "#D55E00"
    hues = [rgb_to_hsv(to_rgb(styles[name].color))[0] for name in VARIANTS[1:]]
    assert hues == pytest.approx([hues[0]] * 3, abs=0.01)
    light = [float(np.dot(LUMINANCE, to_rgb(styles[name].color))) for name in VARIANTS[1:]]
    assert min(abs(one - other) for one, other in itertools.combinations(light, 2)) > 0.1


@pytest.mark.parametrize(
    "styles",
    [objective_styles(VARIANTS[:2]), objective_styles(VARIANTS[1:]), METHODS],
    ids=["objectives", "variants", "methods"],
)
def test_styles_differ_in_line_and_marker_not_in_colour_alone(styles: dict[str, Style]) -> None:
    for one, other in itertools.combinations(styles.values(), 2):
        assert one.line != other.line
        assert one.marker != other.marker


def test_long_names_are_broken_between_settings_and_the_figure_is_as_high_as_its_legend() -> None:
    name = "llada [density=range(low=0.05,high=0.6);loss_weight=ce]"
    assert broken(name, 28) == "llada\n[density=range(low=0.05,\nhigh=0.6);loss_weight=ce]"
    assert broken("loss ∝ C$^{-0.039}$ of a long name", 10) == "loss ∝ C$^{-0.039}$ of a long name"
    figure = new_figure(6, 2)
    figure.subplots()
    side_legend(figure, [[note(f"{number} {name}") for number in range(12)]])
    figure.draw_without_rendering()
    legend = figure.legends[0].get_window_extent()
    assert figure.get_figheight() > 4
    assert legend.y0 >= 0 and legend.y1 <= figure.bbox.y1 and legend.x0 > 0.4 * figure.bbox.x1


def test_a_dollar_in_a_name_begins_no_mathematics() -> None:
    figure = new_figure(4, 3)
    figure.subplots()
    side_legend(figure, [[note(plain("llada [x=$\\nothing$]"))]])
    assert svg_text(figure).count("<svg") == 1  # and no error of the parser of mathematics


@pytest.mark.parametrize("limits", [(2.2e9, 3.4e9), (5.3e9, 9e9), (1.6e10, 4.6e10), (1e12, 3e13), (1e12, 1e16)])
def test_labels_of_narrow_and_wide_axes_are_few(limits: tuple[float, float]) -> None:
    axes = new_figure(4, 3).subplots()
    axes.set_xlim(*limits)
    flops_axis(axes)
    labels = [tick for tick in axes.xaxis.get_majorticklocs() if limits[0] <= tick <= limits[1]]
    assert 2 <= len(labels) <= 5
    assert labels == pytest.approx([float(f"{tick:.1e}") for tick in labels])  # what a label says is where it is


def test_shades_darken_from_budget_to_budget() -> None:
    light = [float(np.dot(LUMINANCE, to_rgb(color))) for color in shades("#0072B2", 7)]
    assert light == sorted(light, reverse=True)
    assert shades("#0072B2", 1) == ["#0072B2"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(1e19, "$10^{19}$"), (3e19, "$3\\times10^{19}$"), (2.5e12, "$2.5\\times10^{12}$"), (9.99e11, "$10^{12}$")],
)
def test_powers_of_ten_read_as_written(value: float, text: str) -> None:
    assert power_of_ten(value) == text


def test_an_open_interval_draws_no_bar_on_its_open_side() -> None:
    bars = interval_bars([2.0, 2.0], [1.0, np.nan], [np.inf, 5.0])
    assert bars.tolist() == [[1.0, 0.0], [0.0, 3.0]]


# --- scores of tasks --------------------------------------------------------------------------------------------------


def scored(**columns: object) -> pd.DataFrame:
    table = pd.DataFrame({
        "objective": ["arm", "arm", "llada", "llada"],
        "params_nonembedding": [1e6, 1e6, 1e6, 1e6],
        "flops_6nd": [1e12, 1e13, 1e12, 1e13],
        "flops_total": [2e12, 2e13, 3e12, 3e13],
        "task_piqa": [51.0, 60.0, 50.0, 55.0],
    })  # fmt: skip
    return table.assign(**columns)


def legend_of(figure: object) -> list[str]:
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
    assert {"arm", "llada", "969m", "5.8b", "6.98b", "guessing"} <= set(legend_of(paper_figure3()))


def test_own_scores_are_drawn_over_those_of_the_paper() -> None:
    own = paper_scalability().head(2).assign(variant="decay_steps=0", task_piqa=[71.5, 72.5], task_piqa_stderr=1.0)
    figure = paper_figure3("6nd", own)
    assert {"arm", "arm [paper]", "llada [paper]"} <= set(legend_of(figure))
    piqa = next(axes for axes in figure.axes if axes.get_title() == "PIQA")
    drawn = np.concatenate([container[0].get_xydata() for container in piqa.containers])  # type: ignore[index]
    assert {71.5, 72.5} <= set(drawn[:, 1]) and len(drawn) == 41 + 2


def test_errors_of_scores_are_bars_where_they_are_known() -> None:
    figure = task_accuracy(scored(task_piqa_stderr=[2.0, np.nan, 2.0, 2.0]))
    bars = figure.axes[0].containers[0][2][0].get_segments()  # type: ignore[index]
    assert [high - low for (_, low), (_, high) in bars] == [4.0, 0.0]
    assert "bars: ± 1 s.e." in legend_of(figure)
    assert "bars: ± 1 s.e." not in legend_of(task_accuracy(scored()))


def test_columns_without_a_score_are_no_panels() -> None:
    table = scored(task_mmlu=np.nan, task_gsm8k=[1.0, np.nan, np.nan, 2.0])
    assert task_names(table) == ["piqa", "gsm8k"]
    figure = task_accuracy(table)
    assert [axes.get_title() for axes in figure.axes if axes.get_visible()] == ["piqa", "gsm8k"]


def test_one_objective_alone_has_a_legend_of_its_own() -> None:
    assert "llada" not in legend_of(task_accuracy(scored().iloc[:2]))


def test_a_table_without_scores_or_flops_is_refused() -> None:
    with pytest.raises(UserError, match="task_<name>"):
        task_accuracy(scored().drop(columns="task_piqa"))
    with pytest.raises(UserError, match="flops_total is missing"):
        task_accuracy(scored(flops_total=np.nan), "total")


# --- a plan -----------------------------------------------------------------------------------------------------------


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
