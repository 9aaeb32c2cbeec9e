"""The scripts of experiments/cluster, run with stand-ins for srun, scontrol and wandb that start things here."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from llada_lightning.study.sweep import fit_arguments, read_sweep, render_command

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "experiments" / "cluster"

SRUN = """#!/bin/bash
# Runs a command once for each task of the job, with the variables that srun sets; fails as the worst task does.
echo "srun $*" >> "$STAND_IN_LOG"
while [[ $1 == -* ]]; do shift; done
per_node=$((SLURM_NTASKS / SLURM_NNODES)) tasks=() code=0
for ((rank = 0; rank < SLURM_NTASKS; rank++)); do
  SLURM_STEP_ID=0 SLURM_PROCID=$rank SLURM_LOCALID=$((rank % per_node)) SLURM_NODEID=$((rank / per_node)) "$@" &
  tasks+=($!)
done
for task in "${tasks[@]}"; do wait "$task" || code=$?; done
exit $code
"""
SCONTROL = """#!/bin/bash
echo "scontrol $*" >> "$STAND_IN_LOG"
[[ $1 != show ]] || printf '127.0.0.1\\nnode1\\n'
"""
WANDB = """#!/bin/bash
# An agent that was given one run.
echo "wandb $*" >> "$STAND_IN_LOG"
WANDB_SWEEP_ID=swp WANDB_RUN_ID=abc exec bash -c "$STAND_IN_RUN"
"""


@pytest.fixture
def job(tmp_path: Path) -> dict[str, str]:
    """The environment of a job's script on two nodes with one task each, whose programs are stand-ins."""
    programs = {
        "srun": SRUN,
        "scontrol": SCONTROL,
        "wandb": WANDB,
        "llada": f'#!/bin/bash\nexec {sys.executable} -m llada_lightning "$@"\n',
    }
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in programs.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "WANDB_", "MASTER_"))}
    numbers = {"JOB_ID": "4711", "JOB_NODELIST": "node[0-1]", "NTASKS": "2", "NNODES": "2"}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return {
        **clean,
        "MASTER_PORT": str(port),
        **{f"SLURM_{name}": value for name, value in numbers.items()},
        "PATH": f"{folder}:{clean['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "STAND_IN_LOG": str(tmp_path / "log"),
    }


def run_configuration(data: Path, root: Path, path: Path) -> Path:
    """A tiny run, on CPUs."""
    shape = {"n_layers": 1, "d_model": 16, "n_heads": 1, "n_kv_heads": 1, "d_ff": 32}
    settings = {
        "model": {"class_path": "LladaModule", "init_args": {"shape": shape}},
        "data": {
            "class_path": "TokenDataModule",
            "init_args": {"path": str(data), "sequence_length": 32, "global_batch": 16},
        },
        "trainer": {"max_steps": 4, "precision": "32-true"},
        "run": {"root": str(root), "study": "cluster", "name": "run"},
    }
    path.write_text(yaml.safe_dump(settings))
    return path


def sbatch(script: str, *arguments: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(CLUSTER / script), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)


@pytest.mark.parametrize("script", sorted(p.name for p in CLUSTER.iterdir() if p.suffix in (".sh", ".sbatch")))
def test_each_script_is_sound(script: str) -> None:
    subprocess.run(["bash", "-n", str(CLUSTER / script)], check=True)
    text = (CLUSTER / script).read_text()
    assert text.startswith("#!/bin/bash\n")
    assert "set -euo pipefail" in text
    if script.endswith(".sbatch"):
        options = dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", text, re.MULTILINE))
        assert options["signal"] == "SIGUSR1@120"
        assert {"requeue", "ntasks-per-node", "nodes", "open-mode"} <= options.keys()
        commands = text.index("set -euo")
        assert not re.search(r"^#SBATCH", text[commands:], re.MULTILINE), "sbatch reads no options behind a command"


@pytest.fixture
def words(prepared: Path, tmp_path: Path) -> list[str]:
    """The arguments of a sharded run on CPUs."""
    config = run_configuration(prepared, tmp_path / "runs", tmp_path / "run.yaml")
    overlays = ["--config", str(config), "--config", str(CLUSTER / "fsdp2.yaml")]
    return [*overlays, "--trainer.accelerator=cpu", "--trainer.precision=32-true"]


