"""The figures of a study show what the table and its fits say; a study draws what it has data for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.markers import CARETLEFT, CARETRIGHT

from helpers.studies import CHINCHILLA, SIMULATED_BUDGETS, record, simulated_study, study
from llada_lightning.compute.flops import Convention
from llada_lightning.study.fits import Multiplier, StudyFits, Unit, fit_table
from llada_lightning.study.plots import (
    compute_multiplier,
    draw_study,
    isoflop_curves,
    parametric_residuals,
    scaling_curve,
    study_figures,
)
from llada_lightning.study.plots.optima import optimum
from llada_lightning.study.plots.style import GREY, METHODS, objective_styles
from llada_lightning.study.reference import published_isoflop
from llada_lightning.study.results import table_of_records
from llada_lightning.support.errors import UserError

SAMPLES = 200
Study = tuple[pd.DataFrame, StudyFits]


@pytest.fixture(scope="module")
def full() -> Study:
    table, _ = simulated_study(CHINCHILLA)
    return table, fit_table(table, samples=SAMPLES)


def words(figure: Figure) -> str:
    return "\n".join(text.get_text() for text in figure.legends[0].get_texts())


def points(axes: object, marker: str) -> list[tuple[float, float]]:
    return [
        tuple(xy)
        for line in axes.get_lines()  # type: ignore[attr-defined]
        if line.get_marker() == marker
        for xy in line.get_xydata()
    ]


def test_each_budget_has_its_optimum_in_the_panel_of_its_objective(full: Study) -> None:
    table, fits = full
    figure = isoflop_curves(table, fits)
    assert [axes.get_title() for axes in figure.axes] == ["arm (exact)", "llada (bound, NELBO)"]
    for axes, objective in zip(figure.axes, ("arm", "llada"), strict=True):
        budgets = fits.objectives[objective].isoflop["6nd"].budgets
        assert len(budgets) == len(SIMULATED_BUDGETS) and all(budget.interior for budget in budgets)
        stars = points(axes, "*")
        assert stars == [(budget.n_opt.value, budget.loss_opt.value) for budget in budgets]
    assert "outside" not in words(figure)


def test_an_optimum_outside_of_the_grid_is_an_arrow_head_at_its_edge() -> None:
    table, _ = simulated_study(CHINCHILLA, drift=2.0)
    fits = fit_table(table, samples=SAMPLES)
    axes = isoflop_curves(table, fits).axes[0]
    budgets = fits.objectives["arm"].isoflop["6nd"].budgets
    outside = [budget for budget in budgets if not budget.interior]
    assert outside
    arrows = points(axes, "<") + points(axes, ">")
    edges = [edge for budget in outside for edge in np.exp([budget.log_n.min(), budget.log_n.max()])]
    assert len(arrows) == len(outside)
    assert all(any(x == pytest.approx(edge) for edge in edges) for x, _ in arrows)
    assert len(points(axes, "*")) == len(budgets) - len(outside)
    assert "optimum outside" in words(isoflop_curves(table, fits))


def test_an_open_interval_ends_in_a_caret_at_the_grids_edge(full: Study) -> None:
    table, fits = full
    found = isoflop_curves(table, fits)
    assert not points(found.axes[0], CARETRIGHT) and "open end" not in words(found)
    isoflop = fits.objectives["arm"].isoflop["6nd"]
    first = replace(isoflop.budgets[0], n_opt=replace(isoflop.budgets[0].n_opt, high=np.inf))
    opened = replace(isoflop, budgets=[first, *isoflop.budgets[1:]])
    arm = replace(fits.objectives["arm"], isoflop={**fits.objectives["arm"].isoflop, "6nd": opened})
    figure = isoflop_curves(table, replace(fits, objectives={**fits.objectives, "arm": arm}))
    ((_, end),) = [line.get_xdata() for line in figure.axes[0].get_lines() if line.get_marker() == CARETRIGHT]
    assert end == pytest.approx(np.exp(first.log_n.max()))
    assert "open end" in words(figure)


def test_an_unknown_interval_is_not_drawn(full: Study) -> None:
    table, fits = full
    isoflop = fits.objectives["arm"].isoflop["6nd"]
    unknown = [replace(one, n_opt=replace(one.n_opt, low=np.nan, high=np.nan)) for one in isoflop.budgets]
    arm = replace(
        fits.objectives["arm"], isoflop={**fits.objectives["arm"].isoflop, "6nd": replace(isoflop, budgets=unknown)}
    )
    figure = isoflop_curves(table, replace(fits, objectives={**fits.objectives, "arm": arm}))
    bars = {CARETLEFT, CARETRIGHT, "|"}
    drawn = [any(line.get_marker() in bars for line in axes.get_lines()) for axes in figure.axes]
    assert drawn == [False, True]
    assert len(points(figure.axes[0], "*")) == len(unknown) and "open end" not in words(figure)


def test_names_of_budgets_do_not_stand_on_each_other(full: Study) -> None:
    """Not even where two budgets end at one point."""
    table, fits = full
    flat = table.assign(val_nats_per_token=table.groupby("params_nonembedding")["val_nats_per_token"].transform("mean"))
    figure = isoflop_curves(flat, fits)
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    for axes in figure.axes:
        boxes = [text.get_window_extent(renderer) for text in axes.texts]
        assert len(boxes) == len(SIMULATED_BUDGETS)
        assert not any(one.overlaps(other) for i, one in enumerate(boxes) for other in boxes[:i])


def test_the_optimum_is_drawn_by_both_methods_with_exponents(full: Study) -> None:
    _, fits = full
    figure = optimum(fits)
    law = fits.objectives["arm"].isoflop["6nd"].n_law
    assert law is not None
    low, high = law.interval_b
    assert f"N ∝ C$^{{{law.b:.3f}}}$\n  [{low:.3f}, {high:.3f}]" in words(figure)
    assert "parametric frontier" in words(figure)
    assert all(len(axes.collections) >= 2 for axes in figure.axes)  # a band for each objective
    n, d, ratio = (dict(points(axes, "o")) for axes in figure.axes)
    assert {flops: d[flops] / n[flops] for flops in n} == pytest.approx(ratio, rel=1e-6)


def test_the_multiplier_has_a_panel_for_each_convention_and_a_point_at_each_budget(full: Study) -> None:
    _, fits = full
    figure = compute_multiplier(fits)
    assert [axes.get_xlabel() for axes in figure.axes] == [
        "training FLOPs of arm (6ND)",
        "training FLOPs of arm (6ND + attention + head)",
    ]
    entries = [entry for entry in fits.compute_multiplier if (entry.convention, entry.method) == ("6nd", "isoflop")]
    for axes in figure.axes:
        span = np.log10(axes.get_xlim()[1] / axes.get_xlim()[0])
        for marker in "osD^v":
            for x, _ in points(axes, marker):
                nearest = min(abs(np.log10(x / entry.reference_flops)) for entry in fits.compute_multiplier)
                assert nearest < 0.04 * span  # beside each other, and on their curve
    assert [y for _, y in points(figure.axes[0], "s")] == [entry.multiplier for entry in sorted_by_flops(entries)]


def test_the_asked_convention_has_the_first_panel(full: Study) -> None:
    figures = [study_figures(*full, convention)["multiplier"] for convention in ("6nd", "total")]
    assert [figure.axes[0].get_xlabel().partition("(")[2] for figure in figures] == [
        "6ND)", "6ND + attention + head)",
    ]  # fmt: skip
    assert len(figures[1].axes) == 2


def test_markers_tell_variants_apart(full: Study) -> None:
    table, _ = full
    other = table[table["objective"] == "llada"].assign(variant="loss_weight=ce", seed=2)
    both = pd.concat([table, other], ignore_index=True)
    fits = fit_table(both, samples=100, conventions=("6nd",))
    axes = scaling_curve(both, fits).axes[0]
    looks = {(line.get_marker(), line.get_color()) for line in axes.get_lines() if line.get_marker() in "osD^v"}
    assert len({marker for marker, _ in looks}) >= 2 and len({color for _, color in looks}) == 3
    ours = [(marker, color) for marker, color in looks if color != objective_styles(["arm"])["arm"].color]
    assert len({marker for marker, _ in ours}) == len(ours) == 2


def sorted_by_flops(entries: list[Multiplier]) -> list[Multiplier]:
    return sorted(entries, key=lambda entry: (entry.extrapolated, entry.reference_flops))


def test_an_extrapolated_multiplier_is_dashed_and_hollow(full: Study) -> None:
    inside = [Multiplier("llada", "arm", "6nd", "isoflop", flops, 2.0, 1.5, 3.0, False) for flops in (1e17, 1e18)]
    beyond = Multiplier("llada", "arm", "6nd", "isoflop", 1e19, 2.5, 1.0, np.inf, True)
    fits = replace(full[1], compute_multiplier=[*inside, beyond], multiplier_curve=[*inside, beyond])
    figure = compute_multiplier(fits)
    axes = figure.axes[0]
    solid = next(line for line in axes.get_lines() if line.get_linestyle() == "-" and len(line.get_xdata()) == 3)
    assert np.isnan(solid.get_ydata()).tolist() == [False, False, True]
    hollow = [line for line in axes.get_lines() if line.get_marker() == "s" and line.get_markerfacecolor() == "white"]
    assert [line.get_xdata()[0] for line in hollow] == [pytest.approx(1e19)]
    assert "beyond" in words(figure) and "envelope" not in words(figure) and "rejected" not in words(figure)
    assert all(np.isfinite(axes.get_ylim()))


def test_a_panel_without_a_multiplier_says_so(full: Study) -> None:
    """By one convention the objective reaches the reference's losses, by the other it does not."""
    by_6nd, by_total = (
        Multiplier(name, "arm", convention, "read-off", 1e17, 2.0, 1.5, 3.0, False)
        for name, convention in (("llada", "6nd"), ("easy", "total"))
    )
    entries = [by_6nd, replace(by_6nd, convention="total"), by_total]
    fits = replace(full[1], compute_multiplier=entries, multiplier_curve=[])
    fits = replace(fits, objectives={**fits.objectives, "easy": fits.objectives["llada"]})
    texts = [[text.get_text() for text in axes.texts] for axes in compute_multiplier(fits).axes]
    assert texts.count(["no multiplier\nby this count"]) == 1


