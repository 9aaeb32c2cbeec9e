"""The second study: its report is that of its tables, its sweeps are fits, and its script for a GPU goes on."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
import yaml
from study2 import report

import outcomes
from llada_lightning.commands.main import main
from llada_lightning.study.fits import Estimate, LossLine
from llada_lightning.study.fits.rules import fit_rules
from llada_lightning.study.fits.uncertainty import UNKNOWN
from llada_lightning.study.results import read_results
from llada_lightning.study.sweep import fit_arguments, read_sweep, render_command

ROOT = Path(__file__).parents[2]
STUDY = ROOT / "experiments" / "study2"
SWEEPS = sorted((ROOT / "sweeps").glob("study2-cpu-*.yaml"))

STUB = """#!/usr/bin/env python3
# Stands for `llada`: notes its arguments, and writes the files that the next step looks for.
import pathlib, sys
words = sys.argv[1:]
with open("calls.txt", "a") as calls:
    print(*words, file=calls)
if words[:2] == ["plan", "--append"]:
    with open(words[2], "a") as sweep:
        print("# --append", file=sweep)
elif "--out" in words:
    out = pathlib.Path(words[words.index("--out") + 1])
    if "--rules" in words:
        (out / "rules.json").touch()
    elif out.suffix:
        out.touch()
"""


# --- the report ------------------------------------------------------------------------------------------------------


NUMBER = re.compile(r"-?\d[\d,]*\.?\d*(?:e[+-]?\d+)?")


def numbers(text: str) -> list[float]:
    return [float(number.replace(",", "")) for number in NUMBER.findall(text)]


@pytest.fixture(scope="module")
def committed() -> report.Study:
    """The committed tables, fitted once for all tests."""
    return report.Study(STUDY / "cpu")


@pytest.mark.slow
def test_the_report_follows_from_the_committed_tables(committed: report.Study, tmp_path: Path) -> None:
    """Word for word; numbers to the last digits that another processor's rounding may turn."""
    report.write(tmp_path / "docs" / "study2.md", committed, tmp_path)
    fresh, page = (tmp_path / "docs" / "study2.md").read_text(), (ROOT / "docs" / "study2.md").read_text()
    fresh, page = (re.sub(r"\]\([^)]*\)", "]()", text) for text in (fresh, page))
    assert NUMBER.sub("", fresh) == NUMBER.sub("", page)  # else: make study2-report
    assert numbers(fresh) == pytest.approx(numbers(page), rel=0.02, abs=0.002)


def test_the_readme_quotes_the_report(committed: report.Study) -> None:
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert committed.answer() in readme


def test_the_forecast_is_older_than_what_it_predicts(committed: report.Study) -> None:
    """It was made of results whose largest budgets are below those that it is about."""
    forecast = committed.forecast
    assert forecast is not None
    assert {own.flops for own in forecast.predictions} == {6.4e11, 8e12}
    assert max(forecast.results["largest_budgets"].values()) < 4.01e12
    assert forecast.results["largest_budgets"]["arm"] < 3.3e11


def line(multiple: float, exponent: float) -> LossLine:
    """A loss of (FLOPs / multiple)^-exponent, known exactly."""

    def loss(flops: npt.ArrayLike) -> np.ndarray:
        return (np.asarray(flops, float) / multiple) ** -exponent

    def drawn(flops: npt.ArrayLike) -> np.ndarray:
        return np.tile(loss(flops), (5, 1))

    return LossLine((1e6, 1e14), loss, drawn, np.nan, UNKNOWN, decades=0.0)


