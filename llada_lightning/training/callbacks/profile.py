"""Profiles a few steps of a run: `profile/` gets a trace, `summary.json`, a page for people and a picture of a step."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.profilers import Profiler, PyTorchProfiler
from torch.profiler import ProfilerActivity, profile, schedule

from llada_lightning.compute.hardware import training_memory_bytes
from llada_lightning.compute.shapes import shape_name
from llada_lightning.objectives.batches import TrainingBatch
from llada_lightning.settings import Profile
from llada_lightning.support.errors import UserError
from llada_lightning.support.files import write_json, written_atomically
from llada_lightning.support.signals import say
from llada_lightning.training.callbacks.accounting import Accounting, peak_memory_bytes
from llada_lightning.training.modules import LanguageModule
from llada_lightning.training.parallel import FullySharded, tensor_parallel
from llada_lightning.training.phase_clock import ANNOTATION, VALIDATION, PhaseClock, stopwatch
from llada_lightning.training.profiles import PHASES, SUMMARY_FILE, page
from llada_lightning.training.record import describe_devices, git_commit, versions
from llada_lightning.training.trace import TraceFacts, read_trace, trace_facts

_OPERATIONS = 10
"""How many of the dearest operations are named."""


def profiling(
    settings: Profile, folder: Path, last_step: int, accounting: Accounting, profiler: Profiler | str | None = None
) -> list[Callback]:
    """The callback that the settings ask for; none where they ask for none.

    Args:
        folder: of the run.
        last_step: where the fit ends.
        accounting: must stand before it.
        profiler: of the trainer's settings.

    Raises:
        UserError: the settings make no profile.
    """
    if settings.steps < 0:
        raise UserError(f"profile.steps: {settings.steps} must be at least 1, or 0 for no profile")
    if settings.steps == 0:
        return []
    if settings.after < 1:
        raise UserError(f"profile.after: {settings.after} must be at least 1: the profiler itself needs a step first")
    if settings.after + settings.steps > last_step:
        raise UserError(
            f"profile.steps: {settings.steps} after {settings.after} others are more than the {last_step} steps that "
            "are trained; lower --profile.steps or --profile.after"
        )
    if profiler == "pytorch" or isinstance(profiler, PyTorchProfiler):
        raise UserError("trainer.profiler: pytorch and profile.steps are the same recorder; leave one of them out")
    return [StepProfiler(settings, folder / "profile", accounting)]


class StepProfiler(Callback):
    """Passes some steps, records some, writes what it has seen, and is out of the way.

    The second half of the steps passed tells the run's speed without the profiler; the last of them warms it up.

    Args:
        settings: how many steps to pass, and to record.
        folder: where the files go.
        accounting: its clock and counts; must stand before this callback.
    """

    def __init__(self, settings: Profile, folder: Path, accounting: Accounting) -> None:
        self._steps, self._after, self._folder, self._accounting = settings.steps, settings.after, folder, accounting
        self._step = self._first = 0
        self._over = False
        self._clock: PhaseClock | None = None
        self._recorder: profile | None = None
        self._replaced: Profiler | None = None
        self._before: tuple[float, int] | None = None
        self._unprofiled: dict[str, float] | None = None
        self._tokens = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step = self._first = trainer.global_step
        left = trainer.max_steps - self._step
        if left < self._after + self._steps:
            say(f"note: no profile: {left} steps are left, and it takes {self._after + self._steps}")
            self._over = True
        self._after_a_step(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: TrainingBatch, batch_idx: int
    ) -> None:
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        self._after_a_step(trainer)
        if not self._over and self._step - self._first == self._after + self._steps:
            self._finish(trainer, pl_module, batch)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._clock is not None:
            self._clock.start(VALIDATION)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._clock is not None:
            self._clock.stop(VALIDATION)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._leave(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._leave(trainer)

    def _after_a_step(self, trainer: Trainer) -> None:
        done = self._step - self._first
        if self._over or done > self._after + self._steps:
            return
        if done > self._after:
            assert self._clock is not None and self._recorder is not None
            self._clock.end_step()
        if done == self._after // 2:
            self._before = self._accounting.settled(trainer)
        if done == self._after - 1:
            self._measure_unprofiled(trainer)
            self._recorder = _recorder(trainer, self._steps)
            self._recorder.start()
        if done == self._after:
            self._attach(trainer)
        if done >= self._after and done < self._after + self._steps:
            assert self._clock is not None and self._recorder is not None
            self._recorder.step()
            self._clock.begin_step()

    def _measure_unprofiled(self, trainer: Trainer) -> None:
        assert self._before is not None
        (start, tokens), (end, tokens_then) = self._before, self._accounting.settled(trainer)
        if tokens_then > tokens:
            self._unprofiled = self._accounting.rates(trainer, (tokens_then - tokens) / (end - start))

    def _attach(self, trainer: Trainer) -> None:
        _, self._tokens = self._accounting.settled(trainer)
        self._clock = PhaseClock(stopwatch(trainer.strategy.root_device))
        self._replaced, trainer.profiler = trainer.profiler, self._clock  # type: ignore[attr-defined]

    def _finish(self, trainer: Trainer, module: LightningModule, batch: TrainingBatch) -> None:
        assert isinstance(module, LanguageModule) and self._clock is not None and self._recorder is not None
        _, tokens = self._accounting.settled(trainer)
        clock, recorder, self._recorder = self._clock, self._recorder, None
        recorder.stop()
        self._leave(trainer)
        rank = f"-rank{trainer.global_rank}" if trainer.world_size > 1 else ""
        trace = self._folder / f"trace{rank}.json.gz"
        with written_atomically(trace) as temporary:
            recorder.export_chrome_trace(str(temporary))
        if not trainer.is_global_zero:
            return
        steps = clock.phases()
        mean = {phase: sum(step[phase] for step in steps) / len(steps) for phase in PHASES}
        seconds = sum(mean.values()) * len(steps) / 1e3
        profiled = self._accounting.rates(trainer, (tokens - self._tokens) / seconds)
        summary = {
            **_setting(trainer, module, batch),
            "steps": [self._first + self._after + 1, self._step],
            "flops_per_token": asdict(self._accounting.per_token),
            "unprofiled": self._unprofiled,
            "profiled": profiled,
            **_memory(trainer, module, batch),
            "step_milliseconds": sum(mean.values()),
            "phase_milliseconds": mean,
            "validation_milliseconds": sum(step[VALIDATION] for step in steps),
            **_traced(trace_facts(read_trace(trace), ANNOTATION + VALIDATION), len(steps), 1e3 * seconds),
            "versions": versions(),
            "git_commit": git_commit(),
        }
        self._write(summary)
        self._accounting.leave_out()
        say(f"profile of steps {self._first + self._after + 1}-{self._step}: {self._folder / 'summary.md'}")

    def _write(self, summary: dict[str, Any]) -> None:
        from llada_lightning.study.plots.profile import step_phases  # matplotlib takes its time
        from llada_lightning.study.plots.style import write_figure

        write_json(self._folder / SUMMARY_FILE, summary)
        with written_atomically(self._folder / "summary.md") as temporary:
            temporary.write_text(page(summary), encoding="utf-8")
        write_figure(step_phases(summary["phase_milliseconds"], PHASES), self._folder, "phases")

    def _leave(self, trainer: Trainer) -> None:
        """Give Lightning its own profiler back, and end a recording that was broken off."""
        self._over = True
        if self._replaced is not None:
            trainer.profiler, self._replaced = self._replaced, None  # type: ignore[attr-defined]
        if self._recorder is not None:
            self._recorder.stop()
        self._clock = self._recorder = None


def _recorder(trainer: Trainer, steps: int) -> profile:
    """torch's profiler, of whose first step nothing is kept."""
    activities = [ProfilerActivity.CPU]
    if trainer.strategy.root_device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    return profile(activities=activities, schedule=schedule(wait=0, warmup=1, active=steps, repeat=1))


