"""What the tests of W&B share: a stand-in for its server, and an environment that knows no other."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.wandb_standin import WandbStandIn


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbStandIn]:
    """The stand-in, and an environment in which wandb's client knows nothing else."""
    import wandb

    wandb.teardown()  # or it would go on with what an earlier test told it
    for name in [name for name in os.environ if "WANDB" in name]:
        monkeypatch.delenv(name)
    home = str(tmp_path / "wandb-home")
    with WandbStandIn() as standin:
        for name, value in {**standin.environment, "OMP_NUM_THREADS": "1"}.items():
            monkeypatch.setenv(name, value)
        for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
            monkeypatch.setenv(name, home)
        monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
        monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
        monkeypatch.chdir(tmp_path)
        before = set(os.environ)
        yield standin
        wandb.teardown()
        for name in set(os.environ) - before:
            del os.environ[name]
