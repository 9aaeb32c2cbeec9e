"""`metrics.csv`: one row a step, right after any number of restarts."""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from llada_lightning.files import written_atomically

COLUMNS = (
    "step", "tokens", "flops_6nd", "flops_attention", "flops_head", "flops_total", "lr", "train_nats_per_token",
    "grad_norm", "skipped_updates", "tokens_per_second", "flops_6nd_per_second", "flops_attention_per_second",
    "flops_head_per_second", "flops_total_per_second", "mfu", "peak_memory_bytes", "seconds", "val_nats_per_token",
    "val_stderr", "val_bits_per_byte",
)  # fmt: skip


class MetricsCSV(Logger):
    """Rows are keyed by step. The first row that a process writes replaces all rows of later steps, which a killed
    process may have left behind its last checkpoint; columns that others log are added to the file."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._path = folder / "metrics.csv"
        self._columns = list(COLUMNS)
        self._row: dict[str, Any] | None = None

    @property
    def name(self) -> str:
        return "metrics.csv"

    @property
    def version(self) -> str:
        return ""

    @property
    def save_dir(self) -> str:
        return str(self._path.parent)

    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """The resolved configuration stands in config.yaml."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        assert step is not None
        values = {key: _number(value) for key, value in metrics.items() if key != "epoch"}
        if self._row is None:
            self._row = self._open(step)
        elif self._row["step"] != step:
            self._append(self._row)
            self._row = {"step": step}
        self._row.update(values)

    @rank_zero_only
    def save(self) -> None:
        """Put the row in hand on disk; values that the same step logs later are added to it."""
        if self._row is not None:
            self._append(self._row)
            self._row = None

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self.save()

    def _open(self, step: int) -> dict[str, Any]:
        """Keep the rows before ``step``; return that step's row as it stands."""
        rows = read_rows(self._path)
        self._columns = list(dict.fromkeys([*COLUMNS, *(key for row in rows for key in row)]))
        self._write([row for row in rows if int(row["step"]) < step])
        same: dict[str, Any] = next((row for row in rows if int(row["step"]) == step), {})
        return {**same, "step": step}

    def _append(self, row: dict[str, Any]) -> None:
        if not set(row) <= set(self._columns):
            rows = read_rows(self._path)
            self._columns = list(dict.fromkeys([*self._columns, *row]))
            self._write(rows)
        with self._path.open("a", newline="") as file:
            file.write(self._render([row], header=False))

    def _write(self, rows: list[dict[str, Any]]) -> None:
        with written_atomically(self._path) as temporary:
            temporary.write_text(self._render(rows, header=True))

    def _render(self, rows: list[dict[str, Any]], header: bool) -> str:
        text = io.StringIO()
        writer = csv.DictWriter(text, self._columns, restval="", lineterminator="\n")
        if header:
            writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a metrics file, empty cells left out; a last line that a kill cut short is dropped."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if None not in row.values() and None not in row]
    return [{key: value for key, value in row.items() if value != ""} for row in rows if row["step"].isdigit()]


def _number(value: Any) -> Any:
    number = float(value)
    return int(number) if math.isfinite(number) and number.is_integer() and abs(number) < 1e15 else number
