"""What a long-lived process holds - memory, open files, children - and what its work leaves on disk, over time."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from llada_lightning.checkpoints.sharded_checkpoints import PARTIAL
from llada_lightning.study.plots.style import GREY, dress, new_figure
from processes import parent_of


@dataclass(frozen=True)
class Sample:
    """One look.

    Attributes:
        seconds: since the soak began.
        jobs: runs at once.
        rss_mib: resident memory of the process.
        open_files: its descriptors.
        threads: of the process.
        children: its children that live.
        zombies: its children that have ended and were not waited for.
        done: finished runs.
        half: checkpoints that are half-written or half-removed, those of running fits included.
        hidden: files and folders under temporary names, those of running fits included.
        temporary: entries of the folder for temporary files.
        surplus_mib: what all these take.
        disk_mib: what the study takes, its data not counted.
    """

    seconds: float
    jobs: int
    rss_mib: float
    open_files: int
    threads: int
    children: int
    zombies: int
    done: int
    half: int
    hidden: int
    temporary: int
    surplus_mib: float
    disk_mib: float


MEASURES = tuple(name for name in Sample.__dataclass_fields__ if name not in ("seconds", "jobs"))
FLAT = ("rss_mib", "open_files", "threads", "zombies", "half", "hidden", "temporary", "surplus_mib")
"""What must not grow."""


def look(pid: int, study: Path, temporary: Path, seconds: float, jobs: int) -> Sample | None:
    """A sample of a process and its folders; None where the process has ended.

    Args:
        study: folder of the runs.
        temporary: folder for temporary files of the process and of its children.
        seconds: since the soak began.
        jobs: runs at once.
    """
    try:
        status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        open_files = len(os.listdir(f"/proc/{pid}/fd"))
        rss_mib = int(status["VmRSS"].split()[0]) / 1024
    except (OSError, KeyError):
        return None
    states = children(pid)
    files = [path for path in study.rglob("*") if study.exists()]
    half = [path for path in files if path.name.endswith(PARTIAL)]
    hidden = [path for path in files if path.name.startswith(".")]
    scratch = list(temporary.iterdir())
    return Sample(
        seconds=round(seconds, 1),
        jobs=jobs,
        rss_mib=rss_mib,
        open_files=open_files,
        threads=int(status["Threads"]),
        children=sum(state != "Z" for state in states.values()),
        zombies=sum(state == "Z" for state in states.values()),
        done=sum(path.name == "result.json" for path in files),
        half=len(half),
        hidden=len(hidden),
        temporary=len(scratch),
        surplus_mib=mebibytes([*half, *hidden, *scratch]),
        disk_mib=mebibytes([study]),
    )


def children(pid: int) -> dict[int, str]:
    """Process id -> state (`R`, `S`, `Z`, …) of a process's children."""
    found = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and parent_of(int(folder.name)) == pid:
            with suppress(OSError, IndexError):
                found[int(folder.name)] = (folder / "stat").read_text().rpartition(")")[2].split()[0]
    return found


def mebibytes(paths: Sequence[Path]) -> float:
    """What files, and folders with all that is in them, take."""
    total = 0
    for path in paths:
        for file in [path, *path.rglob("*")] if path.is_dir() else [path]:
            with suppress(OSError):  # gone meanwhile
                total += file.lstat().st_blocks * 512
    return total / 2**20


def summarise(samples: Sequence[Sample]) -> dict[str, dict[str, float]]:
    """For each measure: first and last, most, and slope an hour (by least squares).

    First and last are the least of the first and of the last fifth: running fits hold files for a while, and what
    leaks never falls.
    """
    seconds = np.array([sample.seconds for sample in samples])
    fifth = max(1, len(samples) // 5)
    found = {}
    for name in MEASURES:
        values = [float(getattr(sample, name)) for sample in samples]
        slope = float(np.polyfit(seconds / 3600, values, 1)[0]) if len(samples) > 2 else 0.0
        found[name] = {
            "first": min(values[:fifth]),
            "last": min(values[-fifth:]),
            "most": max(values),
            "slope_per_hour": slope,
        }
    return found


def grown(summary: dict[str, dict[str, float]], allowed_mib: float) -> list[str]:
    """The measures that must not grow and did: memory and disk by more than what is allowed, counts at all."""
    return [
        f"{name}: {summary[name]['first']:g} -> {summary[name]['last']:g}"
        for name in FLAT
        if summary[name]["last"] > summary[name]["first"] + (allowed_mib if name.endswith("_mib") else 0)
    ]


def table(summaries: dict[str, dict[str, dict[str, float]]]) -> str:
    """First, last, most and slope of each measure as Markdown, one group of columns for each part of the soak."""
    parts = ["first", "last", "most", "slope_per_hour"]
    heads = [f"{name}: {part.replace('_', ' ')}" for name in summaries for part in parts]
    lines = ["| " + " | ".join(["measure", *heads]) + " |", "|" + "---|" * (1 + len(heads))]
    for measure in MEASURES:
        values = [f"{summary[measure][part]:.4g}" for summary in summaries.values() for part in parts]
        lines.append("| " + " | ".join([measure, *values]) + " |")
    return "\n".join(lines)


def soak_figure(samples: Sequence[Sample]) -> Figure:
    """Memory, open files, surplus files and finished runs over the minutes; a line where the number of jobs changes."""
    figure = new_figure(9, 5.5)
    panels = {
        "resident memory, MiB": ["rss_mib"],
        "open files and children": ["open_files", "children", "zombies"],
        "temporary files": ["half", "hidden", "temporary"],
        "finished runs": ["done"],
    }
    axes = figure.subplots(2, 2, sharex=True).flat
    for ax, (title, names) in zip(axes, panels.items(), strict=True):
        for jobs in sorted({sample.jobs for sample in samples}):
            part = [sample for sample in samples if sample.jobs == jobs]
            minutes = [sample.seconds / 60 for sample in part]
            for number, name in enumerate(names):
                values = [asdict(sample)[name] for sample in part]
                label = name.replace("_", " ") if jobs == samples[0].jobs else None
                ax.plot(minutes, values, color=f"C{number}", linewidth=1, label=label)
            if part[0] is not samples[0]:
                ax.axvline(minutes[0], color=GREY, linewidth=0.8, linestyle=":")
        ax.set_title(title, loc="left", fontsize=9)
        ax.set_ylim(bottom=0)
        dress(ax)
        if len(names) > 1:
            ax.legend(frameon=False, fontsize=7)
    figure.supxlabel("minutes; at the dotted line two runs at once begin", fontsize=9)
    return figure


def as_dicts(samples: Sequence[Sample]) -> list[dict[str, Any]]:
    return [asdict(sample) for sample in samples]
