"""The joint error of a study's losses.

Runs of a study share their validation documents: a hard document is hard for all of them. So a difference of two
losses is known far better than either, and its error is no function of the two ``val_stderr``; it follows from the
covariance of the losses, estimated here from every run's ``validation.csv``.

The file of R losses over G documents never holds more than R * G numbers. Where R is at most G it is the (R, R) matrix.
Else the matrix, whose rank is below G, would grow with the square of the runs: then the file holds for each loss its
G deviations, of which the matrix is the product.
"""

from __future__ import annotations

import io
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from llada_lightning.records import VALIDATION_FILE, read_validation
from llada_lightning.study.results import LARGEST_NUMBER
from llada_lightning.support.errors import UserError
from llada_lightning.support.files import is_there, written_atomically
from llada_lightning.support.printing import shortened
from llada_lightning.support.reading import FormatError, read_text

_MAX_BYTES = 1 << 31
"""Largest covariance file that is read: the matrix of some 9,000 losses."""

_DEVIATION = "document "
"""What the columns of deviations are called, before the document's number."""


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
        path: The path of the file; None if it was not written.
        rows: The number of results in it.
        left_out: The results (``run@steps``) that are not in it, by the reason.
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
    ``objectives.standard_errors.clustered_mean_and_stderr``: G / (G - 1) times the sum over the G documents of the
    products of (the sum of a document's deviations / the number of sequences). The diagonal is the square of
    ``val_stderr``; the variance of a difference is ``c[i, i] + c[j, j] - 2 * c[i, j]``.

    Args:
        values_GR: (G, R) mean of document g's sequences in run r, G at least 2.
        sequences_G: (G,) sequences of each document.
    """
    return _covariance_of_deviations(_deviations(values_GR, sequences_G))


def _deviations(values_GR: np.ndarray, sequences_G: np.ndarray) -> np.ndarray:
    """(G, R) what each document adds to each mean's deviation."""
    share_G = sequences_G / sequences_G.sum()
    return np.asarray(share_G[:, None] * (values_GR - share_G @ values_GR))


def _covariance_of_deviations(deviations_GR: np.ndarray) -> np.ndarray:
    groups = len(deviations_GR)
    return np.asarray(groups / (groups - 1) * (deviations_GR.T @ deviations_GR))


def covariance_path(results: Path) -> Path:
    """The path of the covariance of a table's losses: ``results.covariance.csv`` beside ``results.csv``."""
    return results.with_name(f"{results.stem}.covariance.csv")


def write_covariance(rows: Sequence[Row], results: Path | str) -> CovarianceReport:
    """Writes ``STEM.covariance.csv`` beside the results table ``STEM.csv``: the covariance of the rows' losses.

    In it are all rows with finite losses of the same validation documents, of the largest such group if there are
    several. An older file of this name is removed where there is nothing to write, since it would belong to another
    table.

    Args:
        rows: The rows of the results table.
        results: The path of the table.

    Returns:
        Where the file is, and which rows are not in it, and why.
    """
    path = covariance_path(Path(results))
    report = CovarianceReport()
    sets: dict[tuple[Any, bytes], int] = {}  # data, documents and the sequences that begin in each -> a number
    usable: list[tuple[str, int, np.ndarray]] = []
    read = lru_cache(maxsize=1)(read_validation)  # a run's budgets share one file
    for row in sorted(rows, key=lambda row: row.label):
        try:
            table = _validation_of(row, read)
        except UserError as error:
            report.left_out.setdefault(str(error), []).append(row.label)
        else:
            key = (row.record["data_fingerprint"], table[["document", "sequences"]].to_numpy().tobytes())
            usable.append((row.label, sets.setdefault(key, len(sets)), table["nats_per_token"].to_numpy()))
    if not usable:
        path.unlink(missing_ok=True)
        return report
    ((shared, _),) = Counter(number for _, number, _ in usable).most_common(1)
    others = [label for label, number, _ in usable if number != shared]
    if others:
        report.left_out["other validation documents than most"] = others
    columns = {label: values for label, number, values in usable if number == shared}
    documents_G, sequences_G = np.frombuffer(list(sets)[shared][1], dtype=np.int64).reshape(-1, 2).T
    deviations_GR = _deviations(np.stack(list(columns.values()), axis=1), sequences_G)
    names = list(columns)
    if len(names) <= len(documents_G):
        table = pd.DataFrame(_covariance_of_deviations(deviations_GR), names, names)
    else:
        table = pd.DataFrame(deviations_GR.T, names, [f"{_DEVIATION}{document}" for document in documents_G])
    with written_atomically(path) as temporary:
        table.to_csv(temporary, index_label="run@steps")
    report.path, report.rows = str(path), len(columns)
    return report


def read_covariance(path: Path | str) -> pd.DataFrame:
    """The covariance matrix that ``llada collect`` wrote: index and columns hold ``run@steps``, values nats^2.

    Raises:
        UserError: there is no such file, or it holds neither a square matrix with equal names nor deviations.
    """
    shown, fix = f"'{shortened(path)}'", "write it again with `llada collect`"
    try:
        # As text first: a name of digits must not become a number.
        text = io.StringIO(read_text(path, _MAX_BYTES))
        table = pd.read_csv(text, dtype={0: str}, float_precision="round_trip", index_col=0).astype("float64")
    except FormatError as error:
        raise UserError(f"{error}; {fix}") from error
    except (ValueError, ArithmeticError) as error:
        raise UserError(f"{shown}: not a table of numbers ({shortened(error)}); {fix}") from error
    if len(table.columns) > 1 and table.columns.str.startswith(_DEVIATION).all():
        return pd.DataFrame(_covariance_of_deviations(table.to_numpy().T), table.index, list(table.index))
    if sorted(map(str, table.index)) != sorted(table.columns):
        raise UserError(f"{shown}: rows and columns are not of the same runs; {fix}")
    return table


def _validation_of(row: Row, read: Callable[[Path], pd.DataFrame]) -> pd.DataFrame:
    """The row's validation losses, in order of document. Raises: UserError: why it has none."""
    loss = row.record["val_nats_per_token"]
    if loss is None or not math.isfinite(loss):
        raise UserError("loss not finite")
    if not row.record["run"]:
        raise UserError("a record without a run's name")
    if row.folder is None:
        raise UserError("from W&B, which does not hold the losses by document")
    if not is_there(row.folder / VALIDATION_FILE):
        raise UserError(f"no {VALIDATION_FILE}")
    table = read(row.folder)
    table = table[table["steps"] == row.record["steps"]].sort_values("document")
    if table.empty:
        raise UserError(f"not in {VALIDATION_FILE}")
    if len(table) < 2:
        raise UserError("fewer than two validation documents")
    if not ((table["sequences"] > 0) & (table["nats_per_token"].abs() <= LARGEST_NUMBER)).all():
        raise UserError(f"a document without sequences, or without a finite loss, in {VALIDATION_FILE}")
    return table
