"""`metrics.csv`, right after any number of restarts, and Weights & Biases, which is never in the way of the run."""

from __future__ import annotations

import csv
import functools
import io
import math
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only, rank_zero_warn

from llada_lightning.objectives import TrainingKind
from llada_lightning.records import METRICS_FILE, level_columns, metrics_rows
from llada_lightning.support.errors import UserError
from llada_lightning.support.files import written_atomically
from llada_lightning.support.printing import shortened
from llada_lightning.support.signals import say
from llada_lightning.training.lightning_internals import without_anonymous

COLUMNS = (
    "step", "tokens", "flops_6nd", "flops_attention", "flops_head", "flops_total", "lr", "train_nats_per_token",
    "grad_norm", "skipped_updates", "tokens_per_second", "flops_6nd_per_second", "flops_attention_per_second",
    "flops_head_per_second", "flops_total_per_second", "mfu", "peak_memory_bytes", "seconds", "val_nats_per_token",
    "val_stderr", "val_bits_per_byte",
)  # fmt: skip

TRAINING_LOSS, SURROGATE_LOSS = "train_nats_per_token", "train_surrogate"
"""The column of the training loss: of the exact loss or its bound, and of a loss whose expectation is neither."""


def loss_column(kind: TrainingKind) -> str:
    """The column of a training loss of a kind."""
    return SURROGATE_LOSS if kind == "surrogate" else TRAINING_LOSS


class MetricsCSV(Logger):
    """One row a step. The first row that a process writes replaces all rows of later steps, which a killed process may
    have left behind its last checkpoint; columns that others log are added to the file.

    Args:
        folder: The folder of the file.
        kind: What the training loss is, which names its column.
        by_noise_level: Whether there are columns with the losses by noise level.
    """

    def __init__(self, folder: Path, kind: TrainingKind = "bound", by_noise_level: bool = False) -> None:
        super().__init__()
        self._path = folder / METRICS_FILE
        self._own = [loss_column(kind) if name == TRAINING_LOSS else name for name in COLUMNS]
        if by_noise_level:  # all of them from the first row on: which bins have tokens is a matter of chance
            self._own += [*level_columns("train"), *level_columns("val")]
        self._columns = list(self._own)
        self._row: dict[str, Any] | None = None

    @property
    def name(self) -> str:
        return METRICS_FILE

    @property
    def version(self) -> str:
        return ""

    @property
    def save_dir(self) -> str:
        return str(self._path.parent)

    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """The resolved configuration is in config.yaml."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        assert step is not None
        values = {key: _number(value) for key, value in metrics.items() if key != "epoch"}
        if self._row is None:
            self._row = self._open(step)
        elif self._row["step"] != step:
            self._append(self._row)
            self._row = {"step": step}
        self._row.update(values)

    @rank_zero_only
    def save(self) -> None:
        """Put the row in hand on disk; values that the same step logs later are added to it."""
        if self._row is not None:
            self._append(self._row)
            self._row = None

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self.save()

    def _open(self, step: int) -> dict[str, Any]:
        """Keep the rows before ``step``; return that step's row as it is."""
        rows = read_rows(self._path)
        self._columns = list(dict.fromkeys([*self._own, *(key for row in rows for key in row)]))
        self._write([row for row in rows if int(row["step"]) < step])
        same: dict[str, Any] = next((row for row in rows if int(row["step"]) == step), {})
        return {**same, "step": step}

    def _append(self, row: dict[str, Any]) -> None:
        if not set(row) <= set(self._columns):
            rows = read_rows(self._path)
            self._columns = list(dict.fromkeys([*self._columns, *row]))
            self._write(rows)
        with self._path.open("a", newline="") as file:
            file.write(self._render([row], header=False))

    def _write(self, rows: list[dict[str, Any]]) -> None:
        with written_atomically(self._path) as temporary:
            temporary.write_text(self._render(rows, header=True))

    def _render(self, rows: list[dict[str, Any]], header: bool) -> str:
        text = io.StringIO()
        writer = csv.DictWriter(text, self._columns, restval="", lineterminator="\n")
        if header:
            writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a metrics file (``records.metrics_rows``); none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return metrics_rows(file)


def _number(value: Any) -> Any:
    number = float(value)
    return int(number) if math.isfinite(number) and number.is_integer() and abs(number) < 1e15 else number


_TIMEOUTS = {"WANDB_INIT_TIMEOUT": 30.0, "WANDB_FINISH_TIMEOUT": 60.0}
"""Seconds that the start and the end of a run may take where W&B does not answer, unless these variables say otherwise.
What is not sent by then stays on disk."""


def _timeout(variable: str) -> float:
    text = os.environ.get(variable, str(_TIMEOUTS[variable]))
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        usual = f"{_TIMEOUTS[variable]:g}"
        raise UserError(f"{variable}: '{shortened(text)}' given; it must be a number of seconds, such as {usual}")
    return seconds


