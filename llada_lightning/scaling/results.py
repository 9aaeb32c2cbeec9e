"""Results: the record that a run leaves, and the one table that every fit and figure reads.

A run's folder holds ``result.json``, a list with one record for each budget that the run reached, and beside it
``validation.csv``, the loss of each validation document at each of them. The table's columns are the record's keys,
and W&B's summary uses the same names.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from numbers import Integral
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from llada_lightning.errors import UserError
from llada_lightning.files import write_json, written_atomically

RESULT_COLUMNS = (
    "run", "objective", "shape", "params_total", "params_nonembedding", "tokens", "unique_tokens", "epochs", "steps",
    "global_batch_tokens", "sequence_length", "flops_6nd", "flops_attention", "flops_head", "flops_total", "lr",
    "schedule", "warmup_steps", "decay_steps", "seed", "parent_checkpoint", "data_fingerprint", "tokenizer",
    "vocab_size", "val_nats_per_token", "val_stderr", "val_kind", "val_bits_per_byte", "tokens_per_second", "mfu",
    "device", "precision", "wall_seconds", "versions", "git_commit", "status",
)  # fmt: skip
"""Keys of a record and columns of the table. FLOPs are those of training, losses of validation in nats per token;
``val_stderr`` is one standard error of ``val_nats_per_token``; ``val_kind`` is ``exact`` or ``bound``."""

TEXT_COLUMNS = frozenset({
    "run", "objective", "shape", "schedule", "parent_checkpoint", "data_fingerprint", "tokenizer", "val_kind", "device",
    "precision", "versions", "git_commit", "status",
})  # fmt: skip
INTEGER_COLUMNS = frozenset({
    "params_total", "params_nonembedding", "tokens", "unique_tokens", "steps", "global_batch_tokens",
    "sequence_length", "warmup_steps", "decay_steps", "seed", "vocab_size",
})  # fmt: skip

RESULT_FILE = "result.json"
CONFIG_FILE = "config.yaml"
VALIDATION_FILE = "validation.csv"
VALIDATION_COLUMNS = ("steps", "document", "sequences", "nats_per_token")
DONE = "done"
DIVERGED = "diverged"


def write_records(folder: Path | str, records: Sequence[dict[str, Any]]) -> Path:
    """Writes a run's ``result.json``: at no time is a part of it to be seen.

    Args:
        folder: the run's folder; made if it is not there.
        records: one record for each budget reached, each with exactly the keys ``RESULT_COLUMNS``.

    Raises:
        ValueError: a record lacks a key or has a foreign one (a fault of the program, not of its user).
    """
    for record in records:
        wrong = sorted(set(record) ^ set(RESULT_COLUMNS))
        if wrong:
            raise ValueError(f"a result record has missing or foreign keys: {wrong}")
    path = Path(folder) / RESULT_FILE
    write_json(path, [{column: record[column] for column in RESULT_COLUMNS} for record in records])
    return path


def read_records(folder: Path | str) -> list[dict[str, Any]]:
    """The records of a run's folder; none if the run has not written ``result.json`` yet.

    Raises:
        UserError: the file is not a JSON list of records.
    """
    path = Path(folder) / RESULT_FILE
    if not path.is_file():
        return []
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); delete it and run again") from error
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise UserError(f"{path}: must hold a list of records; delete it and run again")
    return records


def is_done(folder: Path | str) -> bool:
    """Whether the run of this folder has finished: every budget has a record, and every record says so.

    A run that diverged has finished too: the same configuration would diverge again.
    """
    try:
        records = read_records(folder)
    except UserError:
        return False
    finished = all(record.get("status") in (DONE, DIVERGED) for record in records)
    return finished and len(records) >= expected_records(folder)


def expected_records(folder: Path | str) -> int:
    """The number of budgets that the run of this folder is to reach: at least 1, also where no config.yaml says it."""
    try:
        config = yaml.safe_load((Path(folder) / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return 1
    return expected_budgets(config)


def expected_budgets(config: Any) -> int:
    """Budgets of a resolved configuration: the length of ``budget.flops`` where that is a list, else 1."""
    budget = config.get("budget") if isinstance(config, Mapping) else None
    flops = budget.get("flops") if isinstance(budget, Mapping) else None
    return max(1, len(flops)) if isinstance(flops, list) else 1


def has_diverged(folder: Path | str) -> bool:
    """Whether the run of this folder has finished with a loss that is not a number."""
    return is_done(folder) and any(record["status"] == DIVERGED for record in read_records(folder))


def write_validation(folder: Path | str, steps: int, documents: Sequence[tuple[int, int, float]]) -> Path:
    """Writes the validation loss of each document after ``steps``; rows of other steps stay. Atomic.

    Args:
        folder: the run's folder; made if it is not there.
        steps: optimizer steps of the validated weights.
        documents: (document, its sequences, their mean in nats per token) of every validation document.
    """
    path = Path(folder) / VALIDATION_FILE
    table = pd.DataFrame([(steps, *row) for row in documents], columns=list(VALIDATION_COLUMNS))
    with suppress(UserError):  # a damaged file must not cost a finished run its result
        if path.exists():
            before = read_validation(folder)
            table = pd.concat([before[before["steps"] != steps], table]).sort_values(["steps", "document"])
    with written_atomically(path) as temporary:
        table.to_csv(temporary, index=False)
    return path


def read_validation(folder: Path | str) -> pd.DataFrame:
    """The columns ``VALIDATION_COLUMNS``: whole numbers, and nats per token to the last digit (NaN if it diverged).

    Raises:
        UserError: there is no such file, or it is damaged.
    """
    path = Path(folder) / VALIDATION_FILE
    types = dict(zip(VALIDATION_COLUMNS, ("int64", "int64", "int64", "float64"), strict=True))
    try:
        table = pd.read_csv(path, dtype=types, float_precision="round_trip")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); validate the run again") from error
    except ValueError as error:  # pandas' errors of parsing are ValueErrors
        raise UserError(f"{path}: damaged ({' '.join(str(error).split())}); delete it and run again") from error
    if list(table.columns) != list(VALIDATION_COLUMNS):
        raise UserError(f"{path}: its columns must be {', '.join(VALIDATION_COLUMNS)}; delete it and run again")
    return table


# --- the table -------------------------------------------------------------------------------------------------------


def table_of_records(records: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """A table with the columns ``RESULT_COLUMNS``; a key that a record lacks is missing there."""
    columns = {column: [record.get(column) for record in records] for column in RESULT_COLUMNS}
    columns["versions"] = [_compact_json(versions) for versions in columns["versions"]]
    return _typed(pd.DataFrame(columns, dtype=object), source="results")


def typed_record(record: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The keys ``RESULT_COLUMNS`` of a record, each of its column's type or None; the word "NaN" becomes the number.

    Args:
        source: where the record stands, for the error.

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
    _check_suffix(path)
    try:
        with written_atomically(path) as temporary:
            if path.suffix == ".csv":
                table.to_csv(temporary, index=False)
            else:
                _with_pyarrow(path, lambda: table.to_parquet(temporary, index=False))
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); choose another --out") from error
    return path


def read_results(path: Path | str) -> pd.DataFrame:
    """Reads a results table (``.csv`` or ``.parquet``).

    Returns:
        The columns ``RESULT_COLUMNS`` with their types (text, ``Int64``, ``float64``), then any others as they are.

    Raises:
        UserError: there is no such file, it has no rows, a column is missing, or a value is not of its column's type.
    """
    path = Path(path)
    _check_suffix(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; `llada collect` writes one from run folders")
    table = _read_csv(path) if path.suffix == ".csv" else _with_pyarrow(path, lambda: pd.read_parquet(path))
    missing = [column for column in RESULT_COLUMNS if column not in table.columns]
    if missing:
        raise UserError(f"{path}: columns missing: {', '.join(missing)}; `llada collect` writes all of them")
    if table.empty:
        raise UserError(f"{path}: a table without rows; `llada collect` writes one from run folders that hold results")
    others = [column for column in table.columns if column not in RESULT_COLUMNS]
    return _typed(table[[*RESULT_COLUMNS, *others]], source=str(path))


def _read_csv(path: Path) -> pd.DataFrame:
    try:
        # Everything as text first: a run's identity of digits, or a shape called 1e5, must not become a number.
        return pd.read_csv(path, dtype=str, keep_default_na=False, na_values=[""])
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a CSV table ({error}); write it again with `llada collect`") from error


def _with_pyarrow(path: Path, action: Any) -> Any:
    try:
        return action()
    except ImportError as error:
        raise UserError(f"{path}: parquet needs pyarrow; pip install pyarrow, or use a .csv name") from error
    except ValueError as error:  # pyarrow's errors on damaged files are ValueErrors
        raise UserError(f"{path}: not a parquet table ({error}); write it again with `llada collect`") from error


def _check_suffix(path: Path) -> None:
    if path.suffix not in (".csv", ".parquet"):
        raise UserError(f"{path}: a results table must be named .csv or .parquet")


def _typed(table: pd.DataFrame, source: str) -> pd.DataFrame:
    return table.assign(**{column: _typed_column(table[column], source) for column in RESULT_COLUMNS})


def _typed_column(values: pd.Series, source: str) -> pd.Series:
    column = str(values.name)
    if column in TEXT_COLUMNS:
        return values.astype("string")
    if column in INTEGER_COLUMNS:
        return pd.Series([_whole_number(value, column, source) for value in values], values.index, "Int64", column)
    return pd.Series([_number(value, column, source) for value in values], values.index, "float64", column)


def _typed_value(value: Any, column: str, source: str) -> Any:
    if value is None or column == "versions":
        return value
    if column in TEXT_COLUMNS:
        return str(value)
    number = _whole_number(value, column, source) if column in INTEGER_COLUMNS else _number(value, column, source)
    return None if number is pd.NA else number


def _number(value: Any, column: str, source: str) -> float:
    if value is None or value is pd.NA:
        return math.nan
    try:
        return float(value)  # unlike pandas' own parser, exact to the last digit
    except (TypeError, ValueError):
        raise UserError(f"{source}: column {column} holds {value!r}, which is not a number") from None


def _whole_number(value: Any, column: str, source: str) -> Any:
    if isinstance(value, Integral) or (isinstance(value, str) and value.strip().lstrip("-").isdecimal()):
        return int(value)  # exact beyond 2^53, which a float is not
    number = _number(value, column, source)
    if math.isnan(number):
        return pd.NA
    if not number.is_integer():
        raise UserError(f"{source}: column {column} holds {value!r}, which is not a whole number")
    return int(number)


def _compact_json(value: Any) -> str | None:
    return None if value is None else json.dumps(value, sort_keys=True, separators=(",", ":"))