def test_a_multiplier_is_read_at_the_budgets_of_the_objective() -> None:
    """A loss that falls as C^-0.05 against one of (C / 40)^-0.05, and one that falls less steeply."""
    flops = np.geomspace(1e11, 1e12, 3)
    constant = report.cells(line(40.0, 0.05), line(1.0, 0.05), flops)
    assert [cell.flops for cell in constant] == pytest.approx(list(flops))
    for cell in constant:
        assert [cell.estimate.value, cell.estimate.low, cell.other_flops] == pytest.approx(
            [40, 40, cell.flops / 40], rel=1e-3
        )
        assert cell.inverse().estimate.value == pytest.approx(1 / 40, rel=1e-3)
    assert report.exponent(constant).value == pytest.approx(0.0, abs=1e-3)
    growing = report.cells(line(40.0, 0.04), line(1.0, 0.05), flops)  # C_arm = (C / 40)^0.8, so m = C^0.2 40^0.8
    assert report.exponent(growing).value == pytest.approx(0.2, abs=2e-3)


def test_of_the_recipes_with_few_tokens_the_best_length_counts() -> None:
    columns = ["variant", "unique_tokens", "epochs", "seed", "val_nats_per_token"]
    rows = [
        (None, 100, 2, 1, 4.4), (None, 100, 8, 1, 4.9), ("dropout=0.2", 100, 2, 1, 4.5),
        ("dropout=0.2", 100, 8, 1, 4.3), ("dropout=0.2", 100, 8, 2, 4.2), ("dropout=0.2", 100, 2, 2, 4.1),
        (None, 50, 1, 1, 4.0),
    ]  # fmt: skip
    table = pd.DataFrame(rows, columns=columns).assign(objective="arm")
    table["tokens"] = table["unique_tokens"] * table["epochs"]
    (key, (first, second)), *others = outcomes.few(table).items()
    assert key == (100, "arm") and not others  # a run that reads nothing twice does not tell what it was allowed
    assert (first.recipe, first.epochs) == ("dropout=0.2", 8)
    assert [first.best, first.apart, first.end] == pytest.approx([4.25, 0.1, 4.25])
    assert (second.recipe, second.best, second.epochs, second.end) == ("as in the main grid", 4.4, 2, 4.9)


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(31, 80, "as expected"), (20, 80, "undecided"), (20, 29, "refuted"), (91, np.inf, "refuted")],
)
def test_a_hypothesis_is_judged_by_the_interval(low: float, high: float, verdict: str) -> None:
    assert outcomes.judged(Estimate(low, low, high), 30, 90) == verdict
    assert outcomes.worst("as expected", verdict) == verdict
    assert outcomes.judged(None, 30, 90) == "undecided"


@pytest.mark.parametrize(
    ("llada", "verdict"), [((4.0, 4.0), "as expected"), ((4.2, 4.2), "refuted"), ((4.0, 3.8), "refuted")]
)
def test_the_crossover_is_where_arm_falls_behind(llada: tuple[float, float], verdict: str) -> None:
    def recipe(best: float) -> list[outcomes.Few]:
        return [outcomes.Few("", best, 0.0, 1.0, best)]

    few = {
        (size, name): recipe(best)
        for size, own in ((25_000, (4.1, llada[0])), (50_000, (3.9, llada[1])))
        for name, best in zip(("arm", "llada"), own, strict=True)
    }
    assert outcomes.crossover(few).verdict == verdict


def test_the_rules_of_arm_follow_from_the_committed_tuning_study() -> None:
    table = read_results(STUDY / "cpu" / "tune.csv")
    own = fit_rules(table[table["objective"] == "arm"], samples=200).objectives["arm"]
    committed = json.loads((STUDY / "rules.json").read_text())["objectives"]["arm"]
    for law, name in ((own.lr_law, "lr"), (own.batch_law, "batch_tokens")):
        assert law is not None
        assert [law.a, law.b] == pytest.approx([committed[name]["a"], committed[name]["b"]], rel=0.05, abs=0.05)


# --- the study on a GPU ----------------------------------------------------------------------------------------------


@pytest.fixture
def stub(tmp_path: Path) -> Path:
    path = tmp_path / "llada"
    path.write_text(STUB)
    path.chmod(0o755)
    return path


