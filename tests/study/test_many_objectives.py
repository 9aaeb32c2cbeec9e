"""Fits, report and figures of three objectives, and of variants of one: none is pooled with another."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from helpers.studies import VALLEYS, Valleys, simulated_study, study, true_multiplier
from llada_lightning.commands.curves import main as curves_command
from llada_lightning.objectives import OBJECTIVES, register
from llada_lightning.study.fits import fit_table, usable_runs
from llada_lightning.study.fits.agreement import no_common_loss
from llada_lightning.study.plots import plan_grid, study_figures, task_accuracy
from llada_lightning.study.results import write_results
from llada_lightning.study.tables.study import multiplier_table, print_study, runs_table
from llada_lightning.support.errors import UserError

Captured = pytest.CaptureFixture[str]
THIRD = replace(OBJECTIVES["llada"], name="third", label="third (bound)", colour="#009E73", line=":", marker="^")
WORLD = {**VALLEYS, "third": Valleys(3.7, 0.055, 5e7, 0.5)}
BUDGETS = (1e17, 1e18, 1e19)


@pytest.fixture(autouse=True)
def third(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table of objectives with a third one, for this test."""
    monkeypatch.setitem(OBJECTIVES, "third", THIRD)
    register(THIRD)  # the same again is no conflict


def three(**options: object) -> pd.DataFrame:
    return simulated_study(WORLD, noise=0.001, budgets=BUDGETS, **options)[0]  # type: ignore[arg-type]


def variants() -> pd.DataFrame:
    """Two objectives, and `llada` a second time without weight decay, 3 % worse."""
    table = simulated_study(VALLEYS, noise=0.001, budgets=BUDGETS)[0]
    other = table[table["objective"] == "llada"]
    other = other.assign(
        variant="optimizer.weight_decay=0", val_nats_per_token=1.03 * other["val_nats_per_token"], seed=2
    )
    return pd.concat([table, other], ignore_index=True)


def legend(figure: Figure) -> str:
    return "\n".join(text.get_text() for text in figure.legends[0].get_texts())


def test_each_objective_has_its_multiplier_against_the_reference() -> None:
    fits = fit_table(three(), samples=100, conventions=("6nd",))
    assert list(fits.objectives) == ["arm", "llada", "third"]
    assert (fits.reference, fits.compared) == ("arm", ["llada", "third"])
    assert {(entry.objective, entry.reference) for entry in fits.compute_multiplier} == {
        ("llada", "arm"), ("third", "arm"),
    }  # fmt: skip
    found = [entry for entry in fits.compute_multiplier if entry.method == "isoflop" and not entry.extrapolated]
    assert {entry.objective for entry in found} == {"llada", "third"}
    for entry in found:
        truth = true_multiplier(WORLD, entry.reference_flops, entry.objective)
        assert entry.multiplier == pytest.approx(truth, rel=0.1)
        assert entry.as_dict()["arm_flops"] == entry.reference_flops
        assert entry.yardstick == "bound"


def test_any_objective_can_be_the_reference() -> None:
    fits = fit_table(three(), samples=100, conventions=("6nd",), reference="third")
    assert fits.compared == ["arm", "llada"]
    found = [entry for entry in fits.compute_multiplier if entry.method == "isoflop" and not entry.extrapolated]
    assert {entry.objective for entry in found} == {"arm", "llada"}
    for entry in found:
        truth = true_multiplier(WORLD, entry.reference_flops, entry.objective, "third")
        assert entry.multiplier == pytest.approx(truth, rel=0.1)
        assert entry.reference == "third" and "arm_flops" not in entry.as_dict()
    printed = multiplier_table(fits, "6nd", "llada")
    assert printed.title == "Compute multiplier at equal loss, llada over third (6ND)"
    assert printed.columns[0].header == "third's budget"
    own = multiplier_table(fits, "6nd", "llada", own_budgets=True)
    assert str(own.title).endswith("llada over third (6ND), at llada's budgets")
    assert own.columns[0].header == "its budget"


