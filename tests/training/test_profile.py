"""`--profile.steps`: what the files of a profile say, against other clocks and by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from helpers.tiny_runs import CALLS, MODELS, call_at, fit, fit_arguments, fit_process, metrics
from llada_lightning.commands.main import main
from llada_lightning.compute.shapes import Shape
from llada_lightning.training.phase_clock import PhaseClock, _phase
from llada_lightning.training.profiles import PHASES
from llada_lightning.training.trace import read_trace, trace_facts

SHAPE = Shape(n_layers=2, d_model=32, n_heads=2, n_kv_heads=1, d_ff=64)
# Steps 5 to 7 of 12 are recorded; the validation after step 5 falls between two of them.
PROFILED = (
    "--profile.steps=3",
    "--profile.after=4",
    "--trainer.max_steps=12",
    "--trainer.accumulate_grad_batches=2",
    "--trainer.val_check_interval=10",
)
VALIDATING = "llada.validation"
FILES = {"trace.json.gz", "summary.json", "summary.md", "phases.png", "phases.svg"}


@pytest.fixture(scope="module")
def run(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fit("llada", prepared, tmp_path_factory.mktemp("profile"), *PROFILED)


@pytest.fixture(scope="module")
def summary(run: Path) -> dict[str, Any]:
    return json.loads((run / "profile" / "summary.json").read_text())


def test_the_folder_holds_whole_files_only(run: Path) -> None:
    assert {path.name for path in (run / "profile").iterdir()} == FILES
    page = (run / "profile" / "summary.md").read_text()
    assert "# Profile of steps 5-7" in page and "| MFU (total) | n/a | n/a |" in page


def test_the_phases_make_up_the_step(summary: dict[str, Any]) -> None:
    assert list(summary["phase_milliseconds"]) == list(PHASES)
    assert all(milliseconds > 0 for milliseconds in summary["phase_milliseconds"].values())
    assert sum(summary["phase_milliseconds"].values()) == pytest.approx(summary["step_milliseconds"])
    assert summary["validation_milliseconds"] > 0


@pytest.mark.parametrize(
    ("operation", "phase"),
    [
        ("aten::embedding", "forward"),
        ("aten::embedding_dense_backward", "backward"),
        ("aten::_fused_adamw_", "optimizer"),
        ("aten::linalg_vector_norm", "optimizer"),
    ],
)
def test_operations_run_in_their_phase(run: Path, operation: str, phase: str) -> None:
    """Two micro-batches a step; what the validation between two steps does lies in none of their phases."""
    events = read_trace(run / "profile" / "trace.json.gz")
    spans = {name: [event for event in events if event.name == name] for name in (f"llada.{phase}", VALIDATING)}
    calls = [event for event in events if event.name == operation]
    for event in calls:
        assert any(span.start <= event.start and event.end <= span.end for found in spans.values() for span in found)
    training = [event for event in calls if not any(span.start <= event.start < span.end for span in spans[VALIDATING])]
    assert len(training) >= 3 and (phase == "optimizer" or len(training) == 2 * 3)
    assert operation != "aten::embedding" or len(training) < len(calls)


def test_operations_are_those_of_training_steps(run: Path, summary: dict[str, Any]) -> None:
    """Two layers, two micro-batches, three steps; the validation's forward passes are not among them."""
    facts = trace_facts(read_trace(run / "profile" / "trace.json.gz"), VALIDATING)
    attention = {found.name: found.calls for found in facts.operations if "_for_cpu" in found.name}
    assert len(attention) == 2 and set(attention.values()) == {2 * 2 * 3}
    dearest = [(found.name, found.milliseconds / 3, found.calls / 3) for found in facts.operations[:10]]
    assert [(found["name"], found["milliseconds"], found["calls"]) for found in summary["operations"]] == dearest
    assert 0 < sum(found["milliseconds"] for found in summary["operations"]) < summary["step_milliseconds"]
    assert summary["communication_milliseconds"] == {"total": 0, "alone": 0} and summary["device_busy"] is None


