"""Bad numbers: the update is skipped, on all ranks; the run goes on, says so, and ends where nothing else comes."""

from __future__ import annotations

import json
import math
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.poison import callbacks, poison
from helpers.tiny_runs import fit, fit_arguments, fit_process, kill_at, losses, metrics, record, weights
from llada_lightning.commands.main import main
from llada_lightning.records import has_diverged, is_done, read_faults
from llada_lightning.study.collect import collect
from llada_lightning.training.guard import WINDOW, Fault, UpdateGuard

TRUSTED = {"LLADA_TRUSTED_MODULES": "helpers"}
EVERY_STEP = ("--run.checkpoint_every_steps=1", "--run.keep_checkpoints=99")
FOREVER = ("--model.schedule.lr=1e30", "--trainer.gradient_clip_val=null", "--guard.patience=3")


@pytest.fixture(autouse=True)
def trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLADA_TRUSTED_MODULES", TRUSTED["LLADA_TRUSTED_MODULES"])


def checkpoint(folder: Path, step: int) -> dict[str, Any]:
    return torch.load(folder / "checkpoints" / f"step={step:08d}.ckpt")


def same(left: Any, right: Any) -> bool:
    """Equal to the last bit."""
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    return bool(left == right)


def test_a_skipped_step_leaves_the_weights_and_moves_everything_else(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = ("--trainer.max_steps=8", *EVERY_STEP)
    whole = fit("llada", prepared, tmp_path / "whole", *short)
    bad = callbacks(poison(losses=(4,), gradients=(6,)))
    capsys.readouterr()
    folder = fit("llada", prepared, tmp_path / "bad", *short, bad)
    for step in (4, 6):
        before, after = checkpoint(folder, step - 1), checkpoint(folder, step)
        assert same(before["state_dict"], after["state_dict"])
        assert same(before["optimizer_states"][0]["state"], after["optimizer_states"][0]["state"])
    assert not same(checkpoint(folder, 4)["state_dict"], checkpoint(folder, 5)["state_dict"])
    for name in ("step", "tokens", "flops_total", "lr"):
        assert [row[name] for row in metrics(folder)] == [row[name] for row in metrics(whole)]
    assert losses(folder)[:3] == losses(whole)[:3]
    assert [row["skipped_updates"] for row in metrics(folder)] == list("00011222")
    rows = [tuple(row.values()) for row in read_faults(folder)]
    assert [row[:2] + row[4:] for row in rows] == [
        ("4", "loss", "24", "31", "skipped"),
        ("6", "gradient", "40", "47", "skipped"),
    ]
    assert rows[0][2:4] == ("nan", "nan") and math.isfinite(float(rows[1][2]))
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("step 4:")]
    assert line == (
        "step 4: loss nan, gradient norm nan, sequences 24-31: update skipped; "
        f"llada replay {folder} --step 4 shows them"
    )
    assert record(folder)["status"] == "done"
    _, report = collect([folder])
    assert report.lines() == [f"skipped updates, see faults.csv: {folder} (2)"]
    _, nothing = collect([whole])
    assert nothing.lines() == [] and not (whole / "faults.csv").exists()
    assert main(["replay", str(folder), "--step", "4"]) == 0  # a fault of the machine does not come back
    replayed = capsys.readouterr().out
    assert "update made" in replayed and "the run saw: loss nan" in replayed


def test_a_clip_that_is_no_number_reaches_no_weight(prepared: Path, tmp_path: Path) -> None:
    """The gradient is sound, and what the clip makes of it is not."""
    short = ("--trainer.max_steps=6", *EVERY_STEP)
    folder = fit("llada", prepared, tmp_path, *short, callbacks(poison(clips=(4,))))
    before, after = checkpoint(folder, 3), checkpoint(folder, 4)
    assert same(before["state_dict"], after["state_dict"])
    assert same(before["optimizer_states"][0]["state"], after["optimizer_states"][0]["state"])
    [fault] = read_faults(folder)
    assert (fault["step"], fault["kind"], fault["action"]) == ("4", "gradient", "skipped")
    assert record(folder)["status"] == "done"
    assert math.isfinite(float(metrics(folder)[3]["grad_norm"]))


