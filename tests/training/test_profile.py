"""`--profile.steps`: what the files of a profile say, against other clocks and by hand."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import DeviceType
from torch.autograd.profiler_util import Interval
from torch.profiler import ProfilerActivity, profile

from helpers.tiny_runs import CALLS, MODELS, call_at, fit, fit_arguments, fit_process, metrics
from llada_lightning.commands.main import main
from llada_lightning.compute.shapes import Shape
from llada_lightning.training.callbacks.profile import PhaseRecorder, _covered, facts_of, phase_of
from llada_lightning.training.profiles import PHASES

SHAPE = Shape(n_layers=2, d_model=32, n_heads=2, n_kv_heads=1, d_ff=64)
# Steps 5 to 7 of 12 are recorded; the validation after step 5 falls between two of them.
PROFILED = (
    "--profile.steps=3",
    "--profile.after=4",
    "--trainer.max_steps=12",
    "--trainer.accumulate_grad_batches=2",
    "--trainer.val_check_interval=10",
)
VALIDATION = "[pl][profile]validation"
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


def spans_of(run: Path) -> dict[str, list[tuple[float, float]]]:
    """What the trace holds, by name: where each event begins and ends, in microseconds."""
    with gzip.open(run / "profile" / "trace.json.gz", "rt", encoding="utf-8") as file:
        events = [event for event in json.load(file)["traceEvents"] if event.get("ph") == "X"]
    found: dict[str, list[tuple[float, float]]] = {}
    for event in events:
        found.setdefault(event["name"], []).append((event["ts"], event["ts"] + event["dur"]))
    return found


def within(event: tuple[float, float], spans: list[tuple[float, float]]) -> bool:
    return any(start <= event[0] and event[1] <= end for start, end in spans)


@pytest.mark.parametrize(
    ("operation", "action"),
    [
        ("aten::embedding", ".training_step"),
        ("aten::embedding_dense_backward", ".backward"),
        ("aten::_fused_adamw_", ".optimizer_step"),
        ("aten::linalg_vector_norm", ".configure_gradient_clipping"),
    ],
)
def test_operations_run_in_their_actions(run: Path, operation: str, action: str) -> None:
    """Two micro-batches a step; what the validation between two steps does lies in none of their actions."""
    spans = spans_of(run)
    actions = [span for name, found in spans.items() if name.endswith(action) for span in found]
    training = [call for call in spans[operation] if not within(call, spans[VALIDATION])]
    assert all(within(call, actions) for call in training)
    assert len(training) >= 3 and ("optimizer" in action or "clipping" in action or len(training) == 2 * 3)
    assert operation != "aten::embedding" or len(training) < len(spans[operation])


def test_operations_are_those_of_training_steps(run: Path, summary: dict[str, Any]) -> None:
    """The validation's forward passes are not among them; torch counts a call within one of its name once."""
    spans = spans_of(run)
    for found in summary["operations"]:
        assert 0 < 3 * found["calls"] <= sum(not within(call, spans[VALIDATION]) for call in spans[found["name"]])
    spent = [found["milliseconds"] for found in summary["operations"]]
    assert len(spent) == 10 and spent == sorted(spent, reverse=True)
    assert 0 < sum(spent) < summary["step_milliseconds"]
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


# --- the recorder -----------------------------------------------------------------------------------------------------