def _setting(trainer: Trainer, module: LanguageModule, batch: TrainingBatch) -> dict[str, Any]:
    data = trainer.datamodule  # type: ignore[attr-defined]
    assert module.vocab_size is not None
    return {
        "objective": module.objective,
        "shape": shape_name(module.shape),
        "params_nonembedding": module.shape.params_nonembedding,
        "params_total": module.shape.params_total(module.vocab_size),
        "vocab_size": module.vocab_size,
        "sequence_length": data.sequence_length,
        "global_batch": data.batch,
        "micro_batch": len(batch.tokens_BL),
        "accumulation": trainer.accumulate_grad_batches,
        "device": describe_devices(trainer),
        "devices": trainer.world_size,
        "on_gpu": trainer.strategy.root_device.type == "cuda",
        "threads": torch.get_num_threads(),
        "precision": str(trainer.precision),
        "strategy": type(trainer.strategy).__name__,
        "speed": asdict(module.speed),
    }


def _memory(trainer: Trainer, module: LanguageModule, batch: TrainingBatch) -> dict[str, Any]:
    """Peak, and what `llada plan` says where it speaks of the same: a GPU under bf16-mixed, nothing recomputed
    and no micro-batch divided."""
    device = trainer.strategy.root_device
    estimate = None
    speed = module.speed
    alike = speed.recompute == "none" and not speed.fp8 and tensor_parallel(trainer.strategy) == 1
    if device.type == "cuda" and trainer.precision == "bf16-mixed" and alike:
        assert module.vocab_size is not None
        micro_batch, length = batch.tokens_BL.shape
        shards = trainer.world_size if isinstance(trainer.strategy, FullySharded) else 1
        estimate = training_memory_bytes(module.shape, module.vocab_size, length, micro_batch, shards, speed.loss)
    return {"peak_memory_bytes": peak_memory_bytes(device), "estimated_memory_bytes": estimate}


def _traced(facts: TraceFacts, steps: int, window: float) -> dict[str, Any]:
    """What the trace tells, for one step; ``window`` is all steps' milliseconds."""
    operations = [
        {"name": found.name, "milliseconds": found.milliseconds / steps, "calls": found.calls / steps}
        for found in facts.operations[:_OPERATIONS]
    ]
    return {
        "communication_milliseconds": {
            "total": facts.communication / steps,
            "alone": facts.communication_alone / steps,
        },
        "device_busy": None if facts.device_busy is None else facts.device_busy / window,
        "operations": operations,
    }
