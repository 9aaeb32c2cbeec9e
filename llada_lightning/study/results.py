"""The results table, which every fit and every figure reads: one row for each budget that a run reached."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from llada_lightning.records import LATER_COLUMNS, RESULT_COLUMNS
from llada_lightning.support.errors import UserError
from llada_lightning.support.files import is_there, require_replaceable, written_atomically
from llada_lightning.support.printing import shortened
from llada_lightning.support.reading import read_text

TEXT_COLUMNS = frozenset({
    "run", "objective", "variant", "shape", "schedule", "parent_checkpoint", "data_fingerprint", "tokenizer",
    "val_kind", "device", "precision", "versions", "git_commit", "status",
})  # fmt: skip


INTEGER_COLUMNS = frozenset({
    "params_total", "params_nonembedding", "tokens", "unique_tokens", "steps", "global_batch_tokens",
    "sequence_length", "warmup_steps", "decay_steps", "seed", "vocab_size",
})  # fmt: skip


LARGEST_NUMBER = 1e100
"""Largest finite number of a record: far above any loss, rate or count of FLOPs, and its square is finite."""


_WHOLE_NUMBER = re.compile(r"[+-]?\d+")


def table_of_records(records: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """A table with the columns ``RESULT_COLUMNS``; a key that a record lacks is missing there."""
    columns = {column: [record.get(column) for record in records] for column in RESULT_COLUMNS}
    columns["versions"] = [_compact_json(versions) for versions in columns["versions"]]
    return _typed(pd.DataFrame(columns, dtype=object), [f"record {n}" for n in range(1, len(records) + 1)])


def typed_record(record: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The keys ``RESULT_COLUMNS`` of a record, each of its column's type or None; the word "NaN" becomes the number.

    Args:
        source: The place of the record, for the error.

    Raises:
        UserError: a value is not of its column's type.
    """
    return {column: _typed_value(record.get(column), column, source) for column in RESULT_COLUMNS}


def write_results(table: pd.DataFrame, path: Path | str) -> Path:
    """Writes a results table as CSV, or as parquet where the name ends so, atomically.

    Raises:
        UserError: the name ends in neither ``.csv`` nor ``.parquet``, or the file cannot be written.
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
    """Refuses a path that no results table can be written to, before any work is done for it.

    Raises:
        UserError: the name ends in neither ``.csv`` nor ``.parquet``, or the path is no file's.
    """
    _check_suffix(path)
    require_replaceable(path)


def read_results(path: Path | str) -> pd.DataFrame:
    """Reads a results table (``.csv`` or ``.parquet``).

    Returns:
        The columns ``RESULT_COLUMNS`` with their types (text, ``Int64``, ``float64``), then any others as they are.
        Columns of ``LATER_COLUMNS`` that an older table lacks are there without values.

    Raises:
        UserError: there is no such file, it has no rows, a column is missing, or a value is not of its column's type.
    """
    path = Path(path)
    _check_suffix(path)
    if not is_there(path):
        raise UserError(f"'{shortened(path)}': no such file; `llada collect` writes one from run folders")
    table, places = _read_csv(path) if path.suffix == ".csv" else _read_parquet(path)
    table = table.assign(**{column: None for column in LATER_COLUMNS if column not in table.columns})
    missing = [column for column in RESULT_COLUMNS if column not in table.columns]
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
        _require_commas(header, shown)
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


def _require_commas(header: list[str], shown: str) -> None:
    separator = next((sign for sign in (";", "\t") if len(header) == 1 and sign in header[0]), None)
    if separator is not None:
        raise UserError(
            f"{shown}: its columns are separated by {separator!r}, as some spreadsheets write them; separate them by "
            "commas, with points in decimal numbers"
        )


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


def _with_pyarrow(path: Path, action: Any) -> Any:
    try:
        return action()
    except ImportError as error:
        raise UserError(f"{path}: parquet needs pyarrow; pip install pyarrow, or use a .csv name") from error


def _check_suffix(path: Path) -> None:
    if path.suffix not in (".csv", ".parquet"):
        raise UserError(f"'{shortened(path)}': a results table must be named .csv or .parquet")


def _typed(table: pd.DataFrame, places: Sequence[str]) -> pd.DataFrame:
    """The table with the types of ``RESULT_COLUMNS``.

    Args:
        table: The table, with columns of any types.
        places: The place of each row, for errors.
    """
    return table.assign(**{column: _typed_column(table[column], places) for column in RESULT_COLUMNS})


def _typed_column(values: pd.Series, places: Sequence[str]) -> pd.Series:
    column = str(values.name)
    kind = "string" if column in TEXT_COLUMNS else "Int64" if column in INTEGER_COLUMNS else "float64"
    convert = {"string": _text, "Int64": _whole_number, "float64": _number}[kind]
    typed = [convert(value, column, place) for value, place in zip(values, places, strict=True)]
    return pd.Series(typed, values.index, kind, column)


def _typed_value(value: Any, column: str, source: str) -> Any:
    if value is None or column == "versions":
        return value
    if column in TEXT_COLUMNS:
        return _text(value, column, source)
    number = _whole_number(value, column, source) if column in INTEGER_COLUMNS else _number(value, column, source)
    return None if number is pd.NA else number


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


def _compact_json(value: Any) -> str | None:
    return None if value is None else json.dumps(value, sort_keys=True, separators=(",", ":"))
