"""Profiles a few steps of a run: `profile/` gets a trace, `summary.json`, a page for people and a picture of a step."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.profilers import Profiler, PyTorchProfiler
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity

from llada_lightning.compute.hardware import training_memory_bytes
from llada_lightning.compute.shapes import shape_name
from llada_lightning.objectives.batches import TrainingBatch
from llada_lightning.settings import Profile
from llada_lightning.support.errors import UserError
from llada_lightning.support.files import write_json, written_atomically
from llada_lightning.support.signals import say
from llada_lightning.support.source import git_commit
from llada_lightning.training.callbacks.accounting import Accounting, peak_memory_bytes
from llada_lightning.training.language_module import LanguageModule
from llada_lightning.training.parallel import FullySharded, tensor_parallel
from llada_lightning.training.profiles import PHASES, SUMMARY_FILE, page
from llada_lightning.training.record import describe_devices, versions

VALIDATION = "validation"
"""The phase between two training steps that is a part of neither."""
_OPERATIONS = 10
"""The number of most expensive operations that are named."""
_COMMUNICATION = re.compile(r"nccl|rccl|gloo|c10d|record_param_comms", re.IGNORECASE)
_PHASE_OF_HOOK = {
    "train_dataloader_next": "data",
    "batch_to_device": "transfer",
    "training_step": "forward",
    "backward": "backward",
    "optimizer_step": "optimizer",
    "optimizer_zero_grad": "optimizer",
    "configure_gradient_clipping": "optimizer",
    "lr_scheduler_step": "optimizer",
}

Mark = Any
"""A moment: seconds of the host's clock, or an event in the GPU's queue."""


def stopwatch(device: torch.device) -> Callable[[], Mark]:
    """A function that notes a moment on a device without waiting for it.

    A GPU works behind the host. There a moment is an event in its queue, and a phase is the time between two of them:
    what the host does while the GPU is busy costs nothing, and what the GPU waits for costs what it waits.
    """
    if device.type != "cuda":
        return time.perf_counter

    def now() -> Mark:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    return now


def milliseconds(start: Mark, end: Mark) -> float:
    """The time between two moments; waits until those of a GPU are over."""
    if isinstance(start, float):
        return 1e3 * (end - start)
    end.synchronize()
    return start.elapsed_time(end)


class PhaseRecorder(PyTorchProfiler):
    """Lightning's recorder, which also notes each change of phase: every moment belongs to exactly one phase.

    It records from its first action to :meth:`teardown`.

    Args:
        activities: What torch's profiler records.
        now: Notes a moment (:func:`stopwatch`).
    """

    def __init__(self, activities: Iterable[ProfilerActivity], now: Callable[[], Mark]) -> None:
        super().__init__(activities=list(activities), schedule=None, record_module_names=False)
        self.STEP_FUNCTIONS = set()  # Lightning would count micro-batches and validation steps
        self._now = now
        self._actions = [("", "loop")]
        self._notes: list[tuple[str, Mark]] | None = None

    def start(self, action_name: str) -> None:
        super().start(action_name)
        self._actions.append((action_name, phase_of(action_name, self._actions[-1][1])))
        self._note()

    def stop(self, action_name: str) -> None:
        super().stop(action_name)
        # Lightning also ends what it began before this recorder was there.
        found = [place for place, (name, _) in enumerate(self._actions) if name == action_name]
        if found:
            del self._actions[found[-1]]
        self._note()

    def begin(self) -> None:
        """Begins the first step; the recording must be on, because this is what takes long."""
        self._notes = []
        self._note()

    def phases(self) -> dict[str, float]:
        """Ends the last step and returns the milliseconds of each phase in all steps."""
        assert self._notes is not None
        notes, self._notes = [*self._notes, ("", self._now())], None
        spent = dict.fromkeys((*PHASES, VALIDATION), 0.0)
        for (phase, start), (_, end) in pairwise(notes):
            spent[phase] += milliseconds(start, end)
        return spent

    def _note(self) -> None:
        phase = self._actions[-1][1]
        if self._notes is not None and (not self._notes or self._notes[-1][0] != phase):
            self._notes.append((phase, self._now()))


def phase_of(action: str, enclosing: str) -> str:
    """The phase of an action by the name that Lightning gives it, such as `[Strategy]DDPStrategy.backward`."""
    if VALIDATION in (action, enclosing):
        return VALIDATION
    if action.startswith("[Callback]"):
        return "callbacks"
    return _PHASE_OF_HOOK.get(action.rpartition(".")[2], enclosing)


class StepProfiler(Callback):
    """Passes some steps, records some, writes what it has seen, and is out of the way.

    The second half of the steps passed tells the run's speed without the profiler; the last of them warms it up.

    Args:
        settings: The numbers of steps to pass, and to record.
        folder: The folder of the files.
        accounting: Clock and counts of the fit; it must come before this callback.
        last_step: The step at which the fit ends.
        profiler: The profiler of the trainer's settings.

    Raises:
        UserError: The settings make no profile.
    """

    def __init__(
        self,
        settings: Profile,
        folder: Path,
        accounting: Accounting,
        last_step: int,
        profiler: Profiler | str | None = None,
    ) -> None:
        if settings.steps < 0:
            raise UserError(f"profile.steps: {settings.steps} must be at least 1, or 0 for no profile")
        if settings.after < 1:
            raise UserError(
                f"profile.after: {settings.after} must be at least 1: the profiler itself needs a step first"
            )
        if settings.after + settings.steps > last_step:
            raise UserError(
                f"profile.steps: {settings.steps} after {settings.after} others are more than the {last_step} steps "
                "that are trained; lower --profile.steps or --profile.after"
            )
        if profiler == "pytorch" or isinstance(profiler, PyTorchProfiler):
            raise UserError("trainer.profiler: pytorch and profile.steps are the same recorder; leave one of them out")
        self._steps, self._after, self._folder, self._accounting = settings.steps, settings.after, folder, accounting
        self._step = self._first = 0
        self._over = False
        self._recorder: PhaseRecorder | None = None
        self._replaced: Profiler | None = None
        self._before: tuple[float, int] = (0.0, 0)
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
        if self._over or trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        self._after_a_step(trainer)
        if self._step - self._first == self._after + self._steps:
            self._finish(trainer, pl_module, batch)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._recorder is not None:
            self._recorder.start(VALIDATION)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._recorder is not None:
            self._recorder.stop(VALIDATION)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._leave(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._leave(trainer)

    def _after_a_step(self, trainer: Trainer) -> None:
        done = self._step - self._first
        if self._over or done > self._after:
            return
        if done == self._after // 2:
            self._before = self._accounting.settled(trainer)
        if done == self._after - 1:
            (start, tokens), (end, tokens_then) = self._before, self._accounting.settled(trainer)
            if tokens_then > tokens:
                self._unprofiled = self._accounting.rates(trainer, (tokens_then - tokens) / (end - start))
            self._record(trainer)
        if done == self._after:
            _, self._tokens = self._accounting.settled(trainer)
            self._leave(trainer)  # this recording only warmed the profiler up
            recorder = self._record(trainer)
            self._accounting.leave_out()
            recorder.begin()

    def _record(self, trainer: Trainer) -> PhaseRecorder:
        device = trainer.strategy.root_device
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
        self._recorder, self._over = PhaseRecorder(activities, stopwatch(device)), False
        with self._recorder.profile("start of the profiler"):
            self._replaced, trainer.profiler = trainer.profiler, self._recorder  # type: ignore[attr-defined]
        return self._recorder

    def _leave(self, trainer: Trainer) -> None:
        """Ends the recording and gives Lightning its own profiler back."""
        self._over = True
        if self._recorder is not None:
            trainer.profiler = self._replaced  # type: ignore[attr-defined]
            self._recorder.teardown(None)
            self._recorder = None

    def _finish(self, trainer: Trainer, module: LightningModule, batch: TrainingBatch) -> None:
        recorder = self._recorder
        assert isinstance(module, LanguageModule) and recorder is not None
        spent = recorder.phases()
        _, tokens = self._accounting.settled(trainer)
        recording = recorder.profiler
        self._leave(trainer)
        assert isinstance(recording, torch.profiler.profile) and recorder.function_events is not None
        rank = f"-rank{trainer.global_rank}" if trainer.world_size > 1 else ""
        with written_atomically(self._folder / f"trace{rank}.json.gz") as temporary:
            recording.export_chrome_trace(str(temporary))
        if not trainer.is_global_zero:
            return
        window = sum(spent[phase] for phase in PHASES)
        summary = {
            **_setting(trainer, module, batch),
            "steps": [self._first + self._after + 1, self._step],
            "flops_per_token": asdict(self._accounting.per_token),
            "unprofiled": self._unprofiled,
            "profiled": self._accounting.rates(trainer, 1e3 * (tokens - self._tokens) / window),
            "step_milliseconds": window / self._steps,
            "phase_milliseconds": {phase: spent[phase] / self._steps for phase in PHASES},
            "validation_milliseconds": spent[VALIDATION],
            **facts_of(recorder.function_events, self._steps, window),
            "versions": versions(),
            "git_commit": git_commit(),
        }
        from llada_lightning.study.plots.style import write_figure
        from llada_lightning.study.plots.tables import step_phases  # matplotlib takes its time

        write_json(self._folder / SUMMARY_FILE, summary)
        with written_atomically(self._folder / "summary.md") as temporary:
            temporary.write_text(page(summary), encoding="utf-8")
        write_figure(step_phases(summary["phase_milliseconds"], PHASES), self._folder, "phases")
        self._accounting.leave_out()
        say(f"profile of steps {self._first + self._after + 1}-{self._step}: {self._folder / 'summary.md'}")


def _setting(trainer: Trainer, module: LanguageModule, batch: TrainingBatch) -> dict[str, Any]:
    data, speed, strategy = trainer.datamodule, module.speed, trainer.strategy  # type: ignore[attr-defined]
    device, (micro_batch, length) = strategy.root_device, batch.tokens_BL.shape
    assert module.vocab_size is not None
    # What `llada plan` says, where it speaks of the same: bf16-mixed, nothing recomputed, no micro-batch divided.
    estimate = None
    alike = speed.recompute == "none" and not speed.fp8 and tensor_parallel(strategy) == 1
    if device.type == "cuda" and trainer.precision == "bf16-mixed" and alike:
        shards = trainer.world_size if isinstance(strategy, FullySharded) else 1
        estimate = training_memory_bytes(module.shape, module.vocab_size, length, micro_batch, shards, speed.loss)
    return {
        "objective": module.objective,
        "shape": shape_name(module.shape),
        "params_nonembedding": module.shape.params_nonembedding,
        "params_total": module.shape.params_total(module.vocab_size),
        "vocab_size": module.vocab_size,
        "sequence_length": data.sequence_length,
        "global_batch": data.batch,
        "micro_batch": micro_batch,
        "accumulation": trainer.accumulate_grad_batches,
        "device": describe_devices(trainer),
        "devices": trainer.world_size,
        "on_gpu": device.type == "cuda",
        "threads": torch.get_num_threads(),
        "precision": str(trainer.precision),
        "strategy": type(strategy).__name__,
        "speed": asdict(speed),
        "peak_memory_bytes": peak_memory_bytes(device),
        "estimated_memory_bytes": estimate,
    }


def facts_of(events: Iterable[FunctionEvent], steps: int, window: float) -> dict[str, Any]:
    """What a recording tells of one step: operations, communication, how busy the GPU is.

    The operations are the kernels where there are any, else those of the CPU; the time of one is without what it calls.
    What begins within a validation does not count: its two ends wait for the GPU.

    Args:
        events: The recorded events.
        steps: The number of steps that were recorded.
        window: The duration of all steps in milliseconds.
    """
    events = list(events)
    validations = [e.time_range for e in events if e.name == f"[pl][profile]{VALIDATION}"]
    events = [e for e in events if not any(v.start <= e.time_range.start < v.end for v in validations)]
    own = [event for event in events if not event.is_user_annotation]
    on_device = [event for event in own if event.device_type != DeviceType.CPU]
    work = on_device or own
    # gloo works in threads of its own, and what it does there is an annotation.
    communicating = [event for event in on_device or events if _COMMUNICATION.search(event.name)]
    computing = [event for event in work if not _COMMUNICATION.search(event.name)]
    spent, calls = Counter[str](), Counter(event.name for event in work)
    for event in work:
        spent[event.name] += event.time_range.elapsed_us() if on_device else event.self_cpu_time_total
    return {
        "communication_milliseconds": {
            "total": _covered(communicating) / steps,
            "alone": (_covered([*communicating, *computing]) - _covered(computing)) / steps,
        },
        "device_busy": _covered(on_device) / window if on_device else None,
        "operations": [
            {"name": name, "milliseconds": microseconds / 1e3 / steps, "calls": calls[name] / steps}
            for name, microseconds in spent.most_common(_OPERATIONS)
        ],
    }


def _covered(events: Iterable[FunctionEvent]) -> float:
    """The milliseconds in which at least one of the events is under way."""
    total, until = 0.0, float("-inf")
    for span in sorted((event.time_range for event in events), key=lambda span: span.start):
        total += max(0.0, span.end - max(span.start, until))
        until = max(until, span.end)
    return total / 1e3
