"""What a plan writes: a sweep whose runs resolve to the plan, and a job array."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from llada_lightning.data.manifest import read_data_facts
from llada_lightning.study.plan import Grid, Machine, Plan, Recipe, Stream, plan_study
from llada_lightning.study.plan.outputs import Destination, describe_totals, flow_yaml, slurm_text, write_sweep
from llada_lightning.study.sweep import fit_arguments, read_sweep, render_command

COMMAND = ["llada", "plan", "--flops", "1e12"]


def planned(separate: bool = True, **arguments: object) -> Plan:
    grid = Grid(shapes=["107k", "L2-d96-h3-kv3-ff192", "443k"])
    return plan_study([1e11, 2e11], Stream(384, 64), grid=grid, separate=separate, **arguments)  # type: ignore[arg-type]


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_number_survives_one_line_of_yaml(number: float) -> None:
    [read] = yaml.safe_load(flow_yaml([number]))
    assert read == number and type(read) is float


def test_numbers_are_written_as_people_write_them() -> None:
    assert flow_yaml({"flops": [2e11, 1e18], "lr": 1.05e-5, "share": 0.01}) == (
        "{flops: [2.0e+11, 1.0e+18], lr: 1.05e-5, share: 0.01}"
    )


def test_a_trunk_is_one_run_with_all_its_budgets(tmp_path: Path) -> None:
    plan = planned(separate=False, seeds=(0, 7), seeds_at="all")
    path = tmp_path / "study.yaml"
    write_sweep(path, plan, Destination("study", data="data/x"), COMMAND)
    sweep = read_sweep(path)
    assert len(sweep.points) == len(plan.runs()) == 12
    configs = [yaml.safe_load(point["config"]) for point in sweep.points]
    assert all(config["budget"] == {"flops": [1e11, 2e11], "convention": "6nd"} for config in configs)
    assert {config["seed_everything"] for config in configs} == {0, 7}
    assert {config["model"]["class_path"] for config in configs} == {"ArmModule", "LladaModule"}


def test_the_head_holds_command_and_totals_and_the_table_lies_beside(tmp_path: Path) -> None:
    plan, path = planned(separate=False), tmp_path / "study.yaml"
    table = write_sweep(path, plan, Destination("study", data="data/x"), ["llada", "plan", "--data", "my data"])
    head = path.read_text().splitlines()
    assert head[0] == "# made by: llada plan --data 'my data'"
    assert head[1 : 1 + len(describe_totals(plan))] == [f"# {line}" for line in describe_totals(plan)]
    assert f"{plan.totals()['saved_share']:.1%}" in head[3]
    assert table == tmp_path / "study.csv"
    assert len(table.read_text().splitlines()) == 1 + len(plan.table())


@pytest.mark.parametrize(("convention", "with_base"), [("6nd", True), ("total", False)])
def test_llada_fit_resolves_to_what_was_planned(
    prepared: Path, tmp_path: Path, convention: str, with_base: bool
) -> None:
    """Steps, rates, batches, warmups and decays of the sweep's commands, as the fit's own parser makes them."""
    from llada_lightning.training.cli import LladaCLI

    facts = read_data_facts(str(prepared), 64)
    stream = replace(Stream(facts.vocab_size, 64), random_length_share=0.1, sources=facts.sources)
    recipe = Recipe(decay_fraction=0.15)
    plan = plan_study(
        [1e11, 2.3e11],
        stream,
        grid=Grid(shapes=["107k", "L2-d96-h3-kv3-ff192", "443k"]),
        recipe=recipe,
        convention=convention,  # type: ignore[arg-type]
        separate=True,
        seeds=(1,),
        machine=Machine(micro_batch=2),
    )
    base = None
    if with_base:
        base = str(tmp_path / "base.yaml")
        content = {"data": {"class_path": "TokenDataModule", "init_args": {"path": str(prepared), "val_batch": 7}}}
        Path(base).write_text(yaml.safe_dump(content))
    path = tmp_path / "sweep.yaml"
    write_sweep(path, plan, Destination("planned", data=None if with_base else str(prepared), base=base), COMMAND)
    sweep = read_sweep(path)
    rows = plan.table().to_dict("records")
    assert len(sweep.points) == len(rows) == 12
    for point, row in zip(sweep.points, rows, strict=True):
        settings = LladaCLI(fit_arguments(render_command(sweep, point)), execute=False).settings
        model, data = settings.model.init_args, settings.data.init_args
        assert settings.model.class_path.endswith({"arm": "ArmModule", "llada": "LladaModule"}[row["objective"]])
        assert (settings.trainer.max_steps, model.shape) == (row["steps"], row["shape"])
        resolved = [model.schedule.lr, model.schedule.warmup_steps, model.schedule.decay_steps]
        assert resolved == [row["lr"], row["warmup_steps"], row["decay_steps"]]
        assert (data.global_batch, data.sequence_length) == (row["global_batch"], 64)
        assert data.global_batch == data.micro_batch * settings.trainer.accumulate_grad_batches
        assert (data.val_batch == 7) == with_base
        assert (settings.run.study, settings.seed_everything) == ("planned", 1)


def test_trunks_and_separate_runs_of_a_plan_have_the_same_results(prepared: Path, tmp_path: Path) -> None:
    """One fit a trunk ends in the very runs, by name, that separate fits would be; forks and steps are the plan's."""
    from llada_lightning.training.cli import LladaCLI

    facts = read_data_facts(str(prepared), 64)
    stream = Stream(facts.vocab_size, 64, sources=facts.sources)
    names: dict[bool, list[str | None]] = {}
    for separate in (False, True):
        grid = Grid(shapes=["107k", "214k", "443k"])
        plan = plan_study([1e11, 2e11, 4e11], stream, grid=grid, objectives=["llada"], separate=separate)
        path = tmp_path / f"separate-{separate}.yaml"
        write_sweep(path, plan, Destination("planned", data=str(prepared)), COMMAND)
        sweep = read_sweep(path)
        fits = [LladaCLI(fit_arguments(render_command(sweep, point)), execute=False) for point in sweep.points]
        assert len(fits) == (9 if separate else 3)
        branches = [phase for fit in fits for phase in fit.phases if phase.run is not None]
        names[separate] = [phase.run for phase in branches]
        planned = [branch for trunk in plan.trunks for branch in trunk.branches]
        assert [phase.last_step for phase in branches] == [branch.steps for branch in planned]
        if not separate:
            assert [phase.first_step for phase in branches] == [branch.fork_step for branch in planned]
    assert names[True] == names[False]
    assert len(set(names[True])) == 9


