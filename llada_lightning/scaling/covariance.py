"""The joint error of a study's losses.

Runs of a study share their validation documents: a hard document is hard for all of them. So a difference of two
losses is known far better than either, and its error is no function of the two ``val_stderr``; it follows from the
covariance of the losses, estimated here from every run's ``validation.csv``.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from llada_lightning.errors import UserError
from llada_lightning.files import written_atomically
from llada_lightning.scaling.results import VALIDATION_FILE, read_validation

Documents = tuple[tuple[int, ...], tuple[int, ...]]
"""The documents of a validation set, and the sequences that begin in each."""


@dataclass(frozen=True)
class Row:
    """A record of the results table, and the run folder that it was found in (None: elsewhere)."""

    record: dict[str, Any]
    folder: Path | None

    @property
    def label(self) -> str:
        """``run@steps``: the row's name in the covariance file."""
        return f"{self.record['run']}@{self.record['steps']}"


@dataclass
class CovarianceReport:
    """What became of the covariance file.

    Args:
        path: the file; None if it was not written.
        rows: results in it.
        left_out: why -> the results (``run@steps``) that are not in it.
    """

    path: str | None = None
    rows: int = 0
    left_out: dict[str, list[str]] = field(default_factory=dict)

    def lines(self) -> list[str]:
        return [
            f"covariance: {len(labels)} results left out ({reason}): {', '.join(labels)}"
            for reason, labels in self.left_out.items()
        ]


def covariance_of_means(values_GR: np.ndarray, sequences_G: np.ndarray) -> np.ndarray:
    """(R, R) covariance of the R means over all sequences, clustered by document.

    The linearised ratio estimator of cluster sampling (Cochran 1977, Sec. 11), as for a single mean in
    ``objectives.bounds.clustered_mean_and_stderr``: G / (G - 1) times the sum over the G documents of the products of
    (the sum of a document's deviations / the number of sequences). The diagonal is the square of ``val_stderr``; the
    variance of a difference is ``c[i, i] + c[j, j] - 2 * c[i, j]``.

    Args:
        values_GR: (G, R) mean of document g's sequences in run r, G at least 2.
        sequences_G: (G,) sequences of each document.
    """
    share_G = sequences_G / sequences_G.sum()
    deviations_GR = share_G[:, None] * (values_GR - share_G @ values_GR)
    groups = len(sequences_G)
    return groups / (groups - 1) * (deviations_GR.T @ deviations_GR)


def covariance_path(results: Path) -> Path:
    """Where the covariance of a table's losses stands: ``results.covariance.csv`` beside ``results.csv``."""
    return results.with_name(f"{results.stem}.covariance.csv")


def write_covariance(rows: Sequence[Row], results: Path | str) -> CovarianceReport:
    """Writes ``STEM.covariance.csv`` beside the results table ``STEM.csv``: the covariance of the rows' losses.

    In it are all rows with finite losses of the same validation documents, of the largest such group if there are
    several. An older file of this name is removed where there is nothing to write, since it would belong to another
    table.

    Args:
        rows: of the results table.
        results: the table's path.

    Returns:
        Where the file is, and which rows are not in it, and why.
    """
    path = covariance_path(Path(results))
    report = CovarianceReport()
    usable: list[tuple[Row, Documents, pd.DataFrame]] = []
    for row in sorted(rows, key=lambda row: row.label):
        try:
            table = _validation_of(row)
        except UserError as error:
            report.left_out.setdefault(str(error), []).append(row.label)
        else:
            usable.append((row, (tuple(table["document"]), tuple(table["sequences"])), table))
    shared = Counter((row.record["data_fingerprint"], documents) for row, documents, _ in usable).most_common(1)
    columns: dict[str, np.ndarray] = {}
    for row, documents, table in usable:
        if (row.record["data_fingerprint"], documents) == shared[0][0]:
            columns[row.label] = table["nats_per_token"].to_numpy()
        else:
            report.left_out.setdefault("other validation documents than most", []).append(row.label)
    if not columns:
        path.unlink(missing_ok=True)
        return report
    sequences_G = np.asarray(shared[0][0][1][1], dtype=np.int64)
    matrix_RR = covariance_of_means(np.stack(list(columns.values()), axis=1), sequences_G)
    with written_atomically(path) as temporary:
        pd.DataFrame(matrix_RR, index=list(columns), columns=list(columns)).to_csv(temporary, index_label="run@steps")
    report.path, report.rows = str(path), len(columns)
    return report


def read_covariance(path: Path | str) -> pd.DataFrame:
    """The covariance matrix that ``llada collect`` wrote: index and columns hold ``run@steps``, values nats^2.

    Raises:
        UserError: there is no such file, or it holds no square matrix with equal names.
    """
    try:
        # As text first: a name of digits must not become a number.
        table = pd.read_csv(path, index_col=0, dtype={0: str}, float_precision="round_trip").astype("float64")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); `llada collect` writes it") from error
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: not a table of numbers ({reason}); write it with `llada collect`") from error
    if sorted(table.index) != sorted(table.columns):
        raise UserError(f"{path}: rows and columns are not of the same runs; write it again with `llada collect`")
    return table


def _validation_of(row: Row) -> pd.DataFrame:
    """The row's validation losses by document. Raises: UserError: why it has none."""
    loss = row.record["val_nats_per_token"]
    if loss is None or not math.isfinite(loss):
        raise UserError("loss not finite")
    if not row.record["run"]:
        raise UserError("a record without a run's name")
    if row.folder is None:
        raise UserError("from W&B, which does not hold the losses by document")
    if not (row.folder / VALIDATION_FILE).exists():
        raise UserError(f"no {VALIDATION_FILE}")
    table = read_validation(row.folder)
    table = table[table["steps"] == row.record["steps"]].sort_values("document")
    if table.empty:
        raise UserError(f"not in {VALIDATION_FILE}")
    if len(table) < 2:
        raise UserError("fewer than two validation documents")
    return table
