"""Weights & Biases as a second log: optional, never in the way of the run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only, rank_zero_warn

from llada_lightning.errors import UserError

INIT_TIMEOUT_SECONDS = float(os.environ.get("WANDB_INIT_TIMEOUT", "30"))


def wandb_logger(
    folder: Path, run_id: str, name: str, project: str | None, entity: str | None, group: str | None, offline: bool
) -> WandbLogger | None:
    """The logger of a run, started; None where neither a project nor a sweep's agent asks for one.

    The id follows from the run's configuration, so a restarted run goes on in the same curves. Where W&B cannot be
    reached the run is logged offline, into ``folder/wandb``, from where ``wandb sync`` sends it later.

    Raises:
        UserError: wandb is not installed.
    """
    in_sweep = "WANDB_SWEEP_ID" in os.environ
    if project is None and not in_sweep:
        return None
    try:
        import wandb
    except ImportError as error:
        raise UserError("wandb.project: the package wandb is not installed; pip install wandb") from error
    # An agent has chosen the id already: of a new run, or of one that was preempted.
    identity: dict[str, Any] = {"resume": "allow"} if in_sweep else {"id": run_id, "resume": "allow"}

    def start(offline: bool) -> WandbLogger:
        logger = WandbLogger(
            name=name,
            project=project,
            entity=entity,
            group=group,
            save_dir=str(folder),
            offline=offline,
            settings=wandb.Settings(init_timeout=INIT_TIMEOUT_SECONDS, silent=True),
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
