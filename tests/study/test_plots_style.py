"""What every figure shares: bytes that repeat, sizes that fit a repository, and styles that survive grey."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgb

from llada_lightning.study.plots import paper_figure3, write_figure
from llada_lightning.study.plots.style import METHODS, Style, interval_bars, objective_styles, power_of_ten, shades

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


def test_a_variant_has_the_colour_of_its_objective() -> None:
    styles = objective_styles(VARIANTS)
    assert [styles[name].label for name in VARIANTS[:3]] == ["arm (exact)", "llada (bound, NELBO)", (
        "llada (bound, NELBO) [compat=llada]"
    )]  # fmt: skip
    assert {styles[name].color for name in VARIANTS[1:]} == {"#D55E00"} != {styles["arm"].color}


@pytest.mark.parametrize(
    "styles",
    [objective_styles(VARIANTS[:2]), objective_styles(VARIANTS[1:]), METHODS],
    ids=["objectives", "variants", "methods"],
)
def test_styles_differ_in_line_and_marker_not_in_colour_alone(styles: dict[str, Style]) -> None:
    for one, other in itertools.combinations(styles.values(), 2):
        assert one.line != other.line
        assert one.marker != other.marker


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