def check_wandb(project: str | None, entity: str | None, group: str | None) -> None:
    """Refuse what W&B's client would refuse when the run starts: names, and environment variables."""
    if not _is_wanted(project):
        return
    for variable in _TIMEOUTS:
        _timeout(variable)
    wandb = _wandb()
    try:
        settings = wandb.Settings(project=project, entity=entity, run_group=group)
        settings.update_from_env_vars(os.environ)
    except (wandb.errors.UsageError, ValueError) as error:  # a ValidationError of pydantic is a ValueError
        raise UserError(
            f"wandb: W&B refuses its settings ({shortened(error, 300)}); correct --wandb.project, --wandb.entity, or "
            "the environment variables WANDB_..."
        ) from error


def _is_wanted(project: str | None) -> bool:
    return project is not None or "WANDB_SWEEP_ID" in os.environ


def _wandb() -> ModuleType:
    try:
        import wandb
    except ImportError as error:
        raise UserError("wandb.project: the package wandb is not installed; pip install wandb") from error
    return wandb


def _never_in_the_way(method: Callable[..., None]) -> Callable[..., None]:
    """Whatever W&B raises ends the logging, with one line, and not the run."""

    @functools.wraps(method)
    def call(self: SafeWandbLogger, *args: Any, **kwargs: Any) -> None:
        if self.is_lost:
            return
        try:
            method(self, *args, **kwargs)
        except Exception as error:
            self.is_lost = True
            import wandb

            with suppress(Exception, SystemExit):  # or it would try again, and fail aloud, as Python leaves
                wandb.teardown()
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            say(
                f"warning: W&B is lost ({reason}); the run continues, metrics.csv and result.json stay complete, and "
                f"what W&B had until now can be sent by: wandb sync {self.save_dir}/wandb/*run-*"
            )

    return call


class SafeWandbLogger(WandbLogger):
    """Lightning's logger, of whose faults none ends a run.

    Attributes:
        is_lost: W&B has raised; nothing more is logged to it.
    """

    is_lost = False

    @_never_in_the_way
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        super().log_hyperparams(*args, **kwargs)

    @_never_in_the_way
    def log_metrics(self, *args: Any, **kwargs: Any) -> None:
        super().log_metrics(*args, **kwargs)

    @_never_in_the_way
    def after_save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        super().after_save_checkpoint(*args, **kwargs)

    @_never_in_the_way
    def finalize(self, *args: Any, **kwargs: Any) -> None:
        super().finalize(*args, **kwargs)

    @rank_zero_only
    @_never_in_the_way
    def update_summary(self, values: dict[str, Any]) -> None:
        """The figures that represent the run in W&B's tables."""
        self.experiment.summary.update(values)

    @rank_zero_only
    @_never_in_the_way
    def finish(self) -> None:
        """Send what is left, as long as WANDB_FINISH_TIMEOUT allows, and say so if that was too short."""
        run = self.experiment
        run.finish()
        if getattr(run, "_finish_timed_out", False):
            raise TimeoutError(f"no answer within {_timeout('WANDB_FINISH_TIMEOUT'):g} s")


def wandb_logger(
    folder: Path, run_id: str, name: str, project: str | None, entity: str | None, group: str | None, offline: bool
) -> SafeWandbLogger | None:
    """The logger of a run, started; None where neither a project nor a sweep's agent asks for one.

    The id follows from the run's configuration, so a restarted run continues the same curves. Where W&B cannot be
    reached the run is logged offline, into ``folder/wandb``, from where ``wandb sync`` sends it later.
    """
    if not _is_wanted(project):
        return None
    wandb = _wandb()
    # An agent has chosen the id already: of a new run, or of one that was preempted.
    identity: dict[str, Any] = {} if "WANDB_SWEEP_ID" in os.environ else {"id": run_id}
    bounded = {"init_timeout": _timeout("WANDB_INIT_TIMEOUT")}
    if "finish_timeout" in wandb.Settings.model_fields:  # older ones wait for as long as it takes
        bounded["finish_timeout"] = _timeout("WANDB_FINISH_TIMEOUT")

    def start(offline: bool) -> SafeWandbLogger:
        logger = SafeWandbLogger(
            name=name,
            project=project,
            entity=entity,
            group=group,
            save_dir=str(folder),
            offline=offline,
            settings=wandb.Settings(silent=True, **bounded),
            resume="allow",
            **identity,
        )
        without_anonymous(logger)
        _ = logger.experiment  # starts the run, on rank 0, so that a refusal shows before training does
        return logger

    try:
        return start(offline)
    except (wandb.errors.Error, OSError) as error:
        reason = " ".join(str(error).split())
        rank_zero_warn(f"W&B is not reachable ({reason}); this run is logged offline, into {folder}/wandb")
        wandb.teardown()  # or its service would hold the id for the run that failed
        return start(offline=True)