def test_doubt_of_one_objective_marks_no_multiplier_of_another() -> None:
    """`third`'s best losses bend to and fro: its own multipliers are marked, those of `llada` are not."""
    budgets = tuple(np.geomspace(1e17, 1e19, 5))
    table = simulated_study(WORLD, noise=0.001, budgets=budgets)[0]
    places = np.abs(np.log(table["flops_6nd"].to_numpy())[:, None] - np.log(budgets)).argmin(axis=1)
    every_second = places % 2 == 0
    table.loc[(table["objective"] == "third") & every_second, "val_nats_per_token"] *= 1.04
    fits = fit_table(table, samples=200, conventions=("6nd",))
    entries = [entry for entry in fits.compute_multiplier if entry.method == "envelope"]
    assert {entry.doubt for entry in entries if entry.objective == "llada" and entry.shown} == {None}
    assert all("third's fit is rejected" in str(entry.doubt) for entry in entries if entry.objective == "third")
    assert "third's fit is rejected" in " ".join(str(entry.doubt) for entry in entries)


def test_objectives_without_a_common_loss_are_named() -> None:
    table = three()
    table.loc[table["objective"] == "third", "val_nats_per_token"] += 2
    fits = fit_table(table, samples=100, conventions=("6nd",))
    (note,) = [note for note in fits.notes if note.startswith("no common loss")]
    assert "third's from" in note and "larger ones for third" in note and "llada" not in note
    assert no_common_loss("llada", "arm", "6nd", fits.objectives, fits.compute_multiplier) is None


def test_without_the_default_reference_a_note_tells_it() -> None:
    table = three()
    fits = fit_table(table[table["objective"] != "arm"], samples=100, conventions=("6nd",))
    assert fits.reference is None and fits.compute_multiplier == []
    assert fits.notes[-1] == "no compute multiplier: the results hold no runs of arm; name another --reference"


