"""The results table, one row for each budget that a run reached, and beside it the joint error of its losses.

``llada collect`` writes both files; every fit and every figure reads them.

Runs of a study share their validation documents: a hard document is hard for all of them. So a difference of two
losses is known far better than either, and its error is no function of the two ``val_stderr``; it follows from the
covariance of the losses, estimated here from every run's ``validation.csv``. The file of R losses over G documents
never holds more than R * G numbers. Where R is at most G it is the (R, R) matrix. Else the matrix, whose rank is below
G, would grow with the square of the runs: then the file holds for each loss its G deviations, of which the matrix is
the product.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from llada_lightning.records import (
    LATER_COLUMNS,
    MAPPING_COLUMNS,
    RESULT_COLUMNS,
    VALIDATION_FILE,
    read_validation,
)
from llada_lightning.support.errors import UserError
from llada_lightning.support.files import is_there, require_replaceable, strict_json, written_atomically
from llada_lightning.support.printing import shortened
from llada_lightning.support.reading import FormatError, read_text

_TEXT_COLUMNS = frozenset({
    "run", "objective", "variant", "shape", "schedule", "parent_checkpoint", "data_fingerprint", "tokenizer",
    "val_kind", "device", "precision", "git_commit", "status", *MAPPING_COLUMNS,
})  # fmt: skip
_INTEGER_COLUMNS = frozenset({
    "params_total", "params_nonembedding", "tokens", "unique_tokens", "steps", "global_batch_tokens",
    "sequence_length", "warmup_steps", "decay_steps", "seed", "vocab_size",
})  # fmt: skip

LARGEST_NUMBER = 1e100
"""Largest finite number of a record: far above any loss, rate or count of FLOPs, and its square is finite."""

_WHOLE_NUMBER = re.compile(r"[+-]?\d+")
_MAX_COVARIANCE_BYTES = 1 << 31
"""Largest covariance file that is read: the matrix of some 9,000 losses."""

_DEVIATION = "document "
"""What the columns of deviations are called, before the document's number."""


# --- the table -------------------------------------------------------------------------------------------------------


