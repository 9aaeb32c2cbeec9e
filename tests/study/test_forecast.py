"""Forecasts: written before a run, kept as they are, and scored after it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from helpers.studies import CHINCHILLA, SIMULATED_BUDGETS, simulated_study
from llada_lightning.commands.main import main
from llada_lightning.study.fits import fit_table
from llada_lightning.study.forecast import Forecast, make_forecast, read_forecast, score
from llada_lightning.study.results import read_results, write_results

NEXT = 4e19
LATER = (*SIMULATED_BUDGETS, NEXT)


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A study, and the same with one more budget."""
    folder = tmp_path_factory.mktemp("forecasts")
    whole, _ = simulated_study(CHINCHILLA, budgets=LATER)
    first = whole[whole["flops_6nd"] < 1.1 * SIMULATED_BUDGETS[-1]]
    return {
        "first": write_results(first, folder / "first.csv"),
        "later": write_results(whole, folder / "later.csv"),
    }


def forecast(table: Path, out: Path, flops: float) -> int:
    return main(["forecast", str(table), f"--flops={flops}", "--samples", "300", "--out", str(out)])


def curves(table: Path, file: Path, out: Path, *words: str) -> int:
    return main(["curves", str(table), "--samples", "100", "--forecast", str(file), "--out", str(out), *words])


@pytest.fixture(scope="module")
def file(tables: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("forecast") / "forecast.json"
    assert forecast(tables["first"], out, NEXT) == 0
    return out


def test_every_law_predicts_every_objective_with_an_interval(file: Path, tables: dict[str, Path]) -> None:
    written = read_forecast(file)
    assert {(own.objective, own.method) for own in written.predictions} == {
        (objective, method) for objective in CHINCHILLA for method in ("joint", "isoflop", "parametric", "envelope")
    }
    assert written.results["largest_budgets"]["arm"] == pytest.approx(1e19, rel=0.01)
    for own in written.predictions:
        truth = CHINCHILLA[own.objective].best(NEXT)
        assert own.low < own.loss < own.high
        assert own.loss == pytest.approx(truth, rel=0.03)
        if own.method in ("joint", "parametric"):
            assert own.low < truth < own.high


def test_it_is_scored_when_the_budget_is_run(
    file: Path, tables: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in tables:
        assert curves(tables[name], file, tmp_path / name) == 0
        printed = capsys.readouterr().out
        assert ("not run" in printed) == (name == "first")
        scored = json.loads((tmp_path / name / "fits.json").read_text())["forecasts"]
        assert len(scored) == 8
        assert {own["observed"] is None for own in scored} == {name == "first"}
    for own in scored:
        assert own["inside"] == (own["low"] <= own["observed"] <= own["high"])
        assert own["relative_error"] == pytest.approx(own["loss"] / own["observed"] - 1)


@pytest.mark.slow
def test_intervals_hold_the_measured_loss_as_often_as_they_say() -> None:
    inside = []
    for seed in range(40):
        whole, _ = simulated_study(CHINCHILLA, seed, budgets=LATER)
        first = whole[whole["flops_6nd"] < 1.1 * SIMULATED_BUDGETS[-1]].reset_index(drop=True)
        fits, later = (fit_table(table, samples=300, conventions=("6nd",)) for table in (first, whole))
        inside += [own.inside for own in score(make_forecast(fits, first, [NEXT], "6nd", {}), later, whole)]
    assert 0.90 <= np.mean(inside) <= 1.0


def test_a_forecast_that_was_changed_is_not_scored(file: Path, tmp_path: Path) -> None:
    changed = json.loads(file.read_text())
    changed["predictions"][0]["loss"] *= 0.99
    path = tmp_path / "changed.json"
    path.write_text(json.dumps(changed))
    with pytest.raises(Exception, match="was changed after it was written"):
        read_forecast(path)


def test_a_forecast_is_never_replaced(file: Path, tables: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    before = file.read_bytes()
    assert forecast(tables["later"], file, 1e20) == 2
    assert "is there already" in capsys.readouterr().err
    assert file.read_bytes() == before


def test_it_is_read_as_it_was_made(file: Path) -> None:
    written = read_forecast(file)
    assert isinstance(written, Forecast)
    assert written == replace(written, sha256="")
    assert written.samples == 300
    assert written.created.endswith("+00:00")


@pytest.mark.parametrize(
    ("flops", "message"),
    [
        (1e18, "1e+18 FLOPs cannot be predicted; give --flops of 1.1 to 10 times a largest budget"),
        (1e21, "(1e+19 of arm, 1e+19 of llada)"),
        (-1.0, "budgets are positive"),
        (np.nan, "flops: nan given"),
    ],
)
def test_budgets_that_no_law_predicts(
    tables: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], flops: float, message: str
) -> None:
    assert forecast(tables["first"], tmp_path / "f.json", flops) == 2
    error = capsys.readouterr().err
    assert message in error
    assert not (tmp_path / "f.json").exists()


def test_other_data_and_other_units_are_refused(
    file: Path, tables: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = read_results(tables["later"]).assign(data_fingerprint="other")
    write_results(other, tmp_path / "other.csv")
    assert curves(tmp_path / "other.csv", file, tmp_path) == 2
    assert "it is of data_fingerprint 'd41d8cd9', and the results are of 'other'" in capsys.readouterr().err
    assert curves(tables["later"], file, tmp_path, "--unit", "bits_per_byte") == 2
    assert "its unit is nats_per_token" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["[]", "{}", '{"format": "llada-lightning forecast", "version": 9}'])
def test_what_is_no_forecast_is_told(
    tables: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    path = tmp_path / "f.json"
    path.write_text(content)
    assert curves(tables["first"], path, tmp_path) == 2
    assert "forecast" in capsys.readouterr().err
