"""Benchmarks while a run trains: every so many steps, into the run's `evaluations.csv`."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.precision import MixedPrecision

from llada_lightning.checkpoints.language_model import LanguageModel
from llada_lightning.checkpoints.run_folder import BRANCHES
from llada_lightning.data import TOKENIZER_NAME
from llada_lightning.data.loading import LanguageDataModule
from llada_lightning.data.tokenizers import tokenizer_from_text
from llada_lightning.generation.sampling import Sampling
from llada_lightning.records import write_evaluations
from llada_lightning.support.errors import UserError
from llada_lightning.training.callbacks.accounting import Accounting
from llada_lightning.training.callbacks.loggers import MetricsCSV
from llada_lightning.training.first_weights import inherited
from llada_lightning.training.language_module import LanguageModule


class EvaluateTasks(Callback):
    """Measures tasks through lm-evaluation-harness, as `llada evaluate` does, without changing what is trained.

    Tasks that execute code are refused. The time is left out of the run's tokens per second. A row of the last step
    joins the results table, also where ``limit`` made it rough: its ``n`` says so.

    Args:
        tasks: The names of tasks of lm-evaluation-harness.
        every_n_steps: The number of optimizer steps between evaluations.
        include_path: A folder with your own task files.
        limit: The number of documents of each task, from its first; null: all of them.
        shots: The number of examples in the prompt; null: as the task says.
        monte_carlo: The number of masks for a continuation of several tokens (`llada`).
        sampling: The settings of answers: those that are not the defaults go before what the task says.
    """

    def __init__(
        self,
        tasks: list[str],
        every_n_steps: int = 1000,
        include_path: str | None = None,
        limit: int | None = 200,
        shots: int | None = None,
        monte_carlo: int = 16,
        sampling: Sampling | None = None,
    ) -> None:
        for name, count in (("every_n_steps", every_n_steps), ("monte_carlo", monte_carlo), ("limit", limit)):
            if count is not None and count < 1:
                raise UserError(f"EvaluateTasks: {name} is {count}; it must be at least 1")
        self._tasks, self._every, self._limit = list(tasks), every_n_steps, limit
        self._include_path = None if include_path is None else Path(include_path)
        self._shots, self._monte_carlo, self._sampling = shots, monte_carlo, sampling
        self._loaded: list[Any] = []
        self._measured_step = -1

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tasks are loaded before anything is trained, so that a missing one is found at once."""
        if getattr(pl_module, "device_mesh", None) is not None:
            raise UserError("EvaluateTasks: a sharded model cannot be measured while it trains; use llada evaluate")
        try:
            from llada_lightning.evaluation.benchmarks import load_benchmark, task_manager
        except ModuleNotFoundError as error:
            raise UserError(f"EvaluateTasks: {error.name} is missing; pip install 'llada-lightning[eval]'") from error
        from llada_lightning.evaluation.suites import Benchmark

        benchmarks = [Benchmark(name, name, shots=self._shots) for name in self._tasks]
        manager = task_manager(benchmarks, self._include_path)
        self._loaded = [load_benchmark(manager, benchmark, unsafe_code=False) for benchmark in benchmarks]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step % self._every or step in (0, self._measured_step):
            return
        self._measured_step = step
        accounting = next((each for each in trainer.callbacks if isinstance(each, Accounting)), None)  # type: ignore[attr-defined]
        if accounting is not None:
            accounting.settled(trainer)
        assert isinstance(pl_module, LanguageModule)
        pl_module.model.eval()
        try:
            plugin = trainer.precision_plugin
            with plugin.forward_context() if isinstance(plugin, MixedPrecision) else nullcontext():
                rows = self._rows(trainer, pl_module, step)
        finally:
            pl_module.model.train()
        logger = next((each for each in trainer.loggers if isinstance(each, MetricsCSV)), None)
        if rows and logger is not None:  # only rank 0 has rows, and only `llada fit` has this logger
            folder = Path(logger.save_dir)
            write_evaluations(folder.parent.parent if folder.parent.name == BRANCHES else folder, rows)
        if accounting is not None:
            accounting.leave_out()

    def _rows(self, trainer: Trainer, module: LanguageModule, step: int) -> list[dict[str, Any]]:
        from llada_lightning.evaluation.benchmarks import measure
        from llada_lightning.evaluation.harness import HarnessModel

        model = HarnessModel(_language_model(trainer, module), monte_carlo=self._monte_carlo)
        said = {} if self._sampling is None else self._sampling.changes
        settings = json.dumps({"monte_carlo": self._monte_carlo, "limit": self._limit, "in_training": True} | said)
        return [
            outcome.as_row(step, settings)
            for loaded in self._loaded
            for outcome in measure(model, loaded, limit=self._limit, sampling=self._sampling)
            if outcome.is_share
        ]


def _language_model(trainer: Trainer, module: LanguageModule) -> LanguageModel:
    """The model as it is being trained, with the tokenizer of its data."""
    data: LanguageDataModule = trainer.datamodule  # type: ignore[attr-defined]
    assert module.eos_token_id is not None
    starts_with_eos = (module.facts.starts_with_eos or module.shift_targets) and module.text_prefix_ids is None
    before = {} if module.weights is None else inherited(module.weights)
    return LanguageModel(
        objective=module.objective,
        model=module.model,
        mask_token_id=module.mask_token_id,
        eos_token_id=module.eos_token_id,
        context_length=max(data.sequence_length, before.get("context_length") or 0),  # as its checkpoints have it
        tokenizer=tokenizer_from_text(data.tokenizer_files()[TOKENIZER_NAME], TOKENIZER_NAME),
        start_token_id=module.eos_token_id if starts_with_eos else None,
        text_prefix_ids=tuple(module.text_prefix_ids or ()),
        end_token_ids=tuple(before.get("end_token_ids", ())),
        compat=module.compat,
        block_length=module.block_length,
        shift_targets=module.shift_targets,
        name="the model in training",
    )
