"""`llada launch`: resolved once, launched as the same run."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import yaml

from helpers.forked import run_command
from llada_lightning.commands.launch import launcher_words
from llada_lightning.commands.main import main
from llada_lightning.training.cli import LladaCLI
from llada_lightning.training.fit import resolved_run

BUDGET = ("--budget.flops=1e9", "--model.shape={n_layers: 1, d_model: 16, n_heads: 1, n_kv_heads: 1, d_ff: 32}")


class BecameError(Exception):
    """Instead of the launcher's program."""


@pytest.fixture
def become(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(program: str, words: list[str]) -> None:
        raise BecameError(words)

    monkeypatch.setattr(os, "execvp", stop)


def arguments(data: Path, root: Path, *extra: str) -> list[str]:
    fixed = [f"--data.path={data}", "--data.sequence_length=32", f"--run.root={root}", "--trainer.accelerator=cpu"]
    return ["fit", "--model=LladaModule", *BUDGET, *fixed, *extra]


@pytest.mark.parametrize("job", [None, "4711"])
def test_the_launched_file_is_the_same_run(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, become: None, job: str | None
) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    if job is not None:  # the job's script, where nothing of the job's size may enter the file
        for name, value in {"SLURM_JOB_ID": job, "SLURM_NTASKS": "16", "SLURM_NNODES": "2"}.items():
            monkeypatch.setenv(name, value)
    given = arguments(prepared, tmp_path)
    with pytest.raises(BecameError) as became:
        main(["launch", "--", *given])
    words = became.value.args[0]
    launcher = [] if job is None else ["srun", "--kill-on-bad-exit=1"]
    assert words[:-1] == [*launcher, sys.executable, "-m", "llada_lightning", "fit", "--config"]
    file = Path(words[-1])
    original, relaunched = LladaCLI(given, execute=False), LladaCLI(["fit", f"--config={file}"], execute=False)
    assert relaunched.folder == original.folder == file.parent
    assert [phase.identity for phase in relaunched.phases] == [phase.identity for phase in original.phases]
    assert [phase.run for phase in relaunched.phases] == [phase.run for phase in original.phases]
    assert resolved_run(["fit", f"--config={file}"])[1] == file.read_text()
    trainer = yaml.safe_load(file.read_text())["trainer"]
    assert (trainer["devices"], trainer["num_nodes"]) == ("auto", 1)
    assert [p.name for p in file.parent.iterdir()] == ["launch.yaml"]


def test_it_becomes_the_launcher_with_the_environment_it_has(prepared: Path, tmp_path: Path) -> None:
    """In a process of its own: the launcher sees the agent's variables, and its exit code is the command's."""
    script = tmp_path / "launcher"
    script.write_text('#!/bin/bash\necho "$WANDB_RUN_ID $WANDB_SWEEP_ID $# ${@: -1}"\nexit 7\n')
    script.chmod(0o755)
    environment = {**os.environ, "WANDB_RUN_ID": "abc", "WANDB_SWEEP_ID": "swp"}
    words = arguments(prepared, tmp_path, "--run.name=named")
    done = run_command(["launch", f"--launcher={script} one", "--", *words], environment)
    assert done.returncode == 7, done.stderr
    assert done.stdout.split() == ["abc", "swp", "7", str(tmp_path / "default" / "named" / "launch.yaml")]


def test_mistakes_are_found_before_anything_is_launched(
    prepared: Path, tmp_path: Path, become: None, capsys: pytest.CaptureFixture[str]
) -> None:
    for wrong, said in {
        ("launch", "fit"): "unrecognized",
        ("launch", "--"): "what to launch is not said",
        ("launch", "--", "sweep"): "what to launch is not said",
        ("launch", "--", *arguments(prepared, tmp_path, "--modell=3")): "modell",
        ("launch", "--", *arguments(prepared, tmp_path, "--budget.flops=1")): "budget",
    }.items():
        assert main(list(wrong)) == 2
        error = capsys.readouterr().err
        assert said in error.lower()
        assert error.count("error:") == 1
    assert not (tmp_path / "default").exists()


def test_a_launcher_that_is_not_there_is_named(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["launch", "--launcher=no-such-launcher -n 2", "--", *arguments(prepared, tmp_path)]) == 2
    assert "launch: 'no-such-launcher' cannot be started (No such file" in capsys.readouterr().err


def test_torchrun_is_told_to_run_a_program() -> None:
    assert launcher_words("/opt/bin/torchrun --nproc-per-node 4") == [
        "/opt/bin/torchrun", "--nproc-per-node", "4", "--no-python",
    ]  # fmt: skip
    assert launcher_words("python -m torch.distributed.run --no-python").count("--no-python") == 1
    assert launcher_words("srun 'a b'") == ["srun", "a b"]
