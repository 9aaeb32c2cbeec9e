"""The outputs of a plan: a table for people, a W&B sweep with the table as CSV beside it, and a SLURM job array."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from llada_lightning.compute.flops import CONVENTION_NAMES
from llada_lightning.compute.shapes import format_count, get_shape, shape_name
from llada_lightning.objectives import get_objective
from llada_lightning.study.plan import Plan
from llada_lightning.study.plan.extension import APPENDED_BY, MADE_BY, check_replaceable, sealed
from llada_lightning.study.plan.trunk import Branch, Trunk
from llada_lightning.support.errors import UserError
from llada_lightning.support.files import expanded, written_atomically
from llada_lightning.support.printing import shortened

WIDTH = 100
"""The columns of the table for people."""

TIME_MARGIN = 1.5
"""A job's time limit over the plan's hours: validation, checkpoints and the start are not counted there."""


# --- for people ------------------------------------------------------------------------------------------------------


def print_plan(plan: Plan, console: Console) -> None:
    """The runs by objective and budget, then totals and warnings; of several seeds the first is shown."""
    console.width = WIDTH  # a narrower terminal wraps; cut figures would say nothing
    console.print(plan_table(plan))
    if len(seeds := list(dict.fromkeys(trunk.seed for trunk in plan.trunks))) > 1:
        console.print(_about_seeds(plan, seeds), soft_wrap=True)
    for line in [*describe_totals(plan), *(f"note: {warning}" for warning in plan.warnings())]:
        console.print(line, soft_wrap=True, markup=False, highlight=False)


def _about_seeds(plan: Plan, seeds: list[int]) -> str:
    """Where the seeds after the first are run."""
    trunks = {seed: [trunk for trunk in plan.trunks if trunk.seed == seed] for seed in seeds}
    if len({sum(len(trunk.branches) for trunk in own) for own in trunks.values()}) == 1:
        return f"each of these with the seeds {', '.join(map(str, seeds))}"
    points = [
        f"{trunk.objective} {trunk.shape.depth_by_width} at "
        + ", ".join(f"{branch.budget:.3g}" for branch in trunk.branches)
        for trunk in trunks[seeds[1]]
    ]
    further = " and ".join(map(str, seeds[1:]))
    return f"these are of seed {seeds[0]}; runs of seed {further} tell the noise: {'; '.join(points)} (--seeds-at)"


def plan_table(plan: Plan) -> Table:
    """The plan of its first seed. The column `run` is the number by which ``llada sweep run --index`` knows the run."""
    table = Table(box=SIMPLE_HEAD, padding=0, pad_edge=False)
    for name in ("N", "shape", "tokens", "per N", "steps", "batch", "lr", "warmup", "decay", "total", "epochs", "GiB",
                 "hours", "run"):  # fmt: skip
        table.add_column(name, justify="left" if name == "shape" else "right", no_wrap=True)
    rows = plan.table()
    numbers = {name: number for number, name in enumerate(dict.fromkeys(rows.trunk))}
    rows = rows[rows.seed == rows.seed.iloc[0]]
    for (objective, budget), group in rows.groupby(["objective", "budget"], sort=False):
        table.add_section()
        table.add_row(str(objective), f"{budget:.3g} FLOPs", style="bold")
        for row in group.to_dict("records"):
            table.add_row(*_cells(row), str(numbers[row["trunk"]]))
    return table


def _cells(row: dict[str, Any]) -> list[str]:
    shape, ratio = get_shape(row["shape"]), row["tokens_per_param"]
    return [
        format_count(row["params_nonembedding"]),
        shape.depth_by_width,
        format_count(row["tokens"]),
        f"{ratio:.3g}" if ratio < 999.5 else f"{ratio:.0f}",
        str(row["steps"]),
        str(row["global_batch"]),
        f"{row['lr']:.1e}",
        str(row["warmup_steps"]),
        str(row["decay_steps"]),
        f"{row['flops_total']:.1e}",
        _number(row["epochs"], ".2g"),
        f"{row['memory_gib']:.1f}",
        _number(row["wall_hours"], ".3g"),
    ]


def _number(value: float | None, form: str) -> str:
    return "n/a" if value is None or math.isnan(value) else format(value, form)


def describe_totals(plan: Plan) -> list[str]:
    """What the whole study costs, in words, without a date."""
    totals = plan.totals()
    results = f"{totals['results']} results"
    runs = f"{totals['runs']} runs" + ("" if plan.separate else f" (trunks) for {results}")
    copy = f"+ {totals['flops_copy']:.3g} clean copies " if totals["flops_copy"] else ""
    lines = [
        f"{runs}; budgets count {CONVENTION_NAMES[plan.convention]}",
        f"FLOPs computed: {totals['flops_6nd']:.3g} 6ND + {totals['flops_attention']:.3g} attention + "
        f"{totals['flops_head']:.3g} head {copy}= {totals['flops_total']:.3g}",
    ]
    if plan.separate:
        lines.append("separate runs: nothing is shared between budgets")
    else:
        lines.append(
            f"trunks save {totals['saved_flops']:.3g} FLOPs, {totals['saved_share']:.1%} of separate runs' "
            f"{totals['flops_total'] + totals['saved_flops']:.3g}"
        )
    needed = f"data: the longest run reads {totals['tokens_needed']:.3g} tokens"
    if totals["tokens_present"] is not None:
        needed += f" of {totals['tokens_present']:.3g} present ({totals['epochs']:.2g} epochs)"
        if len(plan.objectives) > 1:
            passes = {name: own["epochs"] for name, own in totals["by_objective"].items()}
            needed += "; epochs at most: " + ", ".join(f"{name} {count:.2g}" for name, count in passes.items())
    lines.append(needed)
    if totals["wall_hours"] is not None:
        of = plan.machine.device or "device"
        lines.append(
            f"hours: {totals['device_hours']:.3g} {of}-hours; {totals['wall_hours']:.3g} hours one run after another; "
            f"at {plan.machine.speeds}"
        )
    elif plan.machine.device is not None:
        lines.append(
            f"hours: n/a: no speed of --device {plan.machine.device} is known; give --mfu or --measured RESULTS"
        )
    return lines


# --- the sweep -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Destination:
    """What the runs of a sweep need beside the plan.

    Args:
        study: The folder of their results.
        data: The path of the prepared data, or the folders of a mixture with weights; None: the base names it.
        base: A configuration that lies under the settings of every run.
        vocab_size: The vocabulary size of the model where it is not the tokenizer's.
    """

    study: str
    data: str | Mapping[str, float] | None = None
    base: str | None = None
    vocab_size: int | None = None


def run_config(plan: Plan, trunk: Trunk, branches: Sequence[Branch], destination: Destination) -> dict[str, Any]:
    """The configuration of one ``llada fit``: everything that the plan has decided, over the base."""
    budgets = [branch.budget for branch in branches]
    schedule = {"lr": trunk.lr, "warmup_steps": trunk.warmup_steps, "decay_fraction": plan.recipe.decay_fraction}
    objective, block_length = get_objective(trunk.objective), plan.stream.block_length
    path = objective.module
    if path.startswith("llada_lightning."):
        path = path.rpartition(".")[2]  # modules of the package are named by their class alone
    model: dict[str, Any] = {"shape": shape_name(trunk.shape), "schedule": schedule}
    if destination.vocab_size is not None:
        model["vocab_size"] = destination.vocab_size
    if objective.in_blocks and block_length is not None:
        model["block_length"] = block_length
    data: dict[str, Any] = {
        "sequence_length": plan.stream.sequence_length,
        "global_batch": trunk.global_batch,
        "random_length_share": plan.stream.random_length_share,
    }
    if destination.data is not None:
        data["path"] = destination.data if isinstance(destination.data, str) else dict(destination.data)
    if plan.machine.micro_batch is not None:
        data["micro_batch"] = plan.machine.micro_batch
    config: dict[str, Any] = {
        "seed_everything": trunk.seed,
        "budget": {"flops": budgets if len(budgets) > 1 else budgets[0], "convention": plan.convention},
        "model": {"class_path": path, "init_args": model},
        "data": {"class_path": "TokenDataModule", "init_args": data},
        "run": {"study": destination.study},
    }
    if trunk.continues:
        config["budget"]["trunks"] = [list(run) for run in trunk.continues]
    if len(branches) == 1 and branches[0].decay_steps and not plan.separate:
        config["run"]["keep_fork"] = True  # a budget that joins the study later starts there
    if plan.machine.micro_batch is not None or trunk.accumulation > 1:
        config["trainer"] = {"accumulate_grad_batches": trunk.accumulation}
    return config


def run_values(plan: Plan, destination: Destination) -> list[str]:
    """The runs of a plan as the values of a sweep's parameter ``config``, in their order."""
    return [flow_yaml(run_config(plan, trunk, branches, destination)) for trunk, branches in plan.runs()]