class Hours:
    """A clock that somebody turns."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def test_every_moment_belongs_to_one_phase() -> None:
    hours = Hours()
    clock = PhaseRecorder([ProfilerActivity.CPU], hours)

    def spend(milliseconds: float) -> None:
        hours.seconds += milliseconds / 1e3

    spend(1000)
    clock.start("[Callback]StepProfiler.on_train_batch_end")
    clock.begin()
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
    step = clock.phases()
    spend(1000)
    clock.teardown(None)
    clock.stop("[Callback]StepProfiler.on_train_batch_end")  # Lightning ends it when the clock has gone
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
    assert phase_of(f"[Strategy]{strategy}.training_step", "optimizer") == "forward"
    assert phase_of(f"[Strategy]{strategy}.backward", "optimizer") == "backward"
    for module in MODELS.values():
        assert phase_of(f"[LightningModule]{module}.lr_scheduler_step", "loop") == "optimizer"
        assert phase_of(f"[LightningModule]{module}.on_train_batch_start", "loop") == "loop"
    assert phase_of("[Callback]StepCheckpoints.optimizer_step", "optimizer") == "callbacks"


# --- what a recording tells, from events written by hand --------------------------------------------------------------


def event(
    name: str, start: float, end: float, *, on_gpu: bool = False, annotation: bool = False, own: float | None = None
) -> Any:
    """An event with the attributes of torch's; times in microseconds."""
    return SimpleNamespace(
        name=name,
        time_range=Interval(start, end),
        device_type=DeviceType.CUDA if on_gpu else DeviceType.CPU,
        is_user_annotation=annotation,
        self_cpu_time_total=end - start if own is None else own,
    )


def test_a_callers_time_is_without_what_it_calls() -> None:
    with profile(activities=[ProfilerActivity.CPU]) as recording:
        torch.ones(8, 8) @ torch.ones(8, 8)
    events = recording.events()
    assert events is not None
    facts = facts_of(events, steps=1, window=1.0)
    by_hand = {found.key: found.self_cpu_time_total / 1e3 for found in recording.key_averages()}
    assert {found["name"]: found["milliseconds"] for found in facts["operations"]} == pytest.approx(by_hand)
    assert facts["device_busy"] is None


def test_communication_of_the_cpu_is_told_by_gloos_threads() -> None:
    facts = facts_of(
        [
            event("aten::mm", 0, 4_000),
            event("c10d::allreduce_", 4_000, 4_500),
            event("gloo:all_reduce", 3_000, 9_000, annotation=True),
            event("aten::add", 8_000, 8_500),
            event("[pl][profile][Strategy]DDPStrategy.backward", 0, 10_000, annotation=True),
        ],
        steps=2,
        window=20.0,
    )
    assert facts["communication_milliseconds"] == {"total": 6 / 2, "alone": (6 - 1 - 0.5) / 2}


def test_on_a_gpu_its_kernels_count_and_not_what_asks_for_them() -> None:
    """Two queues: 6 ms of kernels and a copy, of which 2 ms of nccl run alone."""
    facts = facts_of(
        [
            event("aten::mm", 0, 50),
            event("gemm", 1_000, 3_000, on_gpu=True),
            event("ncclDevKernel_AllReduce_Sum_f32_RING_LL", 2_000, 5_000, on_gpu=True),
            event("nccl:all_reduce", 2_000, 5_900, on_gpu=True, annotation=True),
            event("Memcpy HtoD (Pinned -> Device)", 6_000, 7_000, on_gpu=True),
            event("gemm", 8_000, 9_000, on_gpu=True),
        ],
        steps=1,
        window=12.0,
    )
    assert facts["operations"][:2] == [
        {"name": "gemm", "milliseconds": 3, "calls": 2},
        {"name": "ncclDevKernel_AllReduce_Sum_f32_RING_LL", "milliseconds": 3, "calls": 1},
    ]
    assert facts["communication_milliseconds"] == {"total": 3, "alone": 2} and facts["device_busy"] == 6 / 12


def test_what_begins_in_a_validation_is_left_out() -> None:
    facts = facts_of(
        [
            event("gemm", 500, 1_500, on_gpu=True),
            event(VALIDATION, 2_000, 7_000, annotation=True),
            event("gemm", 5_000, 7_000, on_gpu=True),
        ],
        steps=1,
        window=4.0,
    )
    assert facts["operations"] == [{"name": "gemm", "milliseconds": 1, "calls": 1}] and facts["device_busy"] == 1 / 4


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 20)), max_size=12))
def test_covered_time_is_that_of_the_union(spans: list[tuple[int, int]]) -> None:
    moments = {moment for start, length in spans for moment in range(start, start + length)}
    assert _covered([event("a", start, start + length) for start, length in spans]) == pytest.approx(len(moments) / 1e3)
