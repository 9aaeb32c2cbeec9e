"""Two torchrun agents on loopback: as two nodes, each with one process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from helpers.tiny_runs import (
    child_environment,
    fit,
    fit_arguments,
    free_port,
    kill_at,
    losses,
    metrics,
    record,
    weights,
)
from llada_lightning.checkpoints.run_folder import is_sharded

SCRIPT = Path(__file__).parents[2] / "experiments" / "cluster" / "torchrun.sh"


def torchrun(*arguments: str) -> list[subprocess.CompletedProcess[str]]:
    """`torchrun --nnodes 2 --nproc-per-node 1 -m llada_lightning ARGUMENTS` by two agents; both, when they are done."""
    sizes = ["--nnodes", "2", "--nproc-per-node", "1"]
    meeting = ["--rdzv-backend", "c10d", "--rdzv-id", "test", "--rdzv-endpoint", f"127.0.0.1:{free_port()}"]
    agent = [sys.executable, "-m", "torch.distributed.run", *sizes, *meeting]
    command = [*agent, "--local-addr", "127.0.0.1", "-m", "llada_lightning", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    agents = [subprocess.Popen(command, env=child_environment(), **pipes) for _ in range(2)]  # type: ignore[call-overload]
    try:
        outputs = [agent.communicate(timeout=240) for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
    return [
        subprocess.CompletedProcess(command, agent.returncode, out, err)
        for agent, (out, err) in zip(agents, outputs, strict=True)
    ]


@pytest.mark.slow
def test_two_agents_train_and_save_shards_and_one_process_goes_on(prepared: Path, tmp_path: Path) -> None:
    whole = fit("llada", prepared, tmp_path / "whole")
    killed = torchrun(*fit_arguments("llada", prepared, tmp_path / "run", "--trainer.strategy=fsdp2", kill_at(13)))
    assert [agent.returncode for agent in killed] == [1, 1], killed[0].stderr
    folder = tmp_path / "run" / "test" / "run"
    saved = sorted((folder / "checkpoints").glob("*.ckpt"))
    assert [path.name for path in saved] == ["step=00000005.ckpt", "step=00000010.ckpt"]
    assert all(is_sharded(path) for path in saved)
    assert len(list(saved[-1].glob("*.distcp"))) == 2  # one file a process
    config = yaml.safe_load((folder / "config.yaml").read_text())["trainer"]
    assert (config["devices"], config["num_nodes"]) == ("auto", 1)  # the launcher's, not the run's

    fit("llada", prepared, tmp_path / "run")
    assert losses(folder) == pytest.approx(losses(whole), abs=1e-5)
    assert [row["step"] for row in metrics(folder)] == [row["step"] for row in metrics(whole)]
    assert record(folder)["val_nats_per_token"] == pytest.approx(record(whole)["val_nats_per_token"], abs=1e-5)
    for key, value in weights(whole).items():
        assert weights(folder)[key].numpy() == pytest.approx(value.numpy(), abs=1e-5)


@pytest.mark.slow
def test_a_mistake_is_reported_once_by_all_processes(prepared: Path, tmp_path: Path) -> None:
    agents = torchrun(*fit_arguments("llada", prepared, tmp_path, "--trainer.devices=2"))
    text = "".join(agent.stderr for agent in agents)
    assert text.count("error: trainer.devices x num_nodes: 2 x 2 = 4 processes configured") == 1
    assert text.count("torchrun launched 1 x 2 = 2") == 1
    assert {line.split("(")[0].split(":")[1].strip() for line in text.splitlines() if "exitcode  :" in line} == {"2"}
    assert not (tmp_path / "test").exists()


def test_the_script_meets_and_counts_by_itself(tmp_path: Path) -> None:
    program = tmp_path / "torchrun"
    program.write_text('#!/bin/bash\nprintf "%s " "$@"\n')
    program.chmod(0o755)
    base = {"PATH": f"{tmp_path}:/usr/bin:/bin"}

    def launched(**variables: str) -> str:
        command = [str(SCRIPT), "--config", "run.yaml"]
        return subprocess.run(command, env=base | variables, capture_output=True, text=True, check=True).stdout.strip()

    fit_words = "-m llada_lightning fit --config run.yaml"
    assert launched() == f"--nnodes 1 --nproc-per-node auto --standalone {fit_words}"
    assert launched(NNODES="2", RDZV="node0:29500", NPROC_PER_NODE="4") == (
        f"--nnodes 2 --nproc-per-node 4 --rdzv-backend c10d --rdzv-id llada --rdzv-endpoint node0:29500 {fit_words}"
    )
    with pytest.raises(subprocess.CalledProcessError) as refused:
        launched(NNODES="2")
    assert "RDZV: host:port of one node, the same on all" in refused.value.stderr