def test_a_multiplier_whose_interval_is_not_known_has_no_bar(full: Study) -> None:
    fits = full[1]
    unknown = [replace(entry, low=np.nan, high=np.nan) for entry in fits.compute_multiplier]
    longest = []
    for entries in (fits.compute_multiplier, unknown):
        panel = compute_multiplier(replace(fits, compute_multiplier=entries, multiplier_curve=[])).axes[0]
        bars = [path.vertices for own in panel.collections for path in own.get_paths() if len(path.vertices) == 2]
        longest.append(max(np.ptp(bar[:, 1]) for bar in bars))
    assert longest[0] > 0.1 and longest[1] == 0


def test_a_doubted_method_is_grey_and_hollow_and_what_is_withheld_is_not_drawn(full: Study) -> None:
    good = [Multiplier("llada", "arm", "6nd", "isoflop", flops, 2.0, 1.5, 3.0, False) for flops in (1e17, 1e18)]
    bad = [replace(entry, method="envelope", doubt="arm's fit is rejected (p < 0.001)") for entry in good]
    beyond = replace(bad[0], reference_flops=1e19, extrapolated=True, withheld="its interval is open")
    entries = [*good, *bad, beyond]
    figure = compute_multiplier(replace(full[1], compute_multiplier=entries, multiplier_curve=entries))
    axes = figure.axes[0]
    assert [x for x, _ in points(axes, "v")] == pytest.approx([1e17, 1e18], rel=0.06)
    looks = {
        line.get_marker(): (line.get_color(), line.get_markerfacecolor())
        for line in axes.get_lines()
        if line.get_marker() in ("v", "s")
    }
    assert looks["v"] == (GREY, "white")
    assert looks["s"] == (METHODS["isoflop"].color, METHODS["isoflop"].color)
    assert "fit rejected" in words(figure)