def test_the_speeds_by_hand(run: Path, summary: dict[str, Any]) -> None:
    tokens = {int(row["step"]): int(row["tokens"]) for row in metrics(run)}
    profiled, before = summary["profiled"], summary["unprofiled"]
    seconds = 3 * summary["step_milliseconds"] / 1e3
    assert profiled["tokens_per_second"] == pytest.approx((tokens[7] - tokens[4]) / seconds)
    for speed in (profiled, before):
        rate = speed["tokens_per_second"]
        assert speed["flops_6nd_per_second"] == pytest.approx(6 * SHAPE.params_nonembedding * rate)
        assert speed["flops_attention_per_second"] == pytest.approx(12 * 2 * 32 * 32 * rate)
        assert speed["flops_head_per_second"] == pytest.approx(6 * 32 * summary["vocab_size"] * rate * 1.001 / 2)
        counts = ("flops_6nd", "flops_attention", "flops_head")
        assert speed["flops_total_per_second"] == pytest.approx(sum(speed[f"{c}_per_second"] for c in counts))
        assert "mfu" not in speed
    assert (summary["micro_batch"], summary["accumulation"], summary["global_batch"]) == (4, 2, 8)
    assert summary["steps"] == [5, 7] and summary["estimated_memory_bytes"] is None


def test_logged_rows_have_achieved_flops_and_memory(run: Path) -> None:
    rows = metrics(run)[1:]
    for row in rows:
        rate = float(row["tokens_per_second"])
        assert float(row["flops_6nd_per_second"]) == pytest.approx(6 * SHAPE.params_nonembedding * rate)
        assert float(row["flops_attention_per_second"]) == pytest.approx(12 * 2 * 32 * 32 * rate)
        ratio = float(row["flops_total_per_second"]) / rate
        assert ratio == pytest.approx(float(row["flops_total"]) / float(row["tokens"]))
        assert row["mfu"] == ""  # of a CPU
    peaks = [int(row["peak_memory_bytes"]) for row in rows]
    assert peaks == sorted(peaks) and peaks[0] > 100e6  # torch alone takes more


def test_a_profile_is_no_part_of_the_identity(prepared: Path, tmp_path: Path) -> None:
    from llada_lightning.training.fit import run_folder

    base = [a for a in fit_arguments("arm", prepared, tmp_path) if not a.startswith("--run.name")]
    assert run_folder([*base, "--profile.steps=3", "--profile.after=2"]) == run_folder(base)


