"""SIGKILL at chosen moments - while something is written, within a global batch - loses nothing."""

from __future__ import annotations

import fcntl
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from test_branches import branch, budgets, records

from helpers.killed_calls import At, killed
from helpers.tiny_runs import SLOWER, fit, fit_arguments, losses, metrics, timeless, weights
from llada_lightning.checkpoints.run_folder import checkpoints_by_step
from llada_lightning.commands.main import main
from llada_lightning.study.sweep import Sweep
from llada_lightning.study.sweep.runner import SweepOutcome, run_sweep

SPEED = ("seconds", "mfu", "peak_memory_bytes")
SAVING = "llada_lightning.training.callbacks.checkpoints"


def rows(folder: Path) -> list[dict[str, str]]:
    """All of metrics.csv but how fast and in how much memory it was."""
    return [
        {key: value for key, value in row.items() if key not in SPEED and not key.endswith("_per_second")}
        for row in metrics(folder)
    ]


def moments_of_adam(folder: Path, step: int) -> list[torch.Tensor]:
    [state] = torch.load(folder / "checkpoints" / f"step={step:08d}.ckpt")["optimizer_states"]
    return [value for values in state["state"].values() for value in values.values()]


def assert_equal(folder: Path, whole: Path, steps: int = 24) -> None:
    """Bit for bit."""
    assert rows(folder) == rows(whole)
    mine, theirs = weights(folder, steps), weights(whole, steps)
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in theirs)
    assert all(
        torch.equal(a, b) for a, b in zip(*(moments_of_adam(run, steps) for run in (folder, whole)), strict=True)
    )
    assert timeless(folder) == timeless(whole)
    assert (folder / "validation.csv").read_text() == (whole / "validation.csv").read_text()


@pytest.mark.parametrize("extra", [(), ("--run.async_checkpoints=true",)], ids=["at once", "beside training"])
def test_a_kill_at_each_stage_of_a_save(prepared: Path, tmp_path: Path, extra: tuple[str, ...]) -> None:
    """Each start is killed in its second save, a step of the save later than the start before it."""
    whole = fit("llada", prepared, tmp_path / "whole")
    folder = tmp_path / "killed" / "test" / "run"
    stages = {
        At("torch:save", 2, "half"): ([5], "half"),
        At("os:fsync", 2): ([5, 10], "whole"),
        At(f"{SAVING}:put_in_place", 2): ([10, 15], "whole"),
        At(f"{SAVING}:put_in_place", 2, "after"): ([15, 20, 24], None),
    }
    for moment, (saved, partial_) in stages.items():
        assert killed(moment, main, fit_arguments("llada", prepared, tmp_path / "killed", *extra)), moment
        by_step = checkpoints_by_step(folder / "checkpoints")
        # Beside training a save may appear after the older ones were counted: then one more stays until the next save.
        older = len(by_step) - len(saved) if extra else 0
        assert older <= 1 and sorted(by_step)[older:] == saved, moment
        half = [path.stat().st_size for path in (folder / "checkpoints").glob("*.partial")]
        assert len(half) == (partial_ is not None), moment
        if half:
            size = by_step[saved[-1]].stat().st_size
            assert (half[0] < 0.6 * size) if partial_ == "half" else (half[0] > 0.9 * size), moment
        assert not (folder / "result.json").exists()
    fit("llada", prepared, tmp_path / "killed", *extra)
    assert not list((folder / "checkpoints").glob("*.partial"))
    assert_equal(folder, whole)


@pytest.mark.parametrize("objective", ["llada", *SLOWER])
def test_a_kill_within_a_global_batch_of_a_mixture(
    prepared: Path, prepared_second: Path, tmp_path: Path, objective: str
) -> None:
    """After the second of three micro-batches; a loader worker has fetched further ones by then."""
    words = [
        f"--data.path={{{prepared}: 3.0, {prepared_second}: 1.0}}",
        "--data.workers=1",
        "--data.global_batch=6",
        "--trainer.accumulate_grad_batches=3",
        "--trainer.max_steps=14",
    ]
    whole = fit(objective, prepared, tmp_path / "whole", *words)
    arguments = fit_arguments(objective, prepared, tmp_path / "killed", *words)
    after_a_micro_batch = "llada_lightning.training.callbacks.accounting:Accounting.on_train_batch_end"
    assert killed(At(after_a_micro_batch, 3 * 12 + 2, "after"), main, arguments)
    folder = tmp_path / "killed" / "test" / "run"
    assert 10 <= len(rows(folder)) < 13
    assert_equal(fit(objective, prepared, tmp_path / "killed", *words), whole, steps=14)