def table_of_records(records: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """A table with the columns ``RESULT_COLUMNS``; a key that a record lacks is missing there."""
    columns = {column: [record.get(column) for record in records] for column in RESULT_COLUMNS}
    for column in MAPPING_COLUMNS:
        columns[column] = [
            None if value is None else json.dumps(strict_json(value), sort_keys=True, separators=(",", ":"))
            for value in columns[column]
        ]
    return _typed(pd.DataFrame(columns, dtype=object), [f"record {n}" for n in range(1, len(records) + 1)])


def typed_record(record: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The keys ``RESULT_COLUMNS`` of a record, each of its column's type or None; the word "NaN" becomes the number.

    Raises:
        UserError: A value is not of its column's type; it names ``source``.
    """
    typed = {column: record.get(column) for column in RESULT_COLUMNS}
    for column, value in typed.items():
        if value is not None and column not in MAPPING_COLUMNS:
            converted = _column_type(column)[1](value, column, source)
            typed[column] = None if converted is pd.NA else converted
    return typed


def write_results(table: pd.DataFrame, path: Path | str) -> Path:
    """Writes a results table as CSV, or as parquet where the name ends so, atomically.

    Raises:
        UserError: The name ends in neither ``.csv`` nor ``.parquet``, or the file cannot be written.
    """
    path = Path(path)
    check_destination(path)
    try:
        with written_atomically(path) as temporary:
            if path.suffix == ".csv":
                table.to_csv(temporary, index=False)
            else:
                _with_pyarrow(path, lambda: table.to_parquet(temporary, index=False))
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); choose another --out") from error
    return path


def check_destination(path: Path) -> None:
    """Raises UserError for a path that no results table can be written to, before any work is done for it."""
    _check_suffix(path)
    require_replaceable(path)


def read_results(path: Path | str) -> pd.DataFrame:
    """Reads a results table (``.csv`` or ``.parquet``).

    Returns:
        The columns ``RESULT_COLUMNS`` with their types (text, ``Int64``, ``float64``), then any others as they are.
        Columns of ``LATER_COLUMNS`` that an older table lacks are there without values.

    Raises:
        UserError: There is no such file, it has no rows, a column is missing, or a value is not of its column's type.
    """
    path = Path(path)
    _check_suffix(path)
    if not is_there(path):
        raise UserError(f"'{shortened(path)}': no such file; `llada collect` writes one from run folders")
    table, places = _read_csv(path) if path.suffix == ".csv" else _read_parquet(path)
    table = table.assign(**{column: None for column in LATER_COLUMNS if column not in table.columns})
    missing = [column for column in RESULT_COLUMNS if column not in table.columns]
    if {"run", "val_nats_per_token"} <= set(missing) and {"trunk", "budget"} <= set(table.columns):
        raise UserError(
            f"{path}: this is a plan, not results; run it with `llada sweep run`, and give the folder of its runs to "
            "`llada report`, or the table that `llada collect` writes from it"
        )
    if missing:
        raise UserError(f"{path}: columns missing: {', '.join(missing)}; `llada collect` writes all of them")
    if table.empty:
        raise UserError(f"{path}: a table without rows; `llada collect` writes one from run folders that hold results")
    others = [column for column in table.columns if column not in RESULT_COLUMNS]
    return _typed(table[[*RESULT_COLUMNS, *others]], places)


def _read_csv(path: Path) -> tuple[pd.DataFrame, list[str]]:
    """The table and, for each row, its place in the file.

    All cells are text: a run's identity of digits, or a shape called 1e5, must not become a number. pandas takes the
    first column for names of rows where a row has one cell too many, and fills rows that are too short; here both are
    errors, with their line.
    """
    text, shown = read_text(path), f"'{shortened(path)}'"
    lines = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows: list[list[str]] = []
    places: list[str] = []
    try:
        header = next(lines, [])
        separator = next((sign for sign in (";", "\t") if len(header) == 1 and sign in header[0]), None)
        if separator is not None:
            raise UserError(
                f"{shown}: its columns are separated by {separator!r}, as some spreadsheets write them; separate them "
                "by commas, with points in decimal numbers"
            )
        for row in lines:
            place = f"{shown}, line {lines.line_num}"
            if row and len(row) != len(header):
                raise UserError(f"{place}: {len(row)} cells under {len(header)} columns; correct the line")
            if row:
                rows.append(row)
                places.append(place)
    except csv.Error as error:
        raise UserError(f"{shown}, line {lines.line_num}: not CSV ({error}); correct the line") from error
    if not header:
        raise UserError(f"{shown}: not a CSV table, it is empty; write it again with `llada collect`")
    if twice := sorted({column for column in header if header.count(column) > 1}):
        raise UserError(f"{shown}: columns that are there twice: {shortened(', '.join(twice))}; remove one of each")
    cells = np.array(rows, dtype=object).reshape(len(rows), len(header))
    cells[cells == ""] = None
    return pd.DataFrame(cells, columns=header), places


def _read_parquet(path: Path) -> tuple[pd.DataFrame, list[str]]:
    if not path.is_file():
        raise UserError(f"'{shortened(path)}' is not a regular file; give a table that `llada collect` wrote")
    try:
        table = _with_pyarrow(path, lambda: pd.read_parquet(path))
    except (ArithmeticError, LookupError, NotImplementedError, OSError, TypeError, ValueError) as error:
        # pyarrow tells of a damaged file which part of it cannot be read
        reason = shortened(error)
        raise UserError(f"{path}: not a parquet table ({reason}); write it again with `llada collect`") from error
    return table, [f"'{shortened(path)}', row {n}" for n in range(1, len(table) + 1)]


def _with_pyarrow(path: Path, action: Callable[[], Any]) -> Any:
    try:
        return action()
    except ImportError as error:
        raise UserError(f"{path}: parquet needs pyarrow; pip install pyarrow, or use a .csv name") from error


def _check_suffix(path: Path) -> None:
    if path.suffix not in (".csv", ".parquet"):
        raise UserError(f"'{shortened(path)}': a results table must be named .csv or .parquet")


# --- types of columns ------------------------------------------------------------------------------------------------


def _typed(table: pd.DataFrame, places: Sequence[str]) -> pd.DataFrame:
    """The table with the types of ``RESULT_COLUMNS``; ``places`` are those of its rows, for errors."""
    columns = {}
    for column in RESULT_COLUMNS:
        kind, convert = _column_type(column)
        typed = [convert(value, column, place) for value, place in zip(table[column], places, strict=True)]
        columns[column] = pd.Series(typed, table.index, kind, column)
    return table.assign(**columns)


def _column_type(column: str) -> tuple[Any, Callable[[Any, str, str], Any]]:
    """The type of a column in pandas, and the function that converts a value of it."""
    if column in _TEXT_COLUMNS:
        return "string", _text
    return ("Int64", _whole_number) if column in _INTEGER_COLUMNS else ("float64", _number)


def _text(value: Any, column: str, source: str) -> Any:
    if value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value)):
        return pd.NA
    text = str(value)
    if isinstance(value, (dict, list)) or "\0" in text or re.search("[\ud800-\udfff]", text):
        raise UserError(f"{source}: column {column} holds {shortened(text, 60)!r}, which is not text")
    return text


def _number(value: Any, column: str, source: str) -> float:
    if value is None or value is pd.NA:
        return math.nan
    try:
        number = float(value)  # unlike pandas' own parser, exact to the last digit
    except (TypeError, ValueError):
        raise UserError(f"{source}: column {column} holds {_shown(value)}, which is not a number") from None
    except OverflowError:
        number = LARGEST_NUMBER * 10
    if math.isinf(number) and isinstance(value, str) and any(digit in value for digit in "0123456789"):
        number = LARGEST_NUMBER * 10  # of digits, not the word
    if LARGEST_NUMBER < abs(number) < math.inf:
        raise UserError(f"{source}: column {column} holds {_shown(value)}; the largest number is {LARGEST_NUMBER:g}")
    return number


def _whole_number(value: Any, column: str, source: str) -> Any:
    try:
        if isinstance(value, Integral) or (isinstance(value, str) and _WHOLE_NUMBER.fullmatch(value.strip())):
            number = int(value)  # exact beyond 2^53, which a float is not
        else:
            real = _number(value, column, source)
            if math.isnan(real):
                return pd.NA
            if not real.is_integer():
                raise UserError(f"{source}: column {column} holds {_shown(value)}, which is not a whole number")
            number = int(real)
    except ValueError:  # more digits than Python reads
        number = 2**63
    if not -(2**63) <= number < 2**63:
        raise UserError(f"{source}: column {column} holds {_shown(value)}, which takes more than 64 bits")
    return number


def _shown(value: Any) -> str:
    """A value for an error: in quotes where it is text, never long."""
    if isinstance(value, int) and abs(value) >= 10**40:
        return f"a whole number of {value.bit_length()} bits"
    return repr(shortened(value, 60)) if isinstance(value, str) else shortened(value, 60)


# --- the joint error of the losses -----------------------------------------------------------------------------------


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
    """What became of the covariance file: its path (None: not written), and how many results are in it."""

    path: str | None = None
    rows: int = 0
    left_out: dict[str, list[str]] = field(default_factory=dict)
    """The reason -> the results (``run@steps``) that are not in it."""

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


def covariance_path(results: Path, yardstick: str | None = None) -> Path:
    """The path of the covariance of a table's losses: ``results.covariance.csv`` beside ``results.csv``, and of its
    losses by a named yardstick ``results.NAME.covariance.csv``."""
    return results.with_name(f"{results.stem}{'' if yardstick is None else f'.{yardstick}'}.covariance.csv")


def write_covariance(
    rows: Sequence[Row],
    results: Path | str,
    yardstick: str | None = None,
    documents: Callable[[Row], pd.DataFrame] | None = None,
) -> CovarianceReport:
    """Writes ``STEM.covariance.csv`` beside the results table ``STEM.csv``: the covariance of the rows' losses.

    In it are all rows with finite losses of the same validation documents, of the largest such group if there are
    several. An older file of this name is removed where there is nothing to write, since it would belong to another
    table. ``yardstick`` is the name of the yardstick of the losses, and ``documents`` reads a row's losses by document;
    None: those of its validation.

    Returns:
        Where the file is, and which rows are not in it, and why.
    """
    path, report = covariance_path(Path(results), yardstick), CovarianceReport()
    # Data, documents and the sequences that begin in each -> label -> losses.
    groups: dict[tuple[Any, bytes], dict[str, np.ndarray]] = {}
    read = lru_cache(maxsize=1)(read_validation)  # a run's budgets share one file
    own = documents or partial(documents_of, read=read)
    for row in sorted(rows, key=lambda row: row.label):
        try:
            losses = own(row)
        except UserError as error:
            report.left_out.setdefault(str(error), []).append(row.label)
        else:
            key = (row.record["data_fingerprint"], losses[["document", "sequences"]].to_numpy().tobytes())
            groups.setdefault(key, {})[row.label] = losses["nats_per_token"].to_numpy()
    if not groups:
        path.unlink(missing_ok=True)
        return report
    shared = max(groups, key=lambda key: len(groups[key]))
    columns = groups.pop(shared)
    if groups:
        others = sorted(label for group in groups.values() for label in group)
        report.left_out["other validation documents than most"] = others
    documents_G, sequences_G = np.frombuffer(shared[1], dtype=np.int64).reshape(-1, 2).T
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
        UserError: There is no such file, or it holds neither a square matrix with equal names nor deviations.
    """
    shown, fix = f"'{shortened(path)}'", "write it again with `llada collect`"
    try:
        # As text first: a name of digits must not become a number.
        text = io.StringIO(read_text(path, _MAX_COVARIANCE_BYTES))
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


def documents_of(row: Row, read: Callable[[Path], pd.DataFrame], file: Path | None = None) -> pd.DataFrame:
    """The losses of a row's validation documents, in order of document.

    Args:
        row: The row of the results table.
        read: The function that reads the table of all rows of a folder.
        file: The file that it reads; None: ``validation.csv``.

    Raises:
        UserError: There are none; it says why.
    """
    loss = row.record["val_nats_per_token"]
    if loss is None or not math.isfinite(loss):
        raise UserError("loss not finite")
    if not row.record["run"]:
        raise UserError("a record without a run's name")
    if row.folder is None:
        raise UserError("from W&B, which does not hold the losses by document")
    file = file or row.folder / VALIDATION_FILE
    if not is_there(file):
        raise UserError(f"no {file.name}")
    table = read(row.folder)
    table = table[table["steps"] == row.record["steps"]].sort_values("document")
    if table.empty:
        raise UserError(f"not in {file.name}")
    if len(table) < 2:
        raise UserError("fewer than two validation documents")
    if not ((table["sequences"] > 0) & (table["nats_per_token"].abs() <= LARGEST_NUMBER)).all():
        raise UserError(f"a document without sequences, or without a finite loss, in {file.name}")
    return table
