"""The loss of a run by noise level: what is read from its log, drawn, printed and refused."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from llada_lightning.commands.curves import main as curves
from llada_lightning.commands.main import main
from llada_lightning.records import NOISE_LEVELS, level_columns
from llada_lightning.study.levels import MOST_WINDOWS, read_levels
from llada_lightning.study.plots.levels import loss_by_level
from llada_lightning.support.errors import UserError

Captured = pytest.CaptureFixture[str]


def loss_at(step: int, n: int) -> float:
    """A loss that falls with the steps and rises with the level."""
    return 5 - step / 100 + n / 10


def write_run(folder: Path, steps: int = 100, module: str = "LladaModule") -> Path:
    """A log of every second step, with four validations; no step has a token in the second bin but step 2, whose loss
    in the last bin is not a number."""
    lines = [",".join(("step", "train_nats_per_token", *level_columns("train"), *level_columns("val")))]
    for step in range(2, steps + 1, 2):
        trained = [f"{loss_at(step, n)}" for n in range(NOISE_LEVELS)]
        if step == 2:
            trained[-1] = "nan"
        else:
            trained[1] = ""
        validated = [f"{loss_at(step, n) + 1}" if step % (steps // 4) == 0 else "" for n in range(NOISE_LEVELS)]
        lines.append(",".join([str(step), "4.0", *trained, *validated]))
    folder.mkdir(parents=True)
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n99,3.9,4.")  # a kill cut the last line short
    (folder / "config.yaml").write_text(f"model: {{class_path: llada_lightning.training.{module}}}\n")
    return folder


def test_windows_are_means_of_rows_and_validations_are_single_ones(tmp_path: Path) -> None:
    levels = read_levels(write_run(tmp_path / "runs" / "s" / "one"))
    assert levels.run == "one" and levels.objective is not None and levels.objective.name == "llada"
    train, val = levels.curves["train"], levels.curves["val"]
    assert len(train.steps) == MOST_WINDOWS and train.steps[-1] == 100
    steps_of_first = range(2, train.steps[0] + 1, 2)
    assert train.nats_WT[0, 0] == pytest.approx(np.mean([loss_at(step, 0) for step in steps_of_first]))
    assert train.nats_WT[0, -1] == pytest.approx(np.mean([loss_at(step, 9) for step in steps_of_first[1:]]))
    assert train.nats_WT[0, 1] == loss_at(2, 1) and np.isnan(train.nats_WT[1:, 1]).all()
    assert val.steps == [50, 100]
    np.testing.assert_allclose(val.nats_WT, [[loss_at(step, n) + 1 for n in range(10)] for step in (50, 100)])


def test_of_many_validations_the_first_and_the_last_are_shown(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    lines = [f"{step}{',' * 12}{','.join(['3.0'] * 10)}" for step in range(101, 131)]
    with (run / "metrics.csv").open("w") as file:
        file.write("\n".join([",".join(("step", "x", *level_columns("train"), *level_columns("val"))), *lines]) + "\n")
    levels = read_levels(run)
    assert list(levels.curves) == ["val"]
    assert len(levels.curves["val"].steps) == MOST_WINDOWS
    assert (levels.curves["val"].steps[0], levels.curves["val"].steps[-1]) == (101, 130)
    assert len(loss_by_level(levels).axes) == 2  # the panel, and the scale of the steps


def test_a_branch_knows_its_objective(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path / "run", module="modules.BlockDiffusionModule")
    branch = write_run(run / "branches" / "60")
    (branch / "config.yaml").unlink()
    monkeypatch.chdir(branch)
    levels = read_levels(Path("."))
    assert (levels.run, levels.objective and levels.objective.name) == ("60", "block")
    (run / "config.yaml").unlink()
    assert read_levels(run).objective is None
    assert loss_by_level(read_levels(run)).axes


def test_the_figure_has_a_line_for_each_window_darker_the_later(tmp_path: Path) -> None:
    levels = read_levels(write_run(tmp_path / "run"))
    train, val, _ = loss_by_level(levels).axes
    assert [len(panel.lines) for panel in (train, val)] == [MOST_WINDOWS, 2]
    brightness = [sum(line.get_color()[:3]) for line in train.lines]
    assert brightness == sorted(brightness, reverse=True) and brightness[0] > brightness[-1] + 0.3
    assert len(train.lines[-1].get_xdata()) == NOISE_LEVELS - 1  # the bin without tokens is left out
    np.testing.assert_allclose(val.lines[-1].get_ydata(), levels.curves["val"].nats_WT[-1])


def test_the_command_draws_and_prints(tmp_path: Path, capsys: Captured) -> None:
    run = write_run(tmp_path / "run")
    assert curves([str(run), "--by-level", "--out", str(tmp_path / "out")]) == 0
    for name in ("levels.png", "levels.svg"):
        assert (tmp_path / "out" / name).stat().st_size > 5_000
    out = capsys.readouterr().out
    rows = {words[0]: words[1:] for words in map(str.split, out.splitlines()) if words and "–" in words[0]}
    assert (min(rows), max(rows), len(rows)) == ("0.1–0.2", "0–0.1", NOISE_LEVELS)
    assert rows["0–0.1"][-2:] == ["5.500", "5.000"]  # the validations at steps 50 and 100
    assert len(rows["0.1–0.2"]) == 3, "a bin without tokens is an empty cell"
    assert all(words in out for words in ("train 14", "train 100", "val 50", "val 100", "levels.png"))

    assert curves([str(run), "--by-level", "--out", str(tmp_path / "out"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["objective"] == "llada" and found["levels"][0] == 0.05 and found["val"]["steps"] == [50, 100]
    assert found["train"]["nats_per_scored_token"][1][1] is None
    assert Path(found["figure"]).is_file()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "has no metrics.csv; --by-level needs the folder of a run, or of one of its branches"),
        ("step,train_nats_per_token\n1,4.0\n", "has no loss by noise level"),
        (f"step,{','.join(level_columns('train'))}\n1{',' * 10}\n", "has no loss by noise level"),
        ("", "has no loss by noise level"),
        (f"stop,{level_columns('train')[0]}\n1,4.0\n", "is damaged ('step'); it cannot be drawn"),
        (f"step,{level_columns('train')[0]}\n1,four\n", "is damaged (could not convert string to float: 'four')"),
    ],
)
def test_a_folder_without_such_losses_is_one_line(
    text: str | None, message: str, tmp_path: Path, capsys: Captured
) -> None:
    if text is not None:
        (tmp_path / "metrics.csv").write_text(text)
    assert main(["curves", str(tmp_path), "--by-level", "--out", str(tmp_path / "out")]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (tmp_path / "out").exists()


def test_a_pipe_in_the_place_of_the_log_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "metrics.csv")
    with pytest.raises(UserError, match="not a regular file"):
        read_levels(tmp_path)


@pytest.mark.parametrize("option", ["--rules", "--paper", "--reference=llada", "--yardstick=confidence@1"])
def test_what_belongs_to_a_table_is_refused(option: str, tmp_path: Path, capsys: Captured) -> None:
    run = write_run(tmp_path / "run")
    assert main(["curves", str(run), "--by-level", "--out", str(tmp_path), option]) == 2
    name = option.partition("=")[0]
    said = f"error: curves: {name} belongs to a table of results, and --by-level to one run; leave one out\n"
    assert capsys.readouterr().err == said


@pytest.mark.parametrize(
    ("module", "unit"),
    [
        ("LladaModule", "nats per masked token"),
        ("modules.BlockDiffusionModule", "nats per masked token"),
        ("modules.UniformDiffusionModule", "nats per token, of all positions"),
        ("SomeModule", "nats per scored token"),
    ],
)
def test_the_heading_says_of_which_tokens_the_losses_are(
    module: str, unit: str, tmp_path: Path, capsys: Captured
) -> None:
    run = write_run(tmp_path / "run", module=module)
    assert loss_by_level(read_levels(run)).axes[0].get_ylabel() == f"loss ({unit})"
    assert curves([str(run), "--by-level", "--out", str(tmp_path / "out")]) == 0
    assert f"run: {unit}, by noise level, up to a step" in capsys.readouterr().out