def test_kills_while_a_family_writes_its_branches(prepared: Path, tmp_path: Path) -> None:
    """In a branch's own save, before and after its record is written, and when its fork has been saved."""
    words = budgets(12, 24)
    whole = fit("arm", prepared, tmp_path / "whole", *words)
    folder = tmp_path / "killed" / "test" / "run"
    write, save = "llada_lightning.training.record:write_records", f"{SAVING}:put_in_place"
    for moment, budgets_reached in [
        (At(save, 3), 0),
        (At(write, 1), 0),
        (At(write, 1, "after"), 1),
        (At(save, 2, "after"), 1),
        (At(write, 1), 1),
    ]:
        assert killed(moment, main, fit_arguments("arm", prepared, tmp_path / "killed", *words)), moment
        reached = len(records(folder)) if (folder / "result.json").exists() else 0
        assert reached == budgets_reached, moment
    fit("arm", prepared, tmp_path / "killed", *words)
    assert timeless(folder) == timeless(whole) and timeless(whole)[0]["parent_checkpoint"]
    assert rows(folder) == rows(whole)
    for steps in (12, 24):
        assert losses(branch(folder, steps)) == losses(branch(whole, steps))
        assert all(
            torch.equal(a, b)
            for a, b in zip(*(moments_of_adam(branch(run, steps), steps) for run in (folder, whole)), strict=True)
        )


def test_a_killed_conversion_leaves_no_half_of_a_folder(prepared: Path, tmp_path: Path) -> None:
    run = fit("llada", prepared, tmp_path, "--trainer.max_steps=5")

    def words(out: str) -> list[str]:
        return ["convert", str(run), str(tmp_path / "to" / out), "--max-shard-size=20KB", "--json"]

    (tmp_path / "to").mkdir()
    assert main(words("whole")) == 0
    writer = "llada_lightning.checkpoints.convert:save_file"
    for moment in (At(writer, 2), At("llada_lightning.checkpoints.convert:write_json", 1, "after")):
        assert killed(moment, main, words("killed"))
        assert not (tmp_path / "to" / "killed").exists()
        [half] = (tmp_path / "to").glob(".killed.partial-*")
        assert any(half.iterdir())
    assert main(words("killed")) == 0
    folders = [{f.name: f.read_bytes() for f in (tmp_path / "to" / out).iterdir()} for out in ("whole", "killed")]
    assert folders[0] == folders[1] and len(folders[0]) > 3
    assert sorted(path.name for path in (tmp_path / "to").iterdir()) == ["killed", "whole"]


FIT = """
import fcntl, json, pathlib, sys
folder, gate = map(pathlib.Path, sys.argv[1:])
fcntl.flock(gate.open(), fcntl.LOCK_SH)
folder.mkdir()
(folder / "result.json").write_text(json.dumps([{"run": folder.name, "steps": 1, "status": "done"}]))
"""


def folder_in(study: Path, arguments: list[str]) -> Path:
    return study / arguments[1].removeprefix("--name=")


def launch_in(study: Path, arguments: list[str]) -> list[str]:
    return [sys.executable, "-I", "-S", "-c", FIT, str(folder_in(study, arguments)), str(study / "gate")]


def sweep_in(study: Path) -> SweepOutcome:
    """A sweep of two fits that wait while the file `gate` is locked."""
    sweep = Sweep("study", "llada", ("llada", "fit", "${args}"), ({"name": "a"}, {"name": "b"}))
    return run_sweep(sweep, partial(folder_in, study), launch=partial(launch_in, study), jobs=2)


def test_a_killed_sweep_leaves_its_fits_to_themselves_and_the_next_one_does_what_is_left(tmp_path: Path) -> None:
    with (tmp_path / "gate").open("w") as gate:
        fcntl.flock(gate, fcntl.LOCK_EX)
        assert killed(At("llada_lightning.study.sweep.runner:_Runner._ended", 1), sweep_in, tmp_path)
        outcome = sweep_in(tmp_path)
        assert [failed.reason for failed in outcome.failed] == ["another process is running it"] * 2
        assert (outcome.done, outcome.exit_code) == ([], 1)
    for name in "ab":  # a fit holds the lock of its log as long as it lives
        with (tmp_path / "logs" / f"{name}.log").open("a") as log:
            fcntl.flock(log, fcntl.LOCK_EX)
    outcome = sweep_in(tmp_path)
    assert (outcome.skipped, outcome.done, outcome.exit_code) == (["a", "b"], [], 0)