# --- SLURM -----------------------------------------------------------------------------------------------------------


def test_the_array_covers_all_runs_with_time_and_devices(tmp_path: Path) -> None:
    plan = planned(separate=False, machine=Machine("H100", 4, mfu=1e-6), recipe=Recipe(batch=16))
    text = slurm_text(plan, Path("sweeps/s.yaml"), Path("s.sbatch"), COMMAND)
    assert f"#SBATCH --array=0-{len(plan.runs()) - 1}\n" in text
    assert (
        "#SBATCH --gpus-per-node=4\n" in text
        and "#SBATCH --ntasks-per-node=4\n" in text
        and "#SBATCH --requeue\n" in text
    )
    hours = plan.longest_wall_hours()
    assert hours is not None
    minutes = math.ceil(60 * 1.5 * hours) + 10
    assert f"#SBATCH --time={minutes // 60}:{minutes % 60:02d}:00\n" in text
    assert "#SBATCH --cpus-per-task=4\n" in text and "(--partition, --account)" in text
    unknown = slurm_text(planned(), Path("sweeps/s.yaml"), Path("s.sbatch"), COMMAND)
    assert "#SBATCH --time" not in unknown and "(--time, as the speed is not known, --partition, --account)" in unknown


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_a_task_of_the_array_starts_its_run_with_srun(tmp_path: Path) -> None:
    script = tmp_path / "s.sbatch"
    script.write_text(slurm_text(planned(), Path("a sweep.yaml"), script, COMMAND))
    (tmp_path / "srun").write_text('#!/bin/bash\nprintf "%s|" "$@"\nexit 7\n')
    (tmp_path / "srun").chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_ARRAY_TASK_ID": "3"}
    job = subprocess.run(["bash", str(script)], cwd=tmp_path, env=environment, timeout=30, capture_output=True)
    assert job.stdout.decode() == "--kill-on-bad-exit=1|llada|sweep|run|a sweep.yaml|--index|3|"
    assert job.returncode == 7  # the fit's own code: SLURM sees what became of it
