"""What a running fit's log and metrics.csv tell of it, for the progress of a sweep and the reason of a failure."""

from __future__ import annotations

import csv
import re
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llada_lightning.scaling.sweep_run import PlannedRun

METRICS_FILE = "metrics.csv"
_CONTROL_SEQUENCE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def last_line(path: Path) -> str:
    """The last line of a log that says anything, without colours."""
    lines = _CONTROL_SEQUENCE.sub("", _tail(path)).replace("\r", "\n").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def latest_metrics(folder: Path) -> dict[str, str]:
    """The newest row of a run's ``metrics.csv``, or of its branches', without its empty cells; nothing before one."""
    written = [path for path in _metrics_files(folder) if path.exists()]
    return _last_row(max(written, key=lambda path: path.stat().st_mtime)) if written else {}


def _metrics_files(folder: Path) -> list[Path]:
    return [folder / METRICS_FILE, *sorted(folder.glob(f"branches/*/{METRICS_FILE}"))]


def _last_row(path: Path) -> dict[str, str]:
    rows, header = _tail(path).splitlines(), _head(path)
    if len(rows) < 2 or rows[-1].count(",") != len(header) - 1:  # no row yet, or one that is being written
        return {}
    return {name: value for name, value in zip(header, rows[-1].split(","), strict=True) if value}


def budget_share(run: PlannedRun) -> float:
    """The share of its cost that a running fit has spent, trunk and branches together; 0 where it cannot be known."""
    column, spent = "flops_6nd" if run.convention == "6nd" else "flops_total", 0.0
    with suppress(KeyError, ValueError, OSError):
        for path in _metrics_files(run.folder):
            spent += float(_last_row(path).get(column, 0.0))
            if path.parent != run.folder and spent:  # a branch's count begins with its trunk's
                spent -= float(_first_row(path)[column])
    return min(1.0, spent / run.cost) if run.cost > 1 else 0.0


def _first_row(path: Path) -> dict[str, str]:
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        return next(csv.DictReader(file), {})


def describe_state(share: float, metrics: dict[str, str]) -> str:
    """A running fit in words: ``62%  step 1200  3.214 nats/token  7,400 tokens/s``."""
    if not metrics:
        return "starting"
    words = [f"{share:.0%}"] if share else []
    words.append(f"step {metrics.get('step', '?')}")
    with suppress(KeyError, ValueError):
        words.append(f"{float(metrics['train_nats_per_token']):.3f} nats/token")
    with suppress(KeyError, ValueError):
        words.append(f"{float(metrics['tokens_per_second']):,.0f} tokens/s")
    return "  ".join(words)


def _tail(path: Path, size: int = 4096) -> str:
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - size))
            return file.read().decode("utf-8", errors="replace")
    except OSError:
        return ""


def _head(path: Path) -> list[str]:
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            return next(csv.reader(file), [])
    except OSError:
        return []


def format_seconds(seconds: float) -> str:
    """58s, 3m 20s, 5h 07m."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    return f"{whole // 3600}h {whole % 3600 // 60:02d}m"