def test_a_job_reports_a_mistake_once(words: list[str], tmp_path: Path, job: dict[str, str]) -> None:
    wrong = sbatch("slurm.sbatch", *words, "--data.global_batch=0", environment=job)
    assert wrong.returncode == 2
    assert wrong.stderr.count("error:") == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_job_trains_on_all_its_tasks(words: list[str], tmp_path: Path, job: dict[str, str]) -> None:
    done = sbatch("slurm.sbatch", *words, environment=job)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs" / "cluster" / "run"
    lines = (tmp_path / "log").read_text().splitlines()
    assert lines[-2:] == [
        "scontrol show hostnames node[0-1]",
        f"srun --kill-on-bad-exit=1 {sys.executable} -m llada_lightning fit --config {folder / 'launch.yaml'}",
    ]
    [found] = json.loads((folder / "result.json").read_text())
    assert found["device"].startswith("2 x cpu")
    assert len(list((folder / "checkpoints" / "step=00000004.ckpt").glob("*.distcp"))) == 2
    assert done.stderr.count("result.json") == 1  # the first process alone says where the outcome is


def test_an_arrays_task_runs_its_run_of_the_sweep(tmp_path: Path, job: dict[str, str]) -> None:
    """What is launched; the verb itself is tested where it is."""
    (tmp_path / "bin" / "llada").write_text('#!/bin/bash\necho "llada $SLURM_PROCID $MASTER_ADDR: $*"\n')
    task = {**job, "SLURM_ARRAY_JOB_ID": "47", "SLURM_ARRAY_TASK_ID": "3"}
    done = sbatch("slurm_sweep.sbatch", "sweep.yaml", "--", "--config", "ddp.yaml", environment=task)
    words = "sweep run sweep.yaml --index 3 -- --config ddp.yaml"
    assert sorted(done.stdout.splitlines()) == [f"llada {rank} 127.0.0.1: {words}" for rank in (0, 1)]
    assert (tmp_path / "log").read_text().splitlines()[-1] == f"srun --kill-on-bad-exit=1 llada {words}"


def test_an_agents_run_is_resolved_once_and_launched_on_all_nodes(
    prepared: Path, tmp_path: Path, job: dict[str, str]
) -> None:
    """The sweep of docs/cluster.md, rendered as W&B renders it; the launched fit only says how it was started."""
    example = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "cluster.md").read_text(), re.DOTALL)[0]
    config = run_configuration(prepared, tmp_path / "runs", tmp_path / "run.yaml")
    settings = yaml.safe_load(config.read_text())
    del settings["trainer"]["max_steps"]
    config.write_text(yaml.safe_dump(settings))
    text = example.replace("RUN.yaml", str(config)).replace("1.0e+19, 3.0e+19", "1.0e+9, 3.0e+9")
    (tmp_path / "sweep.yaml").write_text(text.replace("experiments/cluster/fsdp2.yaml", str(CLUSTER / "fsdp2.yaml")))
    sweep = read_sweep(tmp_path / "sweep.yaml")
    command = render_command(sweep, sweep.points[-1])
    assert command[:4] == ["llada", "launch", "--", "fit"]
    assert fit_arguments(command) == command[3:]  # so `llada sweep run` runs the same sweep on one machine

    launched = f'echo "$SLURM_PROCID $WANDB_SWEEP_ID $WANDB_RUN_ID ${{@: -1}}" >> {tmp_path}/launched'
    srun = tmp_path / "bin" / "srun"
    srun.write_text(srun.read_text().replace('"$@" &', f"bash -c '{launched}' \"$@\" &"))
    agent = {**job, "STAND_IN_RUN": " ".join(f"'{word}'" for word in command)}
    done = sbatch("wandb_agent.sbatch", "me/project/swp", environment=agent)
    assert done.returncode == 0, done.stderr
    file = tmp_path / "runs" / "cluster" / "run" / "launch.yaml"
    assert sorted((tmp_path / "launched").read_text().splitlines()) == [f"{rank} swp abc {file}" for rank in (0, 1)]
    resolved = yaml.safe_load(file.read_text())
    assert resolved["budget"]["flops"] == 3e9
    assert resolved["model"]["init_args"]["schedule"]["total_steps"] == resolved["trainer"]["max_steps"] > 0
    assert "wandb agent me/project/swp" in (tmp_path / "log").read_text()