def run_gpu_study(folder: Path, *objectives: str, **settings: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "LLADA": str(folder / "llada"), **settings}
    command = ["bash", str(STUDY / "gpu.sh"), *objectives]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def calls(folder: Path, verb: str) -> list[str]:
    lines = (folder / "calls.txt").read_text().splitlines()
    return [line for line in lines if line.startswith(verb)]


@pytest.mark.usefixtures("stub")
def test_the_gpu_study_plans_each_part_once_and_forecasts_before_the_largest_budget(tmp_path: Path) -> None:
    assert run_gpu_study(tmp_path).returncode == 0
    whole = (tmp_path / "calls.txt").read_text().splitlines()
    forecast = next(number for number, line in enumerate(whole) if line.startswith("forecast"))
    assert [line.startswith("plan --append") for line in whole if line.startswith("plan")] == [False] * 6 + [True] * 3
    assert all(number > forecast for number, line in enumerate(whole) if line.startswith("plan --append"))
    assert whole[-1].startswith("report")
    (tmp_path / "calls.txt").unlink()
    assert run_gpu_study(tmp_path).returncode == 0
    assert not calls(tmp_path, "plan") and not calls(tmp_path, "forecast")
    assert len(calls(tmp_path, "sweep run")) == 9


@pytest.mark.usefixtures("stub")
def test_the_plans_of_the_gpu_study_are_plans(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every `llada plan` of the script but for files that only a study has: at its budgets and with its bases."""
    assert run_gpu_study(tmp_path, "arm", "easy", "llada", "block4").returncode == 0
    for line in calls(tmp_path, "plan"):
        if "--append" not in line:
            words = re.sub(r"--data \S+|--out \S+|--study \S+|--rule \S+", "", line).split()[1:]
            words = [str(ROOT / word) if word.startswith("experiments/") else word for word in words]
            assert main(["plan", *words, "--vocab-size", "258"]) == 0, line
    capsys.readouterr()


@pytest.mark.usefixtures("stub")
def test_another_objective_is_refused(tmp_path: Path) -> None:
    done = run_gpu_study(tmp_path, "uniform")
    assert done.returncode == 2
    assert done.stderr == "error: no objective 'uniform'; choose from arm, easy, llada and block4\n"


# --- the study on two cores ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "study", "shapes"),
    [
        ("few-arm", "study2-cpu-few", ["L1-d64-h2-kv2-ff192", "L1-d64-h2-kv2-ff192"]),
        ("few-llada", "study2-cpu-few", ["L1-d64-h2-kv2-ff192", "L1-d64-h2-kv2-ff192"]),
        ("few", "study2-cpu-few", ["L1-d64-h2-kv2-ff192", "L1-d64-h2-kv2-ff192"]),
        ("seeds", "study2-cpu", ["L1-d64-h2-kv2-ff192", "L1-d48-h2-kv2-ff160"]),
        ("seeds-easy", "study2-cpu", ["107k", "L2-d96-h3-kv3-ff256"]),
    ],
)
def test_the_runs_of_a_sweep_that_no_plan_made_are_fits(
    name: str, study: str, shapes: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    sweep = read_sweep(f"sweeps/study2-cpu-{name}.yaml")
    for point, shape in zip((sweep.points[0], sweep.points[-1]), shapes, strict=True):
        assert main([*fit_arguments(render_command(sweep, point)), "--print_config"]) == 0
        config = yaml.safe_load(capsys.readouterr().out)
        assert (config["data"]["init_args"]["path"], config["run"]["study"]) == ("data/study2", study)
        assert config["model"]["init_args"]["shape"] == shape


def test_make_runs_every_sweep_once_and_collects_every_table() -> None:
    shown = subprocess.run(["make", "-n", "study2-cpu"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    listed = re.search(r"for sweep in (.*?);", shown)
    assert listed is not None
    assert sorted(f"study2-cpu-{name}" for name in listed[1].split()) == sorted(path.stem for path in SWEEPS)
    for study in ("tune", "rules", "few"):
        assert re.search(rf"for study in .*\b{study}\b.*; do .* collect", shown), study