def test_residuals_are_observed_over_predicted(full: Study) -> None:
    table, fits = full
    axes = parametric_residuals(table, fits).axes[0]
    law = fits.objectives["arm"].parametric
    assert law is not None
    runs = table[table["objective"] == "arm"]
    predicted = law.loss(runs["params_nonembedding"].to_numpy(float), runs["tokens"].to_numpy(float))
    residuals = 100 * (runs["val_nats_per_token"].to_numpy() / predicted - 1)
    drawn = [xy for container in axes.containers for xy in container[0].get_xydata()]  # type: ignore[index]
    assert np.sort(np.array(drawn)[:, 1]) == pytest.approx(np.sort(residuals))
    assert f"rms {100 * law.rms_residual:.2f} %" in axes.get_title()


def test_a_study_draws_what_it_has_the_data_for(full: Study, tmp_path: Path) -> None:
    table, fits = full
    scored = table.assign(task_piqa=60.0)
    assert set(study_figures(scored, fits)) == {"scaling", "isoflop", "optimum", "multiplier", "parametric", "tasks"}
    few = study()
    paths = draw_study(few, fit_table(few, samples=SAMPLES), tmp_path, "total")
    assert set(paths) == {"scaling", "multiplier"}
    assert paths["scaling"] == str(tmp_path / "scaling.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        f"{name}{suffix}" for name in paths for suffix in (".png", ".svg")
    )


def test_one_objective_and_one_budget_are_a_study_too() -> None:
    table, _ = simulated_study(CHINCHILLA, budgets=(1e18,))
    alone = table[table["objective"] == "llada"].reset_index(drop=True)
    figures = study_figures(alone, fit_table(alone, samples=SAMPLES))
    assert {"scaling", "isoflop", "optimum"} <= set(figures)
    assert "multiplier" not in figures
    assert [axes.get_title() for axes in figures["isoflop"].axes] == ["llada (bound, NELBO)"]
    for figure in figures.values():
        assert not figure.legends or "arm" not in words(figure)


def test_figures_without_a_fit_are_refused_in_one_line() -> None:
    table = study(budgets=(1e12,), shapes=("107k",))
    fits = fit_table(table, samples=SAMPLES)
    with pytest.raises(UserError, match="no compute multiplier"):
        compute_multiplier(fits)
    with pytest.raises(UserError, match="no parametric fit"):
        parametric_residuals(table, fits)


# --- the scaling curve ------------------------------------------------------------------------------------------------


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