def test_weights_that_are_no_numbers_are_never_saved(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An update may be sound in its gradient and still make them so; the run ends at the next checkpoint."""
    folder = fit("llada", prepared, tmp_path, callbacks(poison(weights=(10,))))
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step=00000005.ckpt"]
    found = record(folder)
    assert (found["status"], found["steps"], found["val_nats_per_token"]) == ("diverged", 10, None)
    said = "diverged: weights are not finite after step 10; last good checkpoint: "
    assert f"{said}{folder / 'checkpoints' / 'step=00000005.ckpt'}; lower" in capsys.readouterr().err


def test_a_short_run_without_any_update_has_diverged(prepared: Path, tmp_path: Path) -> None:
    """Its weights are the first ones, whose loss is finite, and no result."""
    short = "--trainer.max_steps=6"
    folder = fit("llada", prepared, tmp_path / "none", short, callbacks(poison(losses=(1, 2, 3, 4, 5, 6))))
    assert (record(folder)["status"], record(folder)["val_nats_per_token"]) == ("diverged", None)
    folder = fit("llada", prepared, tmp_path / "one", short, callbacks(poison(losses=(1, 3, 4, 5, 6))))
    assert record(folder)["status"] == "done"


def test_a_healthy_run_is_the_same_bit_for_bit_without_a_guard(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where its spikes are reported: here everything counts as one that lies above the median of 4 steps."""
    monkeypatch.setattr("llada_lightning.training.guard.WINDOW", 4)
    short = "--trainer.max_steps=12"
    guarded = fit("llada", prepared, tmp_path / "guarded", "--guard.spike_zscore=0.1", short)
    rows = read_faults(guarded)
    assert rows and all((row["kind"], row["action"]) == ("spike", "reported") for row in rows)
    assert min(int(row["step"]) for row in rows) > 4
    said = [line for line in capsys.readouterr().err.splitlines() if "update made all the same" in line]
    assert len(said) == len(rows) and "deviations above the median" in said[0]
    assert metrics(guarded)[-1]["skipped_updates"] == "0"
    monkeypatch.setattr(torch.optim.AdamW, "found_inf", property(lambda _: None, lambda *_: None), raising=False)
    free = fit("llada", prepared, tmp_path / "free", "--guard.spikes=ignore", short)
    assert losses(guarded) == losses(free)
    assert same(weights(guarded, 12), weights(free, 12))
    assert record(guarded)["val_nats_per_token"] == record(free)["val_nats_per_token"]


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp2", marks=pytest.mark.slow)])
def test_bad_numbers_of_one_rank_are_everyones(prepared: Path, tmp_path: Path, strategy: str) -> None:
    """Also a gradient that went bad on one rank after the ranks had averaged it."""
    short = "--trainer.max_steps=10"
    one = fit("llada", prepared, tmp_path / "one", short, callbacks(poison(losses=(4,), gradients=(6,))))
    two = callbacks(poison(losses=(4,), rank=1), poison(gradients=(6,), rank=1))
    ranks = ("--trainer.devices=2", f"--trainer.strategy={strategy}")
    done = fit_process("llada", prepared, tmp_path / "two", short, two, *ranks, variables=TRUSTED)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "two" / "test" / "run"
    assert [row["step"] for row in read_faults(folder)] == ["4", "6"]
    assert [row["kind"] for row in read_faults(folder)] == ["loss", "gradient"]
    assert done.stderr.count("update skipped") == 2  # one rank speaks for all
    assert losses(folder) == pytest.approx(losses(one), abs=1e-5, nan_ok=True)
    assert record(folder)["val_nats_per_token"] == pytest.approx(record(one)["val_nats_per_token"], abs=1e-5)


def test_a_run_killed_after_a_skipped_step_ends_bit_for_bit_as_an_uninterrupted_one(
    prepared: Path, tmp_path: Path
) -> None:
    """Step 8 lies before the last checkpoint, step 12 after it: neither is counted twice or lost."""
    bad = poison(losses=(8, 12))
    whole = fit("llada", prepared, tmp_path / "whole", callbacks(bad))
    kill = kill_at(13).removeprefix("--trainer.callbacks=[").removesuffix("]")
    killed = fit_process("llada", prepared, tmp_path / "killed", callbacks(bad, kill), variables=TRUSTED)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    folder = tmp_path / "killed" / "test" / "run"
    assert [row["step"] for row in read_faults(folder)] == ["8", "12"]
    fit("llada", prepared, tmp_path / "killed", callbacks(bad))
    assert (folder / "faults.csv").read_bytes() == (whole / "faults.csv").read_bytes()
    kept = ("step", "train_nats_per_token", "grad_norm", "skipped_updates", "val_nats_per_token")
    assert [[row[key] for key in kept] for row in metrics(folder)] == [
        [row[key] for key in kept] for row in metrics(whole)
    ]
    mine, theirs = checkpoint(folder, 24), checkpoint(whole, 24)
    assert same(mine["state_dict"], theirs["state_dict"])
    assert same(mine["optimizer_states"][0]["state"], theirs["optimizer_states"][0]["state"])
    assert repr(mine["guard"]) == repr(theirs["guard"])  # with NaN where the window is not full yet


def test_a_fault_of_steps_that_a_resume_repeats_is_forgotten(prepared: Path, tmp_path: Path) -> None:
    """It came from a machine that is gone: the step is made again, and it is sound."""
    short = ("--trainer.max_steps=7", "--run.checkpoint_every_steps=5")
    folder = fit("llada", prepared, tmp_path, *short, callbacks(poison(losses=(4, 6))))
    assert [row["step"] for row in read_faults(folder)] == ["4", "6"]
    (folder / "result.json").unlink()
    (folder / "checkpoints" / "step=00000007.ckpt").unlink()
    fit("llada", prepared, tmp_path, *short)
    assert [row["step"] for row in read_faults(folder)] == ["4"]
    assert [row["skipped_updates"] for row in metrics(folder)] == list("0001111")


def test_a_run_without_a_good_update_ends_and_is_not_repeated(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    each = ("--run.checkpoint_every_steps=1", "--run.keep_checkpoints=1")
    folder = fit("arm", prepared, tmp_path, *FOREVER, *each)
    found = record(folder)
    assert (found["status"], found["steps"], found["tokens"]) == ("diverged", 5, int(metrics(folder)[-1]["tokens"]))
    assert found["val_nats_per_token"] is None and found["val_stderr"] is None
    assert is_done(folder) and has_diverged(folder)
    # The rate rises from almost nothing: the second update made the weights useless, and finite.
    assert [row["step"] for row in read_faults(folder)] == ["3", "4", "5"]
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert names == ["step=00000002.ckpt", "step=00000004.ckpt"]
    said = capsys.readouterr().err
    assert (
        "diverged: no update since step 2, 3 skipped in a row; last good checkpoint: "
        f"{folder / 'checkpoints' / names[0]}; lower --model.schedule.lr" in said
    )
    assert main(fit_arguments("arm", prepared, tmp_path, *FOREVER, *each)) == 0
    assert "nothing to do" in capsys.readouterr().err


def test_a_trunk_that_diverges_takes_all_its_budgets_with_it(prepared: Path, tmp_path: Path) -> None:
    budgets = "--budget.flops=[3.7748736e+08, 7.5497472e+08]"
    folder = fit("arm", prepared, tmp_path, *FOREVER, budgets, "--trainer.max_steps=-1")
    found = json.loads((folder / "result.json").read_text())
    assert [one["status"] for one in found] == ["diverged", "diverged"]
    assert len({one["run"] for one in found}) == 2
    assert is_done(folder)


def test_a_stop_comes_at_the_same_step_where_the_host_looks_rarely(prepared: Path, tmp_path: Path) -> None:
    """Three are skipped in a row at step 5, where a checkpoint is written; the stop comes at step 6, where it looks."""
    rare = ("--trainer.log_every_n_steps=20", "--run.checkpoint_every_steps=5")
    folder = fit("arm", prepared, tmp_path, *FOREVER, *rare)
    assert record(folder)["steps"] == 6
    (folder / "result.json").unlink()
    fit("arm", prepared, tmp_path, *FOREVER, *rare)  # goes on from step 5
    assert record(folder)["steps"] == 6
    assert [row["step"] for row in read_faults(folder)] == ["3", "4", "5", "6"]


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("--guard.patience=0", "guard.patience: 0 given; it must be a whole number of at least 1"),
        ("--guard.spike_zscore=0", "guard.spike_zscore: 0.0 must be above 0"),
        ("--guard.spikes=maybe", "guard.spikes"),
    ],
)
def test_settings_that_mean_nothing_are_refused(
    prepared: Path, tmp_path: Path, setting: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(fit_arguments("arm", prepared, tmp_path, setting)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and said in error and len(error.splitlines()) == 1


def test_skipped_spikes_make_another_run_and_reported_ones_do_not(prepared: Path, tmp_path: Path) -> None:
    from llada_lightning.training.cli import LladaCLI

    def name(*settings: str) -> str:
        return LladaCLI(fit_arguments("arm", prepared, tmp_path, *settings), execute=False).run_name

    plain = name()
    assert plain == name("--guard.spikes=ignore", "--guard.patience=7", "--guard.spike_zscore=9")
    skipping = {plain, name("--guard.spikes=skip"), name("--guard.spikes=skip", "--guard.spike_zscore=9")}
    assert len(skipping) == 3


# --- the guard by itself ---------------------------------------------------------------------------------------------


def judged(guard: UpdateGuard, values: list[float], first: int = 1, grad_norm: float = 1.0) -> list[bool]:
    """Whether each step was skipped."""
    verdicts = [guard.verdict(torch.tensor(value), torch.tensor(grad_norm)) for value in values]
    for step, verdict in enumerate(verdicts, first):
        guard.note(step, verdict)
    return [bool(verdict[-1]) for verdict in verdicts]


def noise(count: int, seed: int = 0) -> list[float]:
    return (3 + 0.1 * torch.randn(count, generator=torch.Generator().manual_seed(seed))).tolist()


def test_a_spike_is_measured_by_median_and_absolute_deviation() -> None:
    guard = UpdateGuard("skip", spike_zscore=10)
    values = noise(WINDOW)
    assert not any(judged(guard, values))
    losses_N = torch.tensor(values)
    deviation = 1.4826 * (losses_N - losses_N.median()).abs().median()
    inside, outside = (float(losses_N.median() + z * deviation) for z in (9.9, 10.1))
    assert judged(guard, [outside, inside, outside], first=101) == [True, False, True]
    guard.settle()
    assert [(fault.step, fault.kind) for fault in guard.faults] == [(101, "spike"), (103, "spike")]
    assert guard.faults[0].zscore == pytest.approx(10.1, abs=0.01)
    assert (guard.skipped, guard.streak, guard.last_update) == (2, 1, 102)


def test_nothing_is_a_spike_before_the_window_is_full() -> None:
    guard = UpdateGuard("skip", spike_zscore=10)
    assert judged(guard, [*noise(WINDOW - 1), 1e6]) == [False] * WINDOW


@pytest.mark.parametrize(("spikes", "count", "skipped"), [("ignore", 0, 0), ("report", 50, 0), ("skip", 60, 60)])
def test_a_step_up_in_the_loss_becomes_the_normal_one_where_updates_are_made(
    spikes: Any, count: int, skipped: int
) -> None:
    guard = UpdateGuard(spikes, spike_zscore=10)
    judged(guard, noise(WINDOW) + [value + 10 for value in noise(60, seed=1)])
    guard.settle()
    assert (len(guard.faults), guard.skipped) == (pytest.approx(count, abs=1), skipped)


@pytest.mark.parametrize(
    ("loss", "norm", "kind"),
    [(math.nan, 1.0, "loss"), (math.inf, math.nan, "loss"), (2.0, math.nan, "gradient"), (2.0, math.inf, "gradient")],
)
def test_what_is_not_finite_is_skipped_and_forgotten(loss: float, norm: float, kind: str) -> None:
    guard = UpdateGuard("ignore")
    judged(guard, noise(WINDOW))
    before = guard.state_dict()["losses"]
    assert judged(guard, [loss], grad_norm=norm) == [True]
    assert torch.equal(guard.state_dict()["losses"], before)
    [fault] = guard.faults
    assert (fault.kind, fault.skipped) == (kind, True)


@settings(max_examples=25, deadline=None)
@given(
    values=st.lists(st.floats(-50, 50, width=32) | st.sampled_from([math.nan, math.inf]), min_size=1, max_size=40),
    cut=st.integers(0, 40),
    spikes=st.sampled_from(["report", "skip"]),
)
def test_a_guard_restored_at_any_step_decides_the_same(values: list[float], cut: int, spikes: Any) -> None:
    def begun() -> UpdateGuard:
        guard = UpdateGuard(spikes, spike_zscore=3)
        guard.load_state_dict({"losses": torch.tensor(noise(WINDOW)), "skipped": 0, "streak": 0, "last_update": WINDOW})
        return guard

    whole, before, after = begun(), begun(), UpdateGuard(spikes, spike_zscore=3)
    expected = judged(whole, values, first=101)
    found = judged(before, values[:cut], first=101)
    after.load_state_dict(before.state_dict())
    found += judged(after, values[cut:], first=101 + len(values[:cut]))
    assert found == expected
    left, right = whole.state_dict(), after.state_dict()
    assert torch.equal(left.pop("losses"), right.pop("losses"))
    assert left == right
    assert repr(before.faults + after.faults) == repr(whole.faults)


def test_a_guard_that_nobody_asks_does_not_grow() -> None:
    guard = UpdateGuard()
    judged(guard, noise(3 * WINDOW))
    assert len(guard._pending) < WINDOW
    assert all(isinstance(fault, Fault) for fault in guard.faults)
