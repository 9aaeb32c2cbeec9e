"""The committed tuning study: its rule file follows from its table, and plans."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llada_lightning.commands.main import main
from llada_lightning.study.fits import fit_table, usable_runs
from llada_lightning.study.forecast import read_forecast, score
from llada_lightning.study.results import read_covariance, read_results

TUNING = Path(__file__).parents[2] / "experiments" / "tuning"


@pytest.mark.parametrize("folder", [pytest.param(TUNING, id="whole"), pytest.param(TUNING / "hour", id="an hour")])
def test_the_rule_file_follows_from_the_committed_table(folder: Path, tmp_path: Path) -> None:
    assert main(["curves", str(folder / "results.csv"), "--rules", "--out", str(tmp_path)]) == 0
    found, committed = (json.loads((own / "rules.json").read_text()) for own in (tmp_path, folder))
    assert list(found["objectives"]) == list(committed["objectives"]) == ["arm", "llada"]
    for objective, rules in committed["objectives"].items():
        for name in ("lr", "batch_tokens"):
            law, own = rules[name], found["objectives"][objective][name]
            assert [own[key] for key in ("a", "b", "c0")] == pytest.approx(
                [law[key] for key in ("a", "b", "c0")], rel=1e-4
            )
            assert own["interval_a"] == pytest.approx(law["interval_a"], rel=0.05)


def test_the_rule_file_gives_each_objective_its_own_rate_and_batch(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "--flops", "1.1e12", "--rule", str(TUNING / "rules.json"), "--vocab-size", "512", "--json"]
    assert main([*words, "--sequence-length", "64", "--points", "3"]) == 0
    found = json.loads(capsys.readouterr().out)["runs"]
    rates = {name: {run["lr"] for run in found if run["objective"] == name} for name in ("arm", "llada")}
    assert list(rates["llada"]) == pytest.approx([1.37e-3], rel=0.05)  # by FLOPs alone, so one rate
    assert min(rates["arm"]) > 4 * max(rates["llada"])


def test_the_forecast_is_scored_by_the_results_that_came_after_it() -> None:
    table = read_results(TUNING / "forecasted.csv")
    fits = fit_table(table, covariance=read_covariance(TUNING / "forecasted.covariance.csv"), samples=200)
    forecast = read_forecast(TUNING / "forecast.json")
    assert forecast.results["runs"] == len(read_results(TUNING / "tuned.csv")) == len(table) - 3
    scored = {own.prediction.method: own for own in score(forecast, fits, usable_runs(table))}
    assert set(scored) == {"parametric", "envelope"}
    for own in scored.values():
        assert own.observed == pytest.approx(3.756, abs=0.01)
        assert own.inside
