"""Weights & Biases as a second log: optional, never in the way of the run."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any, Concatenate, ParamSpec

from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only, rank_zero_warn

from llada_lightning.errors import UserError
from llada_lightning.printing import shortened
from llada_lightning.signals import say

INIT_TIMEOUT_SECONDS = 30.0
"""How long the start of a run may take where W&B does not answer, unless WANDB_INIT_TIMEOUT says otherwise."""
FINISH_TIMEOUT_SECONDS = 60.0
"""How long its end may take, unless WANDB_FINISH_TIMEOUT says otherwise; what is not sent by then stays on disk."""


def init_timeout() -> float:
    """Returns the seconds that the start of a run may take."""
    return _seconds("WANDB_INIT_TIMEOUT", INIT_TIMEOUT_SECONDS)


def finish_timeout() -> float:
    """Returns the seconds that the end of a run may take."""
    return _seconds("WANDB_FINISH_TIMEOUT", FINISH_TIMEOUT_SECONDS)


def _seconds(variable: str, default: float) -> float:
    text = os.environ.get(variable, str(default))
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise UserError(f"{variable}: '{shortened(text)}' given; it must be a number of seconds, such as {default:g}")
    return seconds


def check_wandb(project: str | None, entity: str | None, group: str | None) -> None:
    """Refuse what W&B's client would refuse when the run starts: names, and environment variables.

    Raises:
        UserError: W&B is asked for, and is not installed or refuses its settings.
    """
    if not _is_wanted(project):
        return
    init_timeout()
    finish_timeout()
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


P = ParamSpec("P")


def _never_in_the_way(method: Callable[Concatenate[SafeWandbLogger, P], None]) -> Callable[..., None]:
    """Whatever W&B raises ends the logging, with one line, and not the run."""

    @functools.wraps(method)
    def call(self: SafeWandbLogger, *args: P.args, **kwargs: P.kwargs) -> None:
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
                f"warning: W&B is lost ({reason}); the run goes on, metrics.csv and result.json stay complete, and "
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
    def log_hyperparams(self, params: Any) -> None:
        super().log_hyperparams(params)

    @_never_in_the_way
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        super().log_metrics(metrics, step)

    @_never_in_the_way
    def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
        super().after_save_checkpoint(checkpoint_callback)

    @_never_in_the_way
    def finalize(self, status: str) -> None:
        super().finalize(status)

    @rank_zero_only
    @_never_in_the_way
    def update_summary(self, values: dict[str, Any]) -> None:
        """The figures that stand for the run in W&B's tables."""
        self.experiment.summary.update(values)

    @rank_zero_only
    @_never_in_the_way
    def finish(self) -> None:
        """Send what is left, for :func:`finish_timeout` seconds at most, and say so if that was too short."""
        run = self.experiment
        run.finish()
        if getattr(run, "_finish_timed_out", False):
            raise TimeoutError(f"no answer within {finish_timeout():g} s")


def wandb_logger(
    folder: Path, run_id: str, name: str, project: str | None, entity: str | None, group: str | None, offline: bool
) -> SafeWandbLogger | None:
    """The logger of a run, started; None where neither a project nor a sweep's agent asks for one.

    The id follows from the run's configuration, so a restarted run goes on in the same curves. Where W&B cannot be
    reached the run is logged offline, into ``folder/wandb``, from where ``wandb sync`` sends it later.

    Raises:
        UserError: wandb is not installed.
    """
    if not _is_wanted(project):
        return None
    wandb, in_sweep = _wandb(), "WANDB_SWEEP_ID" in os.environ
    # An agent has chosen the id already: of a new run, or of one that was preempted.
    identity: dict[str, Any] = {"resume": "allow"} if in_sweep else {"id": run_id, "resume": "allow"}

    bounded: dict[str, Any] = {}
    if "finish_timeout" in wandb.Settings.model_fields:  # older ones wait for as long as it takes
        bounded["finish_timeout"] = finish_timeout()

    def start(offline: bool) -> SafeWandbLogger:
        logger = SafeWandbLogger(
            name=name,
            project=project,
            entity=entity,
            group=group,
            save_dir=str(folder),
            offline=offline,
            settings=wandb.Settings(init_timeout=init_timeout(), silent=True, **bounded),
            **identity,
        )
        start_run(logger)
        return logger

    try:
        return start(offline)
    except (wandb.errors.Error, OSError) as error:
        reason = " ".join(str(error).split())
        rank_zero_warn(f"W&B is not reachable ({reason}); this run is logged offline, into {folder}/wandb")
        wandb.teardown()  # or its service would hold the id for the run that failed
        return start(offline=True)


@rank_zero_only
def start_run(logger: WandbLogger) -> None:
    """Start the W&B run now, so that a refusal shows before training does."""
    _ = logger.experiment
