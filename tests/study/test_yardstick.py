"""Named yardsticks: exact losses in place of the validation loss, never mixed with bounds without a word."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from helpers.studies import NATS_TO_BITS_PER_BYTE, record, sound, study
from llada_lightning.commands.curves import main as curves
from llada_lightning.commands.main import main
from llada_lightning.records import write_records, write_validation
from llada_lightning.study.fits import fit_table
from llada_lightning.study.plots import study_figures
from llada_lightning.study.results import read_covariance, read_results, table_of_records, write_results
from llada_lightning.study.yardstick import with_yardstick, yardstick_names
from llada_lightning.support.errors import UserError

GAP = 0.9
"""The exact loss over the bound, in every run of the table below."""


def measured(loss: float, stderr: float = 0.01, **others: float) -> dict[str, Any]:
    """What a record holds of the policy confidence@1, and of others by their losses."""

    def of(nats: float) -> dict[str, Any]:
        bits = nats * NATS_TO_BITS_PER_BYTE
        return {"nats_per_token": nats, "stderr": stderr, "bits_per_byte": bits, "documents": 9, "sequences": 20}

    return {"confidence@1": of(loss), **{name.replace("_at_", "@"): of(nats) for name, nats in others.items()}}


def policies(table: pd.DataFrame, without: int = 0) -> pd.DataFrame:
    """The table with a policy's exact loss in the rows of `llada`, but for the last few."""
    values = [
        json.dumps(measured(GAP * loss)) if objective == "llada" else None
        for objective, loss in zip(table["objective"], table["val_nats_per_token"], strict=True)
    ]
    values[len(values) - without :] = [None] * without
    return table.assign(val_policies=pd.Series(values, table.index, "string"))


TABLE = policies(study())


def test_the_loss_takes_the_place_of_the_validation_loss() -> None:
    found, notes = with_yardstick(TABLE, "confidence@1")
    arm, llada = (found[found["objective"] == name] for name in ("arm", "llada"))
    before = TABLE[TABLE["objective"] == "llada"]
    assert np.allclose(llada["val_nats_per_token"], GAP * before["val_nats_per_token"])
    assert np.allclose(llada["val_bits_per_byte"], GAP * before["val_bits_per_byte"])
    assert (llada["val_stderr"] == 0.01).all()
    pd.testing.assert_frame_equal(arm[TABLE.columns], TABLE[TABLE["objective"] == "arm"])
    assert set(found["val_kind"]) == {"exact"} and set(found["yardstick"]) == {"confidence@1"}
    assert dict(found.dtypes[TABLE.columns]) == dict(TABLE.dtypes)
    assert notes == ["yardstick confidence@1: 6 of 6 rows of arm keep their own exact loss"]
    assert yardstick_names(TABLE) == {"arm": [], "llada": ["confidence@1"]}


def test_rows_without_it_are_left_out_and_counted() -> None:
    found, notes = with_yardstick(policies(study(), without=2), "confidence@1")
    assert len(found) == len(TABLE) - 2
    assert notes[1] == "yardstick confidence@1: 2 of 6 rows of llada lack it and are left out"


