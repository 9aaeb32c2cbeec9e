"""One step of a run made again in memory, to see what was in it; nothing is written."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.cli import LightningCLI
from rich.progress import Progress

from llada_lightning.checkpoints.run_folder import (
    BRANCHES,
    CONFIG,
    last_checkpoint,
    saved_identity,
    saved_step,
    whole_checkpoint,
)
from llada_lightning.data.datamodule import TokenDataModule
from llada_lightning.data.encoding import decode
from llada_lightning.data.manifest import read_tokenizer_text
from llada_lightning.data.tokenizers import tokenizer_from_text
from llada_lightning.identity import check_identity
from llada_lightning.objectives import TrainingKind
from llada_lightning.objectives.batches import TrainingBatch
from llada_lightning.records import read_faults
from llada_lightning.support.cluster import device_count
from llada_lightning.support.errors import UserError
from llada_lightning.support.printing import people_console
from llada_lightning.support.reading import read_yaml
from llada_lightning.support.signals import say
from llada_lightning.training.callbacks.checkpoints import AtomicCheckpointIO
from llada_lightning.training.callbacks.leaving import MemoryAdvice
from llada_lightning.training.callbacks.loggers import loss_column, read_rows
from llada_lightning.training.cli import LladaCLI
from llada_lightning.training.guard import UpdateGuard
from llada_lightning.training.language_module import LanguageModule
from llada_lightning.training.parallel import tensor_parallel
from llada_lightning.training.phases import Phase

_TEXT_TOKENS = 32


@dataclass(frozen=True)
class SequenceReplay:
    """A sequence of the step.

    Attributes:
        source: The folder of its corpus.
        item: The number of the item there.
        length: The number of tokens, padding not counted.
        t: The mask ratio; null where nothing is masked (`arm`), as the next two.
        p: The mask probability, or the mean of those of the blocks.
        masked: The number of masked tokens.
        loss: The part of the step's loss, in nats per token of the global batch.
        finite: Whether the loss is a finite number.
        text: The beginning of the text.
    """

    ordinal: int
    source: str
    item: int
    length: int
    t: float | None
    p: float | None
    masked: int | None
    loss: float
    finite: bool
    text: str


@dataclass(frozen=True)
class StepReplay:
    """A step made again.

    Attributes:
        kind: Whether the loss is `exact`, the `bound`, or a `surrogate` whose expectation is neither.
        loss: The loss in nats per token of the global batch, before the update.
        grad_norm: The gradient norm before clipping.
        skipped: Whether the guard skips the update.
        seen_loss, seen_grad_norm: What the run itself has written of this step; None where it has not logged it.
        sequences: The sequences, in order of their ordinals.
    """

    step: int
    lr: float
    kind: TrainingKind
    loss: float
    grad_norm: float
    skipped: bool
    seen_loss: float | None
    seen_grad_norm: float | None
    sequences: list[SequenceReplay]


def replay_step(folder: Path, step: int, settings: Sequence[str] = ()) -> StepReplay:
    """Train a run again, on one device, from its nearest checkpoint before a step to that step.

    Of a run on one device of this kind the figures are the run's to the last digit; of one on several, to rounding. The
    run's own callbacks are left out.

    Args:
        folder: The folder of a run, or of one of its branches.
        step: The step, counted from 1, as in `metrics.csv`.
        settings: The further arguments of `llada fit`, such as another accelerator or a smaller micro-batch.
    """
    folder = folder.absolute()
    run = folder.parent.parent if folder.parent.name == BRANCHES else folder
    if not (run / CONFIG).is_file():
        raise UserError(f"replay: {folder} has no {CONFIG}; give the folder of a run, or one of its {BRANCHES}/")
    cli = ReplayCLI(folder, step, [*_fit_arguments(run), *settings])
    model, recorder = cli.model, cli.recorder
    assert isinstance(model, LanguageModule) and model.step_loss is not None and model.grad_norm is not None
    model.guard.settle()
    kind = model.training_kind(cli.datamodule.density_setting)
    return StepReplay(
        step=step,
        lr=model.schedule.at(step - 1),
        kind=kind,
        loss=float(model.step_loss),
        grad_norm=float(model.grad_norm),
        skipped=model.guard.last_update < step,
        seen_loss=_seen(folder, step, loss_column(kind), "loss"),
        seen_grad_norm=_seen(folder, step, "grad_norm", "grad_norm"),
        sequences=sorted(recorder.sequences, key=lambda sequence: sequence.ordinal),
    )


class ReplayCLI(LladaCLI):
    """`llada fit` up to a step of a run, without all that `fit` writes, prints or refuses around it."""

    def __init__(self, folder: Path, step: int, args: list[str]) -> None:
        self._folder, self._step = folder, step
        super().__init__(args)

    def check_folder(self) -> None:
        """A run that is done, or under way, may be looked at."""

    def _enter(self, phase: Phase) -> None:
        here = [phase for phase in self.phases if phase.folder.resolve() == self._folder.resolve()]
        if not here:
            folder = self.phases[0].folder
            raise UserError(f"replay: {self._folder} is no folder of this run; its folders are {folder} and branches/")
        phase = max(here, key=lambda phase: phase.last_step)
        if not phase.first_step < self._step <= phase.last_step:
            steps = f"{phase.first_step + 1}-{phase.last_step}"
            raise UserError(f"replay: --step {self._step} given, but {self._folder} has steps {steps}")
        saved = last_checkpoint(phase.checkpoints)
        if saved is not None:
            check_identity(saved_identity(saved), phase.identity, saved, "restore these settings")
        super()._enter(phase)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        guard = self.settings.guard
        self.model.guard = UpdateGuard(guard.spikes, guard.spike_zscore)
        self.recorder, self.memory = StepRecorder(self._step), MemoryAdvice()
        nothing_else: dict[str, Any] = {"limit_val_batches": 0, "enable_checkpointing": False, "logger": False}
        return LightningCLI.instantiate_trainer(
            self,
            max_steps=self._step,
            callbacks=[self.recorder, self.memory],
            plugins=[AtomicCheckpointIO()],
            enable_progress_bar=False,
            **nothing_else,
        )

    def _run_resolved(self, subcommand: str) -> None:
        if not isinstance(self.datamodule, TokenDataModule):
            raise UserError("replay: only the steps of a pre-training can be replayed, and this run learned from pairs")
        step, parent = self._step, self.phase.foreign_parent
        start, _ = whole_checkpoint(self.phase.checkpoints, before=step)
        if start is None and parent is not None and saved_step(parent) >= step:
            raise UserError(
                f"replay: --step {step} lies before {parent}, where this run begins; replay the run of that"
            )
        start = start or parent
        say(f"replaying up to step {step} from {start or 'the beginning'}")
        self.trainer.fit(self.model, datamodule=self.datamodule, ckpt_path=start)


class StepRecorder(Callback):
    """Takes down the sequences of one step before its update; progress on a terminal's stderr."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.sequences: list[SequenceReplay] = []
        self._progress = Progress(console=people_console(stderr=True), transient=True, disable=not sys.stderr.isatty())

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data = trainer.datamodule  # type: ignore[attr-defined]
        folder = next(iter(data.weights))
        self._tokenizer = tokenizer_from_text(read_tokenizer_text(folder), folder)
        self._task = self._progress.add_task("replay", total=self.step, completed=trainer.global_step)
        self._progress.start()

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: TrainingBatch, batch_idx: int
    ) -> None:
        if trainer.global_step + 1 < self.step:
            return
        assert isinstance(pl_module, LanguageModule)
        with torch.no_grad(), trainer.precision_plugin.train_step_context():
            for row in range(len(batch.ordinals_B)):
                self.sequences.append(self._sequence(trainer, pl_module, batch.rows(slice(row, row + 1))))

    def on_train_batch_end(self, trainer: Trainer, *arguments: Any) -> None:
        self._progress.update(self._task, completed=trainer.global_step)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._progress.stop()

    def _sequence(self, trainer: Trainer, module: LanguageModule, alone: TrainingBatch) -> SequenceReplay:
        data = trainer.datamodule  # type: ignore[attr-defined]
        ordinal, p = int(alone.ordinals_B), float(alone.p_B.mean())
        source, item = trainer.train_dataloader.dataset.stream.locate(ordinal)  # type: ignore[union-attr]
        loss = float(module.training_loss(alone)) / trainer.accumulate_grad_batches
        mask = alone.attention_mask_BL
        tokens = alone.tokens_BL[0, :_TEXT_TOKENS].tolist()
        denoises = module.facts.denoises
        return SequenceReplay(
            ordinal=ordinal,
            source=list(data.weights)[source],
            item=item,
            length=alone.tokens_BL.shape[1] if mask is None else int(mask.sum()),
            t=(p - data.mask_eps) / (1 - data.mask_eps) if denoises else None,
            p=p if denoises else None,
            masked=int(alone.masked_BL.sum()) if denoises else None,
            loss=loss,
            finite=math.isfinite(loss),
            text=decode(self._tokenizer, tokens, skip_special_tokens=False),
        )