def sweep_text(
    plan: Plan, destination: Destination, name: str, command: Sequence[str], appended: Sequence[Sequence[str]] = ()
) -> str:
    """A W&B grid sweep with one parameter, ``config``, whose values are the runs.

    The runs are no Cartesian grid, so each is one word: its configuration as inline YAML, which ``llada fit`` merges
    over the base. ``command`` made the plan, and is named at the head of the file with those that have appended to it.
    """
    base = ["--config", destination.base] if destination.base else []
    sweep = {
        "name": name,
        "program": "llada",
        "method": "grid",
        "metric": {"name": "val_nats_per_token", "goal": "minimize"},
        "command": ["llada", "fit", *base, "${args}"],
        "parameters": {"config": {"values": run_values(plan, destination)}},
    }
    lines = [_origin(command, appended), *(f"# {line}" for line in describe_totals(plan))]
    return "\n".join(lines) + "\n" + yaml.safe_dump(sweep, sort_keys=False, width=math.inf, allow_unicode=True)


def _origin(command: Sequence[str], appended: Sequence[Sequence[str]]) -> str:
    """The comments that say by which commands a file was made."""
    return "\n".join([MADE_BY + shlex.join(command), *(APPENDED_BY + shlex.join(each) for each in appended)])


class _OneLine(yaml.SafeDumper):
    """Writes large and small numbers as people do, 2.0e+11; YAML 1.1 would read 2e11 as a word."""