def test_a_run_broken_off_in_the_window_is_profiled_when_it_goes_on(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise ArithmeticError("in step 7")

    CALLS["fail"] = fail
    with pytest.raises(ArithmeticError):
        main(fit_arguments("arm", prepared, tmp_path, *PROFILED, call_at(6, "fail")))
    folder = fit("arm", prepared, tmp_path, *PROFILED)  # from step 5: 7 steps are left, and 7 are needed
    assert json.loads((folder / "profile" / "summary.json").read_text())["steps"] == [10, 12]
    assert [int(row["step"]) for row in metrics(folder)] == list(range(1, 13))
    (folder / "result.json").unlink()
    (folder / "checkpoints" / "step=00000012.ckpt").unlink()
    capsys.readouterr()
    fit("arm", prepared, tmp_path, *PROFILED)
    assert "note: no profile: 2 steps are left, and it takes 7" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["--profile.steps=-1"], "profile.steps: -1 must be at least 1"),
        (["--profile.steps=2", "--profile.after=0"], "profile.after: 0 must be at least 1"),
        (["--profile.steps=15"], "profile.steps: 15 after 10 others are more than the 24 steps"),
        (
            ["--profile.steps=2", "--trainer.profiler=pytorch"],
            "trainer.profiler: pytorch and profile.steps are the same",
        ),
    ],
)
def test_a_mistake_is_one_line(
    settings: list[str], message: str, prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(fit_arguments("arm", prepared, tmp_path, *settings)) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {message}")
    assert not (tmp_path / "test").exists()


def test_each_rank_writes_a_trace_and_communication_is_seen(prepared: Path, tmp_path: Path) -> None:
    ranks = ("--trainer.devices=2", "--trainer.strategy=ddp", "--profile.steps=2", "--profile.after=1")
    done = fit_process("arm", prepared, tmp_path, *ranks, "--trainer.max_steps=4")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "test" / "run" / "profile"
    traces = {"trace-rank0.json.gz", "trace-rank1.json.gz"}
    assert {path.name for path in folder.iterdir()} == (FILES - {"trace.json.gz"}) | traces
    found = json.loads((folder / "summary.json").read_text())
    communication = found["communication_milliseconds"]
    assert 0 < communication["total"] < found["step_milliseconds"]
    assert 0 <= communication["alone"] <= communication["total"]
    assert found["devices"] == 2 and found["unprofiled"] is None  # no step passed but the first
    assert sum(found["phase_milliseconds"].values()) == pytest.approx(found["step_milliseconds"])


# --- the clock --------------------------------------------------------------------------------------------------------


class Hours:
    """A clock that somebody turns."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def test_every_moment_belongs_to_one_phase() -> None:
    hours = Hours()
    clock = PhaseClock(hours)

    def spend(milliseconds: float) -> None:
        hours.seconds += milliseconds / 1e3

    spend(1000)
    clock.start("[Callback]StepProfiler.on_train_batch_end")
    clock.begin_step()
    spend(1)
    clock.stop("[Callback]StepProfiler.on_train_batch_end")
    clock.stop("run_training_epoch")  # begun before the clock was there
    with clock.profile("[_TrainingEpochLoop].train_dataloader_next"):
        spend(2)
    spend(4)
    with clock.profile("run_training_batch"), clock.profile("[LightningModule]ArmModule.optimizer_step"):
        spend(8)
        with clock.profile("[Strategy]DDPStrategy.training_step"):
            spend(16)
        with clock.profile("[Callback]Other.on_before_zero_grad"):
            spend(32)
        with clock.profile("[Strategy]DDPStrategy.backward"), clock.profile("[LightningModule]ArmModule.backward"):
            spend(64)
        with clock.profile("[LightningModule]ArmModule.configure_gradient_clipping"):
            spend(128)
    clock.start("[Callback]StepProfiler.on_validation_start")
    clock.start("validation")
    clock.stop("[Callback]StepProfiler.on_validation_start")
    with clock.profile("[Strategy]DDPStrategy.batch_to_device"), clock.profile("[Callback]Other.on_validation_end"):
        spend(256)
    clock.stop("validation")
    with clock.profile("[Strategy]DDPStrategy.batch_to_device"):
        spend(512)
    clock.end_step()
    spend(1000)
    clock.stop("[Callback]StepProfiler.on_train_batch_end")  # Lightning ends it when the clock has gone
    [step] = clock.phases()
    assert step == pytest.approx(
        {
            "data": 2,
            "transfer": 512,
            "forward": 16,
            "backward": 64,
            "optimizer": 8 + 128,
            "callbacks": 1 + 32,
            "loop": 4,
            "validation": 256,
        }
    )


@pytest.mark.parametrize("strategy", ["SingleDeviceStrategy", "DDPStrategy", "FullySharded"])
def test_phases_go_by_the_names_of_lightnings_hooks(strategy: str) -> None:
    assert _phase(f"[Strategy]{strategy}.training_step", "optimizer") == "forward"
    assert _phase(f"[Strategy]{strategy}.backward", "optimizer") == "backward"
    for module in MODELS.values():
        assert _phase(f"[LightningModule]{module}.lr_scheduler_step", "loop") == "optimizer"
        assert _phase(f"[LightningModule]{module}.on_train_batch_start", "loop") == "loop"
    assert _phase("[Callback]StepCheckpoints.optimizer_step", "optimizer") == "callbacks"
