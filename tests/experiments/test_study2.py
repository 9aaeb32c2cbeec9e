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
from measured import Study, exponent, over

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
def committed() -> Study:
    """The committed tables, fitted once for all tests."""
    return Study(STUDY / "cpu")


@pytest.mark.slow
def test_the_report_follows_from_the_committed_tables(committed: Study, tmp_path: Path) -> None:
    """Word for word; numbers to the last digits that another processor's rounding may turn."""
    report.write(tmp_path / "docs" / "study2.md", committed, tmp_path)
    fresh, page = (tmp_path / "docs" / "study2.md").read_text(), (ROOT / "docs" / "study2.md").read_text()
    fresh, page = (re.sub(r"\]\([^)]*\)", "]()", text) for text in (fresh, page))
    assert NUMBER.sub("", fresh) == NUMBER.sub("", page)  # else: make study2-report
    assert numbers(fresh) == pytest.approx(numbers(page), rel=0.02, abs=0.002)


def test_the_readme_quotes_the_report(committed: Study) -> None:
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert report.answer(committed) in readme


def test_the_forecast_is_older_than_what_it_predicts(committed: Study) -> None:
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
    constant = [over(line(40.0, 0.05), line(1.0, 0.05), own)[0] for own in flops]
    for entry, own in zip(constant, flops, strict=True):
        assert [entry.objective_flops, entry.multiplier, entry.low, entry.reference_flops] == pytest.approx(
            [own, 40, 40, own / 40], rel=1e-3
        )
    assert exponent(constant).value == pytest.approx(0.0, abs=1e-3)
    growing = [over(line(40.0, 0.04), line(1.0, 0.05), own)[0] for own in flops]  # C_arm = (C / 40)^0.8
    assert exponent(growing).value == pytest.approx(0.2, abs=2e-3)


def test_the_last_block_of_a_denoiser_computes_a_part_of_what_is_counted(committed: Study) -> None:
    """`easy` with two blocks of width 64 scores 32.5 % of its positions, and `uniform` all."""
    assert committed.computed("uniform") == 1.0
    assert committed.best("easy").shape == "107k"
    tokens = committed.tokens(committed.best("easy").run)
    left_out = 6 * (1 - 0.325) * (64 * 64 + 3 * 64 * 192)
    assert committed.computed("easy") == pytest.approx(1 - left_out * tokens / 8e12, rel=0.002)
    one_block = committed.computed("llada")
    copied = committed.computed("block 4")  # whose copy computes keys and values alone
    assert copied < one_block < committed.computed("easy")


def test_half_of_the_warmup_is_beside_the_main_grid_by_seed(committed: Study) -> None:
    """`llada` ends where it does with the whole one; of `easy` the main grid has one seed at the largest budget."""
    found = committed.half_warmup()
    assert [[len(gaps) for _, gaps in own] for own in (found["llada"], found["easy"])] == [[2] * 4, [2, 2, 2, 1]]
    assert [flops for flops, _ in found["llada"]] == pytest.approx([1e12, 2e12, 4e12, 8e12], rel=1e-3)
    assert found["llada"][0][1] == pytest.approx([4.535930 - 4.564114, 5.072940 - 4.719003], abs=1e-5)
    assert max(abs(gap) for _, gaps in found["llada"][2:] for gap in gaps) < 0.011


def test_without_its_correction_a_best_loss_is_lower(committed: Study) -> None:
    for name in committed.others:
        assert committed.best(name).loss <= committed.loss(name)
        assert committed.uncorrected(name) == pytest.approx(committed.total[name][-1].multiplier, rel=0.3)


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
    assert (first.recipe, second.recipe) == ("dropout=0.2", "none of these")
    assert first.losses == pytest.approx({200: 4.3, 800: 4.25})
    assert [first.best, first.apart, second.best] == pytest.approx([4.25, 0.1, 4.4])
    assert first.gains and not second.gains


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(31, 80, "as expected"), (20, 80, "undecided"), (20, 29, "refuted"), (91, np.inf, "refuted")],
)
def test_a_hypothesis_is_judged_by_the_interval(low: float, high: float, verdict: str) -> None:
    assert outcomes.judged(Estimate(low, low, high), 30, 90) == verdict
    assert outcomes.worst("as expected", verdict) == verdict
    assert outcomes.judged(None, 30, 90) == "undecided"


@pytest.mark.parametrize(
    ("llada", "gains", "verdict"),
    [
        ((4.0, 4.0), False, "as expected"),
        ((4.2, 4.2), False, "refuted"),
        ((4.2, 4.2), True, "undecided"),
        ((4.0, 3.8), False, "refuted"),
    ],
)
def test_the_crossover_is_where_arm_falls_behind(llada: tuple[float, float], gains: bool, verdict: str) -> None:
    """Where `llada` is behind, and its longest run is its best, a longer one might have crossed."""
    few = {
        (size, name): [outcomes.Few("", {1: best + 0.1 * gains, 2: best + 0.1 * (not gains)}, 0.0)]
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
        ("few-long", "study2-cpu-few", ["L1-d64-h2-kv2-ff192", "L1-d64-h2-kv2-ff192"]),
        ("largest", "study2-cpu-largest", ["L1-d64-h2-kv2-ff192", "L1-d64-h2-kv2-ff192"]),
        ("warmup", "study2-cpu-warmup", ["L1-d64-h2-kv2-ff192", "L1-d64-h2-kv2-ff192"]),
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
    shown = {
        target: subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for target in ("study2-cpu", "study2-cpu-more")
    }
    names = [name for own in shown.values() for name in re.findall(r"^for sweep in (.*?);", own, re.M)[0].split()]
    assert sorted(f"study2-cpu-{name}" for name in names) == sorted(path.stem for path in SWEEPS)
    for own in shown.values():
        assert re.search(r"^for runs in runs/study2-cpu-\*; do .* collect \$runs --out runs/study2/", own, re.M)
        assert re.search(r" collect runs/study2-cpu --out runs/study2/results\.csv$", own, re.M)