def _float(dumper: yaml.SafeDumper, value: float) -> yaml.ScalarNode:
    plain = value == 0 or 1e-3 <= abs(value) < 1e6
    text = repr(value) if plain else np.format_float_scientific(value, trim="0", exp_digits=1)
    return dumper.represent_scalar("tag:yaml.org,2002:float", text)


_OneLine.add_representer(float, _float)


def flow_yaml(value: Any) -> str:
    """A value as YAML on one line, every number exact."""
    text = yaml.dump(
        value, Dumper=_OneLine, default_flow_style=True, sort_keys=False, width=math.inf, allow_unicode=True
    )
    return text.strip()


def write_files(
    plan: Plan,
    destination: Destination,
    command: Sequence[str],
    out: str | None,
    slurm: str | None,
    *,
    appended: Sequence[Sequence[str]] = (),
    force: bool = False,
) -> dict[str, Path]:
    """Write the sweep and its table to ``out``, if that is given, and the SLURM job array to ``slurm``.

    Returns:
        The paths of the written files by `sweep`, `table` and `slurm`.

    Raises:
        UserError: A path does not fit, or a file cannot be written, or was edited and ``force`` does not overwrite it.
    """
    if out is None:
        if slurm is not None:
            raise UserError("plan: --slurm runs a sweep; give --out too")
        return {}
    sweep = expanded(out)
    if sweep.suffix not in (".yaml", ".yml"):
        raise UserError(f"plan: --out {sweep} must end in .yaml")
    script = None if slurm is None else expanded(slurm)
    if script is not None and script.resolve() in (sweep.resolve(), sweep.with_suffix(".csv").resolve()):
        raise UserError(f"plan: --slurm {slurm} is the sweep's own file or its table's; choose another name")
    if destination.data is None:
        raise UserError("plan: --out needs the data that the runs read; give --data DIR, or --base with data.path")
    table = write_sweep(sweep, plan, destination, command, script, appended=appended, force=force)
    return {"sweep": sweep, "table": table, **({} if script is None else {"slurm": script})}


