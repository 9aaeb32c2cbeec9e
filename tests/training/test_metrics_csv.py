"""`metrics.csv` of an older version goes on with the columns that have come since."""

from __future__ import annotations

import csv
from pathlib import Path

from llada_lightning.training.callbacks.loggers import COLUMNS, MetricsCSV


def test_an_older_file_goes_on_with_new_columns(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("step,tokens,tokens_per_second,theirs\n1,256,10.5,a\n2,512,11.5,b\n3,768,12.5,c\n")
    log = MetricsCSV(tmp_path)
    for step in (3, 4):
        log.log_metrics({"tokens": 256.0 * step, "flops_total_per_second": 2.5e9, "peak_memory_bytes": 7}, step)
    log.finalize("success")
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == (*COLUMNS, "theirs")
    shown = ("step", "tokens", "tokens_per_second", "flops_total_per_second", "peak_memory_bytes", "theirs")
    assert [[row[key] for key in shown] for row in rows] == [
        ["1", "256", "10.5", "", "", "a"],
        ["2", "512", "11.5", "", "", "b"],
        ["3", "768", "12.5", "2500000000", "7", "c"],
        ["4", "1024", "", "2500000000", "7", ""],
    ]
