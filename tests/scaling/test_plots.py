"""The figure says what it shows: convention, unit, exact or bound, error bars."""

from __future__ import annotations

from pathlib import Path

import pytest
from matplotlib.figure import Figure

from llada_lightning.scaling.fits import Unit, fit_table
from llada_lightning.scaling.flops import Convention
from llada_lightning.scaling.plots import scaling_curve
from llada_lightning.scaling.results import table_of_records
from studies import record, study


def legend_of(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


@pytest.mark.parametrize(
    ("convention", "unit", "x_label", "y_label"),
    [
        ("6nd", "nats_per_token", "training FLOPs (6ND)", "validation loss (nats/token)"),
        ("total", "bits_per_byte", "training FLOPs (6ND + attention + head)", "validation loss (bits/byte)"),
    ],
)
def test_axes_name_convention_and_unit(
    tmp_path: Path, convention: Convention, unit: Unit, x_label: str, y_label: str
) -> None:
    table = study()
    path = tmp_path / "figures/scaling.png"
    figure = scaling_curve(table, fit_table(table, unit=unit, samples=200), path, convention, unit)
    axes = figure.axes[0]
    assert (axes.get_xlabel(), axes.get_ylabel()) == (x_label, y_label)
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert [file.name for file in path.parent.iterdir()] == ["scaling.png"]


def test_the_legend_says_exact_bound_shapes_and_error_bars(tmp_path: Path) -> None:
    table = study()
    fits = fit_table(table, samples=200)
    words = legend_of(scaling_curve(table, fits, tmp_path / "scaling.svg"))
    for text in ("arm (exact)", "llada (bound, NELBO)", "± 1 s.e.", "107k", "443k", "95 %", "best of its budget"):
        assert any(text in word for word in words), text
    law = fits.envelopes("6nd")["arm"].law
    assert law is not None
    assert any(f"{-law.b:.3f}" in word for word in words)


def test_every_run_is_a_point_with_its_standard_error(tmp_path: Path) -> None:
    table = study()
    axes = scaling_curve(table, fit_table(table, samples=200), tmp_path / "scaling.png").axes[0]
    assert len(axes.containers) == len(table)
    first = axes.containers[0]
    (low, high) = first[2][0].get_segments()[0][:, 1]  # type: ignore[index]
    run = table.iloc[0]
    assert (high - low) / 2 == pytest.approx(run["val_stderr"])
    assert (high + low) / 2 == pytest.approx(run["val_nats_per_token"])


def test_bits_per_byte_stand_on_the_right_only_where_one_factor_converts_all(tmp_path: Path) -> None:
    table = study()
    figure = scaling_curve(table, fit_table(table, samples=200), tmp_path / "1.png")
    assert [axis.get_ylabel() for axis in figure.axes[0].child_axes] == ["bits/byte"]
    table.loc[0, "val_bits_per_byte"] *= 1.1
    figure = scaling_curve(table, fit_table(table, samples=200), tmp_path / "2.png")
    assert figure.axes[0].child_axes == []


def test_a_single_run_can_be_drawn(tmp_path: Path) -> None:
    table = table_of_records([record("llada", "107k", 1e12, 4.0, val_stderr=None)])
    words = legend_of(scaling_curve(table, fit_table(table, samples=200), tmp_path / "scaling.png"))
    assert "llada (bound, NELBO)" in words
    assert not any("band" in word for word in words)


def test_fits_of_another_convention_are_refused(tmp_path: Path) -> None:
    table = study()
    with pytest.raises(ValueError, match="fits are by 6nd"):
        scaling_curve(table, fit_table(table, conventions=("6nd",), samples=200), tmp_path / "scaling.png", "total")