def test_curves_of_three_objectives_by_another_reference(tmp_path: Path, capsys: Captured) -> None:
    table = study()
    llada = table[table["objective"] == "llada"]
    other = llada.assign(objective="third", val_nats_per_token=1.02 * llada["val_nats_per_token"])
    path = write_results(pd.concat([table, other]), tmp_path / "results.csv")
    options = [str(path), "--out", str(tmp_path / "out"), "--samples", "100"]
    assert curves_command([*options, "--reference", "llada"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    for title in ("arm over llada (6ND)", "third over llada (6ND)", "llada's budget"):
        assert title in out
    written = json.loads((tmp_path / "out/fits.json").read_text())
    assert {"arm", "llada", "third"} < set(written) and written["settings"]["reference"] == "llada"
    assert {(entry["objective"], entry["reference"]) for entry in written["compute_multiplier"]} == {
        ("arm", "llada"), ("third", "llada"),
    }  # fmt: skip
    names = ("objective", "reference", "convention", "yardstick", "method", "reference_flops", "multiplier", "low")
    assert set(names) < set(written["compute_multiplier"][0])
    with pytest.raises(UserError) as caught:
        curves_command([*options, "--reference", "fourth"])
    assert str(caught.value) == "reference: the results hold no runs of 'fourth'; choose from arm, llada, third"


def test_figures_of_three_objectives() -> None:
    table = three().assign(task_piqa=50.0)
    fits = fit_table(table, samples=100)
    figures = study_figures(table, fits)
    labels = ["arm (exact)", "llada (bound, NELBO)", "third (bound)"]
    assert [axes.get_title() for axes in figures["isoflop"].axes] == labels
    assert all(label in legend(figures["scaling"]) for label in labels)
    panels = figures["multiplier"].axes
    assert [axes.get_ylabel() for axes in panels if axes.get_ylabel()] == [
        "compute multiplier of llada", "compute multiplier of third",
    ]  # fmt: skip
    for name in ("optimum", "tasks"):
        assert "third" in legend(figures[name])


def test_a_plan_of_three_objectives_sets_them_side_by_side() -> None:
    table = pd.DataFrame(
        [
            {"objective": name, "budget": 1e12, "params_nonembedding": 1e5, "tokens_per_param": 20.0, "trunk": name}
            for name in ("arm", "llada", "third")
        ]
    )
    places = [float(line.get_xdata()[0]) for line in plan_grid(table).axes[0].get_lines()]
    assert places == pytest.approx([1e12 / 1.06, 1e12, 1e12 * 1.06])


# --- variants --------------------------------------------------------------------------------------------------------


def test_a_variant_is_fitted_by_itself() -> None:
    table = variants()
    fits = fit_table(table, samples=100, conventions=("6nd",))
    assert list(fits.objectives) == ["arm", "llada", "llada [weight_decay=0]"]
    default, other = (fits.objectives[name].envelope["6nd"] for name in list(fits.objectives)[1:])
    assert [point.replicates for point in default.points] == [1, 1, 1]
    losses = np.array([[point.loss for point in envelope.points] for envelope in (default, other)])
    assert losses[1] / losses[0] == pytest.approx([1.03] * 3)
    alone = fit_table(table[table["variant"].isna()], samples=100, conventions=("6nd",))
    for name in ("arm", "llada"):
        own, before = (found.objectives[name].isoflop["6nd"] for found in (fits, alone))
        assert [budget.n_opt.value for budget in own.budgets] == [budget.n_opt.value for budget in before.budgets]
    by_name = {
        entry.objective: entry.multiplier
        for entry in fits.compute_multiplier
        if entry.method == "isoflop" and entry.reference_flops == pytest.approx(1e17, rel=0.05)
    }
    assert by_name["llada [weight_decay=0]"] > 1.5 * by_name["llada"]


def test_variants_are_named_and_drawn_apart(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    table = variants()
    fits = fit_table(table, samples=100)
    print_study(table, fits, "6nd", ["fits.json"])
    out = capsys.readouterr().out
    assert "llada [weight_decay=0] over arm" in " ".join(out.split())
    tables = out.partition("To note:")[0]
    assert "…" not in tables and all(len(line.rstrip()) <= 80 for line in tables.splitlines())
    figures = study_figures(table, fits)
    titles = [" ".join(axes.get_title().split()) for axes in figures["isoflop"].axes]  # broken where they are long
    assert titles == ["arm (exact)", "llada (bound, NELBO)", "llada (bound, NELBO) [weight_decay=0]"]
    assert set(runs_table(table).columns[0].cells) >= {"llada", "llada [weight_decay=0]"}
    assert "llada [weight_decay=0]" in legend(task_accuracy(table.assign(task_piqa=50.0)))


def test_a_reference_of_several_variants_must_be_named() -> None:
    table = variants()
    llada = table["objective"] == "llada"
    table.loc[llada & table["variant"].isna(), "variant"] = "compat=llada"
    with pytest.raises(UserError, match=r"several variants of 'llada'; name one of llada \[compat=llada\], llada \[w"):
        fit_table(table, samples=100, reference="llada")
    fits = fit_table(table, samples=100, conventions=("6nd",), reference="llada [compat=llada]")
    assert fits.compared == ["arm", "llada [weight_decay=0]"]
    only = fit_table(table[llada], samples=100, conventions=("6nd",))
    assert only.reference is None and list(only.objectives) == ["llada [compat=llada]", "llada [weight_decay=0]"]


def test_the_same_result_of_two_variants_is_no_repetition() -> None:
    table = study().iloc[:1]
    twice = pd.concat([table, table, table.assign(variant="compat=llada")], ignore_index=True)
    assert usable_runs(twice)["objective"].tolist() == ["arm", "arm [compat=llada]"]
    assert usable_runs(usable_runs(twice))["objective"].tolist() == ["arm", "arm [compat=llada]"]
