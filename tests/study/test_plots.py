"""The scaling figure says what it shows: convention, unit, exact or bound, error bars, exponents with intervals."""

from __future__ import annotations

import pytest
from matplotlib.figure import Figure

from helpers.studies import record, study
from llada_lightning.compute.flops import Convention
from llada_lightning.study.fits import Unit, fit_table
from llada_lightning.study.plots import scaling_curve
from llada_lightning.study.reference import published_isoflop
from llada_lightning.study.results import table_of_records
from llada_lightning.support.errors import UserError

SAMPLES = 200


def legend_of(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


@pytest.mark.parametrize(
    ("convention", "unit", "x_label", "y_label"),
    [
        ("6nd", "nats_per_token", "training FLOPs (6ND)", "validation loss (nats/token)"),
        ("total", "bits_per_byte", "training FLOPs (6ND + attention + head)", "validation loss (bits/byte)"),
    ],
)
def test_axes_name_convention_and_unit(convention: Convention, unit: Unit, x_label: str, y_label: str) -> None:
    table = study()
    axes = scaling_curve(table, fit_table(table, unit=unit, samples=SAMPLES), convention).axes[0]
    assert (axes.get_xlabel(), axes.get_ylabel()) == (x_label, y_label)
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")


@pytest.mark.parametrize("convention", ["6nd", "total"])
def test_the_legend_gives_exponents_with_their_intervals(convention: Convention) -> None:
    table = study()
    fits = fit_table(table, samples=SAMPLES)
    words = " ".join(legend_of(scaling_curve(table, fits, convention)))
    for envelope in fits.envelopes(convention).values():
        assert envelope.law is not None
        low, high = envelope.law.interval_b
        assert f"C$^{{{-envelope.law.b:.3f}}}$" in words
        assert f"[{-high:.3f}, {-low:.3f}]" in words


def test_the_legend_says_exact_bound_shapes_and_error_bars() -> None:
    table = study()
    words = legend_of(scaling_curve(table, fit_table(table, samples=SAMPLES)))
    for text in ("arm (exact)", "llada (bound, NELBO)", "± 1 s.e.", "107k", "443k", "95 %", "best of its budget"):
        assert any(text in word for word in words), text


def test_the_legend_lists_only_what_is_drawn() -> None:
    table = table_of_records([record("llada", "107k", 1e12, 4.0, val_stderr=None)])
    words = legend_of(scaling_curve(table, fit_table(table, samples=SAMPLES)))
    assert words == ["llada (bound, NELBO)", " ", "107k"]


def test_many_shapes_are_counted_not_listed() -> None:
    table = published_isoflop()
    words = legend_of(scaling_curve(table, fit_table(table, samples=SAMPLES)))
    assert f"{table['shape'].nunique()} shapes,\nnot told apart" in words
    assert "106M" not in words
    assert not any("s.e." in word for word in words)


def test_every_run_is_a_point_with_its_standard_error() -> None:
    table = study()
    axes = scaling_curve(table, fit_table(table, samples=SAMPLES)).axes[0]
    assert len(axes.containers) == len(table)
    (low, high) = axes.containers[0][2][0].get_segments()[0][:, 1]  # type: ignore[index]
    run = table.iloc[0]
    assert (high - low) / 2 == pytest.approx(run["val_stderr"])
    assert (high + low) / 2 == pytest.approx(run["val_nats_per_token"])


def test_bits_per_byte_stand_on_the_right_only_where_one_factor_converts_all() -> None:
    table = study()
    fits = fit_table(table, samples=SAMPLES)
    assert [axis.get_ylabel() for axis in scaling_curve(table, fits).axes[0].child_axes] == ["bits/byte"]
    table.loc[0, "val_bits_per_byte"] *= 1.1
    assert scaling_curve(table, fits).axes[0].child_axes == []


def test_a_convention_without_flops_is_refused_in_one_line() -> None:
    table = published_isoflop()
    with pytest.raises(UserError, match="no FLOPs by 6ND \\+ attention \\+ head"):
        scaling_curve(table, fit_table(table, samples=SAMPLES), "total")
