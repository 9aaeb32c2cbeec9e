"""What all benchmarks write beside their figures: where, when and how they were taken; and tables for people.

Run by itself it writes what it finds of this machine: python benchmarks/bench_report.py FILE.json
"""

from __future__ import annotations

import os
import platform
import shlex
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llada_lightning.support.files import write_json

if TYPE_CHECKING:
    import torch

MISSING = "missing"
_PACKAGES = ("torch", "lightning", "triton", "torchao", "flash-attn")


def hardware(device: torch.device) -> dict[str, Any]:
    """The device's name, and the threads that a CPU is given."""
    import torch  # here: tables are made without it

    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
        named = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
        name = f"{named[0] if named else platform.machine()}, threads: {torch.get_num_threads()}"
    return {"device": name, "threads": torch.get_num_threads(), "cores": os.cpu_count(), "system": platform.system()}


def circumstances(device: torch.device) -> dict[str, Any]:
    """Hardware, date, command and versions of this process."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "hardware": hardware(device),
        "date": datetime.now(timezone.utc).date().isoformat(),
        "command": shlex.join(["python", os.path.relpath(sys.argv[0]), *sys.argv[1:]]),
        "versions": versions,
    }


def caption(found: dict[str, Any]) -> str:
    """A line of :func:`circumstances`, and the command."""
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    return f"{found['date']}; {found['hardware']['device']}; {versions}\n\n```\n{found['command']}\n```"


def cell(value: float | None, form: str = ".2f", reason: str | None = None) -> str:
    """A figure in a table; one that there is not is marked as missing, with the reason where it is known."""
    if value is None:
        return f"{MISSING} ({reason})" if reason else MISSING
    return format(value, form)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table: the first row's names over the others."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write_result(path: Path | None, result: dict[str, Any]) -> None:
    """As JSON, whole or not at all; nothing where no path is given."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, result)


if __name__ == "__main__":
    import torch

    there = torch.cuda.is_available()
    write_result(Path(sys.argv[1]), {"cuda": there, **circumstances(torch.device("cuda" if there else "cpu"))})