def _fit_arguments(run: Path) -> list[str]:
    """`fit` of the run where it lies now, on one device: what several do at once is accumulated."""
    config = read_yaml(run / CONFIG)
    trainer, data = config["trainer"], config["data"]["init_args"]
    devices = (device_count(trainer["devices"]) or 1) * trainer["num_nodes"]
    devices = max(1, devices // tensor_parallel(trainer["strategy"]))  # of one group together do the work of one
    micro_batch = data["micro_batch"]
    accumulation = data["global_batch"] // micro_batch if micro_batch else trainer["accumulate_grad_batches"] * devices
    place = [f"--run.root={run.parent.parent}", f"--run.study={run.parent.name}", f"--run.name={run.name}"]
    alone = ["--trainer.devices=1", "--trainer.num_nodes=1", "--trainer.strategy=auto", "--trainer.callbacks=null"]
    return ["fit", f"--config={run / CONFIG}", *place, *alone, f"--trainer.accumulate_grad_batches={accumulation}"]


def _seen(folder: Path, step: int, in_metrics: str, in_faults: str) -> float | None:
    """What the run has written of a step."""
    rows = [(row, in_metrics) for row in read_rows(folder / "metrics.csv")]
    rows += [(row, in_faults) for row in read_faults(folder)]
    found = [float(row[name]) for row, name in rows if int(row["step"]) == step and row.get(name)]
    return found[0] if found else None
