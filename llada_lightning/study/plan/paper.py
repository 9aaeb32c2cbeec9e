"""The scalability study of the paper as a plan: every row of Tables 18 and 19, what it costs, and on which cluster.

Each of the four models is one run (Sec. 3.1, B.2 and Table 5). Each row of its table is a milestone of that run, or its
end. `experiments/paper/` has the four configurations, and `sweeps/paper-scalability.yaml` the sweep over them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from llada_lightning.compute.hardware import Machine, training_memory_bytes
from llada_lightning.compute.schedule import WSD, Plateau
from llada_lightning.compute.shapes import PAPER_SEQUENCE_LENGTH, PAPER_VOCAB_SIZE, Shape, format_count, get_shape
from llada_lightning.objectives import get_objective
from llada_lightning.run import Length, Run, Spec, Stream, resolve
from llada_lightning.support.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

TENSOR_PARALLEL = (1, 2, 4, 8)
"""Numbers of devices that may compute one micro-batch together (`--trainer.strategy=fsdp2_tp2` and so on)."""

_GIB = 2**30


@dataclass(frozen=True)
class PaperRun:
    """One model of the study.

    Args:
        shape: The name of the shape (Table 5), which names the model, too.
        global_batch: The sequences of an optimizer step.
        schedule: The schedule of the learning rate.
        random_length_share: The share of the sequences that are cut to a random length.
        tokens: The training tokens of the whole run where it goes beyond the last row of its table; None: to that row.
    """

    shape: str
    global_batch: int
    schedule: WSD
    random_length_share: float = 0.01
    tokens: float | None = None

    def resolved(self, objective: str, rows: list[float]) -> Run:
        """The run with a milestone at each row.

        Args:
            objective: The name of the objective.
            rows: The training tokens of each row, ascending.
        """
        *before, last = rows if self.tokens is None else [*rows, self.tokens]
        stream = Stream(PAPER_VOCAB_SIZE, PAPER_SEQUENCE_LENGTH, random_length_share=self.random_length_share)
        return resolve(Spec(
            objective=get_objective(objective),
            shape=get_shape(self.shape),
            stream=stream,
            length=Length(tokens=last, milestones=tuple(before), setting="budget.tokens"),
            global_batch=self.global_batch,
            schedule=self.schedule,
        ))  # fmt: skip


_CONSTANT = WSD(lr=4e-4, warmup_steps=2000, decay_steps=0)
PAPER_RUNS = (
    PaperRun("arm-1b", 1280, _CONSTANT),
    PaperRun("arm-7b", 4224, replace(_CONSTANT, lr=4.2e-4), random_length_share=0.0),
    PaperRun("llada-1b", 1280, _CONSTANT),
    PaperRun(
        "llada-8b", 1280,
        WSD(lr=4e-4, warmup_steps=2000, plateaus=[Plateau(1e-4, 1.2e12)], decay_tokens=3e11, final_lr=1e-5),
        tokens=2.3e12,
    ),
)  # fmt: skip
"""The four models of the study, in the order of its tables."""


def paper_plan(machine: Machine) -> pd.DataFrame:
    """The 41 rows of Tables 19 and 18 as results of four runs on a cluster that divides all states (FSDP2).

    Args:
        machine: The cluster: the device, the number of devices, and what tells the speed.

    Returns:
        ``model``, ``objective``, ``tokens`` (as printed), ``flops_printed`` (6ND, as printed), ``steps`` and
        ``flops_6nd`` (of the planned result), ``deviation`` (of the one from the other), ``flops_total``,
        ``tensor_parallel``, ``micro_batch`` and ``memory_gib`` (of one device; missing where its memory is not known),
        ``wall_hours`` and ``device_hours`` (from the beginning of the run to this row; missing where nothing tells the
        speed).

    Raises:
        UserError: The cluster is too small for a model, or its number of devices divides no model's batch.
    """
    import pandas as pd

    from llada_lightning.study.reference import paper_scalability  # `llada plan --help` needs no pandas

    printed = paper_scalability()
    rows: list[dict[str, Any]] = []
    for own in PAPER_RUNS:
        table = printed[printed["shape"] == own.shape]
        [objective] = table["objective"].unique()
        run = own.resolved(objective, list(table["tokens"]))
        degree, micro_batch, memory = _division(own, machine)
        schedules = [*run.milestones, *run.schedules]
        for schedule, row in zip(schedules, table.to_dict("records"), strict=False):
            flops = run.per_step * (schedule.total_steps or 0)
            seconds = machine.seconds(objective, run.spec.shape.params_nonembedding, flops.flops_total)
            hours = math.nan if seconds is None else seconds / 3600
            rows.append({
                "model": row["model"],
                "objective": objective,
                "tokens": row["tokens"],
                "flops_printed": row["flops_6nd"],
                "steps": schedule.total_steps,
                "flops_6nd": flops.flops_6nd,
                "deviation": flops.flops_6nd / row["flops_6nd"] - 1,
                "flops_total": flops.flops_total,
                "tensor_parallel": degree,
                "micro_batch": micro_batch if machine.memory or machine.micro_batch else math.nan,
                "memory_gib": memory / _GIB if machine.memory else math.nan,
                "wall_hours": hours,
                "device_hours": hours * machine.devices,
            })  # fmt: skip
    return pd.DataFrame(rows)


def _division(own: PaperRun, machine: Machine) -> tuple[int, int, float]:
    """The least tensor parallelism with which the cluster divides the batch and holds the model, the sequences of a
    micro-batch, and the bytes of one device."""
    degrees, given = _degrees(own, machine.devices), machine.micro_batch
    if not degrees:
        usable = max(d for d in range(1, machine.devices + 1) if all(_degrees(each, d) for each in PAPER_RUNS))
        raise UserError(
            f"plan: --devices {machine.devices} does not divide the {own.global_batch} sequences of a batch of "
            f"{own.shape}, nor does it in groups of up to {TENSOR_PARALLEL[-1]}; give {usable}"
        )
    for degree in degrees:
        replicas = machine.devices // degree
        sizes = [n for n in range(own.global_batch // replicas, 0, -1) if own.global_batch % (replicas * n) == 0]
        for size in sizes if given is None else [given]:
            memory = _memory(get_shape(own.shape), machine.devices, degree, size)
            if machine.memory is None or memory <= machine.memory:
                return degree, size, memory
    raise UserError(_too_small(own, machine))


def _degrees(own: PaperRun, devices: int) -> list[int]:
    """The degrees of tensor parallelism in which so many devices divide the batch and the heads of a model."""
    heads = get_shape(own.shape).n_kv_heads
    return [
        degree
        for degree in TENSOR_PARALLEL
        if devices % degree == 0 and own.global_batch % (devices // degree) == 0 and heads % degree == 0
    ]


def _memory(shape: Shape, devices: int, degree: int, micro_batch: int) -> float:
    """Bytes of one device: all states are divided among all; a group divides the positions of its micro-batch."""
    length = PAPER_SEQUENCE_LENGTH // degree
    return training_memory_bytes(shape, PAPER_VOCAB_SIZE, length, micro_batch, shards=devices)


def _too_small(own: PaperRun, machine: Machine) -> str:
    assert machine.memory is not None
    usable, size = machine.memory, machine.micro_batch or 1

    def holds(each: PaperRun, devices: int) -> bool:
        shape = get_shape(each.shape)
        return any(_memory(shape, devices, degree, size) <= usable for degree in _degrees(each, devices))

    most = max(each.global_batch for each in PAPER_RUNS)
    enough = (d for d in range(1, most + 1) if all(holds(each, d) for each in PAPER_RUNS))
    least = next(enough, None)
    needs = _memory(get_shape(own.shape), machine.devices, 1, size) / _GIB
    fix = "give devices with more memory" if least is None else f"the least that holds all four models is {least}"
    return (
        f"plan: {own.shape} does not fit {machine.devices} x {machine.device}: a device needs {needs:.0f} GiB of "
        f"{usable / _GIB:.0f} usable with {size} sequence(s) of {PAPER_SEQUENCE_LENGTH} tokens; {fix}"
    )


def paper_tables(plan: pd.DataFrame) -> list[Table]:
    """The rows for people, a table for each model."""
    tables = []
    for model, rows in plan.groupby("model", sort=False):
        first = rows.iloc[0]
        title = str(model)
        if not math.isnan(first.memory_gib):
            title += f": {first.memory_gib:.0f} GiB a device, micro-batch {first.micro_batch:.0f}"
        if first.tensor_parallel > 1:
            title += f", groups of {first.tensor_parallel} devices (--trainer.strategy=fsdp2_tp{first.tensor_parallel})"
        table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
        for name in ("tokens", "steps", "6ND printed", "6ND planned", "off", "all FLOPs", "hours", "device-hours"):
            table.add_column(name, justify="right", no_wrap=True)
        for row in rows.to_dict("records"):
            table.add_row(
                format_count(row["tokens"]),
                f"{row['steps']:,}",
                f"{row['flops_printed']:.3g}",
                f"{row['flops_6nd']:.4g}",
                f"{row['deviation']:+.2%}",
                f"{row['flops_total']:.3g}",
                "n/a" if math.isnan(row["wall_hours"]) else f"{row['wall_hours']:,.1f}",
                "n/a" if math.isnan(row["device_hours"]) else f"{row['device_hours']:,.0f}",
            )
        tables.append(table)
    return tables


def paper_notes(plan: pd.DataFrame, machine: Machine) -> list[str]:
    """How hours, memory and FLOPs of :func:`paper_plan` were counted, and their sums over the four runs."""
    lasts = plan.groupby("model", sort=False).last()
    notes = [
        "the FLOPs of a row are of its run from the beginning; all FLOPs are 6ND with attention and output head, which "
        "llada computes at masked positions only",
        "memory: weights, gradients and moments in fp32 divided among all devices, activations without recomputation",
    ]
    if lasts["wall_hours"].isna().any():
        notes.append("hours: n/a; give --device and --mfu, or --measured RESULTS")
    else:
        notes.append(
            f"hours: at {machine.speeds}; all four runs, one after another, take {lasts['wall_hours'].sum():,.0f} "
            f"hours on {machine.devices} x {machine.device or 'device'} ({lasts['device_hours'].sum():,.0f} "
            "device-hours), without validation, checkpoints, evaluation and failures"
        )
    return notes
