"""What a running fit's log and metrics.csv tell of it, for the progress of a sweep and the reason of a failure."""

from __future__ import annotations

import csv
import os
import re
import stat
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llada_lightning.study.sweep.runner import PlannedRun

METRICS_FILE = "metrics.csv"
_BLOCK_BYTES = 4096
_CONTROL_SEQUENCE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def last_line(path: Path) -> str:
    """The last line of a log that says anything, without colours."""
    lines = _CONTROL_SEQUENCE.sub("", _block(path, at_end=True)).replace("\r", "\n").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def latest_metrics(folder: Path) -> dict[str, str]:
    """The newest row of a run's ``metrics.csv``, or of its branches', without its empty cells; nothing before one."""
    written = [path for path in _metrics_files(folder) if path.exists()]
    return _last_row(max(written, key=lambda path: path.stat().st_mtime)) if written else {}


def _metrics_files(folder: Path) -> list[Path]:
    return [folder / METRICS_FILE, *sorted(folder.glob(f"branches/*/{METRICS_FILE}"))]


def _last_row(path: Path) -> dict[str, str]:
    header, rows = _rows(_block(path))[:1], _rows(_block(path, at_end=True))
    if not header or len(rows) < 2:  # no row yet
        return {}
    return _row(header[0], rows[-1])


def _row(header: list[str], cells: list[str]) -> dict[str, str]:
    """The cells that hold something; none of a row that is being written."""
    if len(cells) != len(header):
        return {}
    return {name: value for name, value in zip(header, cells, strict=True) if value}


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
    rows = _rows(_block(path))
    return _row(rows[0], rows[1]) if len(rows) > 1 else {}


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


def _rows(text: str) -> list[list[str]]:
    with suppress(csv.Error):
        return [row for row in csv.reader(text.splitlines()) if row]
    return []


def _block(path: Path, *, at_end: bool = False) -> str:
    """The first or the last 4096 bytes of a file; nothing of what is no regular file or cannot be read."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:  # a pipe must not hang
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                return ""
            file.seek(max(0, status.st_size - _BLOCK_BYTES) if at_end else 0)
            return file.read(_BLOCK_BYTES).decode("utf-8", errors="replace")
    except OSError:
        return ""


def format_seconds(seconds: float) -> str:
    """58s, 3m 20s, 5h 07m."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    return f"{whole // 3600}h {whole % 3600 // 60:02d}m"