def write_sweep(
    path: Path,
    plan: Plan,
    destination: Destination,
    command: Sequence[str],
    slurm: Path | None = None,
    *,
    appended: Sequence[Sequence[str]] = (),
    force: bool = False,
) -> Path:
    """Writes the sweep, the plan's table as CSV beside it, which is returned, and a SLURM job array: all or none."""
    table, rows = path.with_suffix(".csv"), plan.table().to_csv(index=False)
    texts = {path: sealed(sweep_text(plan, destination, path.stem, command, appended), rows), table: rows}
    if slurm is not None:
        texts[slurm] = sealed(slurm_text(plan, path, slurm, command, appended))
    if not force:
        check_replaceable(texts, path)
    with ExitStack() as files:
        for file, text in texts.items():
            try:
                files.enter_context(written_atomically(file)).write_text(text, encoding="utf-8")
            except OSError as error:
                where = f"'{shortened(file)}' cannot be written ({error.strerror})"
                raise UserError(f"plan: {where}; free space or choose another place") from error
    return table


# --- SLURM -----------------------------------------------------------------------------------------------------------

CPUS_PER_TASK = 4
"""The training process, its two loaders, and the thread that logs."""

_BATCH_SCRIPT = """\
#!/bin/bash
{origin}
# Submit with `sbatch {path}` from the folder that {sweep} is relative to; `sbatch --array=3,5 ...` runs a part.
#SBATCH --job-name={name}
#SBATCH --array=0-{last}
#SBATCH --nodes=1
{resources}#SBATCH --output={name}-%A_%a.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=SIGUSR1@120
# At the signal a run saves its step and asks SLURM to queue its task again, which then resumes from there.
# Options of sbatch overrule these lines and add what a cluster needs ({missing}). The tasks have the
# environment of the shell that submits them: activate the virtual environment and load modules there.
exec srun --kill-on-bad-exit=1 llada sweep run {sweep} --index "$SLURM_ARRAY_TASK_ID"
"""


def slurm_text(
    plan: Plan, sweep: Path, script: Path, command: Sequence[str], appended: Sequence[Sequence[str]] = ()
) -> str:
    """A SLURM job array with one task for each run of a sweep; near its time limit a task saves and queues again."""
    devices = plan.machine.devices
    resources = f"#SBATCH --ntasks-per-node={devices}\n#SBATCH --gpus-per-node={devices}\n"
    resources += f"#SBATCH --cpus-per-task={CPUS_PER_TASK}\n"
    hours, missing = plan.longest_wall_hours(), "--partition, --account"
    if hours is None:
        missing = f"--time, as the speed is not known, {missing}"
    else:
        minutes = math.ceil(60 * TIME_MARGIN * hours) + 10
        resources += f"#SBATCH --time={minutes // 60}:{minutes % 60:02d}:00\n"
    return _BATCH_SCRIPT.format(
        origin=_origin(command, appended),
        path=shlex.quote(str(script)),
        sweep=shlex.quote(str(sweep)),
        name=sweep.stem,
        last=len(plan.runs()) - 1,
        resources=resources,
        missing=missing,
    )