def test_an_exact_objective_that_measured_it_has_it() -> None:
    rows = [
        sound(budget=1e12, val_policies=measured(3.5)),
        record("llada", "107k", 1e12, 5.0, val_policies=measured(4.5)),
    ]
    found, notes = with_yardstick(table_of_records(rows), "confidence@1")
    assert found["val_nats_per_token"].tolist() == [3.5, 4.5] and notes == []


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("margin@1", r"llada has no loss by 'margin@1'; its yardsticks are: confidence@1\. `llada validate"),
        ("../x", r"llada has no loss by '\.\./x'"),
        ("bound", "llada has no loss by 'bound'"),
    ],
)
def test_a_yardstick_that_the_table_lacks_names_what_it_has(name: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        with_yardstick(TABLE, name)


def test_a_table_without_any() -> None:
    with pytest.raises(UserError, match="llada has no loss by 'confidence@1'; its yardsticks are: none"):
        with_yardstick(study(), "confidence@1")
    arm = study()[lambda table: table["objective"] == "arm"]
    with pytest.raises(UserError, match="no row has a loss by 'confidence@1', and without it all losses are exact"):
        with_yardstick(arm, "confidence@1")


@pytest.mark.parametrize("value", ["[1]", "{", '{"confidence@1": {}}', '{"a/b": {"nats_per_token": 1}}', "3", '"x"'])
def test_damaged_values_are_one_line(value: str) -> None:
    with pytest.raises(UserError, match=r"val_policies holds .*, which no run writes; collect the table again"):
        with_yardstick(TABLE.assign(val_policies=value), "confidence@1")


def test_a_policy_without_error_or_bytes_leaves_them_unknown() -> None:
    loss = measured(4.0)
    loss["confidence@1"] |= {"stderr": None, "bits_per_byte": None}
    found, _ = with_yardstick(table_of_records([record("llada", "107k", 1e12, 5.0, val_policies=loss)]), "confidence@1")
    assert np.isnan(found["val_stderr"][0]) and np.isnan(found["val_bits_per_byte"][0])


# --- fits and figures -------------------------------------------------------------------------------------------------


def test_bounds_and_exact_values_are_never_fitted_together() -> None:
    exact, _ = with_yardstick(TABLE, "confidence@1")
    with pytest.raises(UserError, match=r"yardsticks are mixed \(confidence@1, the validation loss\)"):
        fit_table(pd.concat([exact, study()], ignore_index=True), samples=100)
    with pytest.raises(UserError, match="val_kind of llada is 'exact'; it must be 'bound'"):
        fit_table(exact.drop(columns="yardstick"), samples=100)
    with pytest.raises(UserError, match="val_kind of llada is 'bound'; it must be 'exact'"):
        fit_table(TABLE.assign(yardstick="confidence@1"), samples=100)
    two, _ = with_yardstick(TABLE.assign(val_policies=json.dumps(measured(4.0, margin_at_2=3.9))), "margin@2")
    with pytest.raises(UserError, match="yardsticks are mixed"):
        fit_table(pd.concat([exact, two], ignore_index=True), samples=100)


def test_the_multiplier_is_that_of_the_exact_losses_and_names_them() -> None:
    exact, _ = with_yardstick(TABLE, "confidence@1")
    by_bound, by_exact = (fit_table(table, samples=200) for table in (TABLE, exact))
    assert (by_bound.yardstick, by_exact.yardstick) == (None, "confidence@1")
    first, second = (fits.compute_multiplier[0] for fits in (by_bound, by_exact))
    assert (first.yardstick, first.kind, second.yardstick, second.kind) == ("bound", "bound", "confidence@1", "exact")
    # loss = a (C / 1e12)^-b: a loss that is lower by a factor needs fewer FLOPs by its root b.
    assert second.multiplier / first.multiplier == pytest.approx(GAP ** (1 / 0.08), rel=0.1)
    assert "yardstick" not in by_bound.as_dict()["settings"] and "kind" not in first.as_dict()
    assert by_exact.as_dict()["settings"]["yardstick"] == "confidence@1"
    entry = by_exact.as_dict()["compute_multiplier"][0]
    assert (entry["yardstick"], entry["kind"]) == ("confidence@1", "exact") and "named" not in entry


def texts_of(figure: Figure) -> str:
    words = [figure.get_suptitle()]
    for axes in figure.axes:
        words += [axes.get_title(), axes.get_ylabel(), axes.get_xlabel()]
    return "\n".join([*words, *(text.get_text() for legend in figure.legends for text in legend.get_texts())])


def test_figures_name_the_yardstick() -> None:
    exact, _ = with_yardstick(TABLE, "confidence@1")
    for name, figure in study_figures(exact, fit_table(exact, samples=100)).items():
        assert figure.get_suptitle() == "yardstick: confidence@1, exact", name
        assert "bound" not in texts_of(figure)
    shown = texts_of(study_figures(exact, fit_table(exact, samples=100))["scaling"])
    assert "exact loss by confidence@1 (nats/token)" in shown
    assert "llada (exact, confidence@1)" in shown and "arm (exact)\n" in shown
    plain = texts_of(study_figures(TABLE, fit_table(TABLE, samples=100))["scaling"])
    assert "validation loss (nats/token)" in plain and "yardstick" not in plain


# --- the commands -----------------------------------------------------------------------------------------------------


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Two budgets of each objective, with the losses of eight documents under the bound and under a policy."""
    generator = np.random.default_rng(0)
    hard_G = generator.normal(size=8)
    for objective in ("arm", "llada"):
        for budget in (1e12, 3e12):
            own = record(objective, "107k", budget, 4.0)
            folder = tmp_path / "runs" / str(own["run"])
            bound_G, exact_G = (4 + 0.1 * generator.normal(size=8) + scale * hard_G for scale in (0.3, 0.8))
            if objective == "llada":
                own["val_policies"] = measured(float(exact_G.mean()), 0.3)
                write_validation(
                    folder, own["steps"], [(g, 2, x) for g, x in enumerate(exact_G)], policy="confidence@1"
                )
            write_validation(folder, own["steps"], [(g, 2, x) for g, x in enumerate(bound_G)])
            write_records(folder, [own])
    return tmp_path / "runs"


def test_collect_writes_the_covariance_of_each_yardstick(runs: Path, tmp_path: Path) -> None:
    out = tmp_path / "results.csv"
    (tmp_path / "results.margin@2.covariance.csv").write_text("of another table")
    (tmp_path / "results.mine.covariance.csv").write_text("of results.mine.csv")
    assert main(["collect", str(runs), "--out", str(out)]) == 0
    assert not (tmp_path / "results.margin@2.covariance.csv").exists()
    assert (tmp_path / "results.mine.covariance.csv").exists()
    bound, exact = (read_covariance(tmp_path / f"results{name}.covariance.csv") for name in ("", ".confidence@1"))
    assert list(bound.index) == list(exact.index) and len(exact) == 4
    arm = [name for name in exact.index if name.startswith("arm")]
    assert np.array_equal(bound.loc[arm, arm], exact.loc[arm, arm])
    llada = [name for name in exact.index if name.startswith("llada")]
    assert (np.diag(exact.loc[llada, llada]) > 2 * np.diag(bound.loc[llada, llada])).all()
    assert yardstick_names(read_results(out))["llada"] == ["confidence@1"]


def test_curves_take_the_covariance_of_their_yardstick(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("llada_lightning.study.plots.write_figure", lambda figure, folder, name: Path(folder) / name)
    out = tmp_path / "results.csv"
    assert main(["collect", str(runs), "--out", str(out)]) == 0
    asked = [str(out), "--out", str(tmp_path / "out"), "--samples", "200", "--yardstick", "confidence@1"]
    assert curves(asked) == 0
    assert "Yardstick: confidence@1" in capsys.readouterr().out
    fits = json.loads((tmp_path / "out" / "fits.json").read_text())
    assert fits["settings"]["noise_model"] == "covariance"
    assert fits["notes"][0] == "yardstick confidence@1: 2 of 2 rows of arm keep their own exact loss"
    (tmp_path / "results.confidence@1.covariance.csv").unlink()
    assert curves(asked) == 0
    fits = json.loads((tmp_path / "out" / "fits.json").read_text())
    assert fits["settings"]["noise_model"] == "standard errors"  # never that of the bounds


def test_a_yardstick_of_nothing_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(write_results(study(), tmp_path / "results.csv"))
    for given, words in (
        ([path, "--yardstick", "confidence@1"], "yardstick: llada has no loss by 'confidence@1'"),
        (["published", "--yardstick", "confidence@1"], "yardstick: llada has no loss by 'confidence@1'"),
        ([path, "--yardstick", "confidence@1", "--rules"], "curves: --rules fits the validation loss"),
    ):
        assert main(["curves", *given, "--out", str(tmp_path / "out")]) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: {words}"), line
    assert not (tmp_path / "out").exists()
