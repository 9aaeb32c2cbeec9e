"""What a run leaves in its folder, as files that other programs read.

- ``metrics.csv``: one row for each logged step, of training, of validation, or of both.
- ``result.json``: a list with one record for each budget that the run reached. The keys of a record are the columns of
  the results table (``study/results.py``) and of W&B's summary.
- ``validation.csv``: the loss of each validation document at each budget.
- ``held_out/NAME.csv``: the same of the documents of a held-out corpus.
- ``policies/NAME.csv``: the same as ``validation.csv``, by the exact likelihood under a decoding policy.
- ``evaluations.csv``: the score of each evaluated checkpoint on each task.
- ``faults.csv``: the steps whose loss or gradient was not usable, and what was done about each of them.
"""

from __future__ import annotations

import csv
import io
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from llada_lightning.support.errors import UserError
from llada_lightning.support.files import is_there, write_json, written_atomically
from llada_lightning.support.printing import shortened
from llada_lightning.support.reading import FormatError, read_json, read_text, read_yaml

if TYPE_CHECKING:  # pandas takes half a second to import, which a run needs at its end only
    import pandas as pd

RESULT_COLUMNS = (
    "run", "objective", "variant", "shape", "params_total", "params_nonembedding", "tokens", "unique_tokens", "epochs",
    "steps", "global_batch_tokens", "sequence_length", "flops_6nd", "flops_attention", "flops_head", "flops_total",
    "lr", "schedule", "warmup_steps", "decay_steps", "seed", "parent_checkpoint", "data_fingerprint", "tokenizer",
    "vocab_size", "val_nats_per_token", "val_stderr", "val_kind", "val_bits_per_byte", "tokens_per_second", "mfu",
    "device", "precision", "wall_seconds", "versions", "git_commit", "status", "val_by_source", "val_held_out",
    "val_policies", "source_flops",
)  # fmt: skip
"""Keys of a record and columns of the table. FLOPs are those of training, losses of validation in nats per token;
``val_stderr`` is one standard error of ``val_nats_per_token``; ``val_kind`` is ``exact`` or ``bound``; ``variant``
lists the settings of objective and optimizer that are not at their defaults, and is missing where all of them are.
``val_by_source`` holds the loss of each source of a mixture, and ``val_held_out`` that of each held-out corpus, as a
mapping from names to ``CORPUS_KEYS``; they are missing where there are none. ``val_policies`` holds the exact loss of
the validation sequences under each decoding policy that was asked for, as a mapping from labels such as `confidence@1`
to ``POLICY_KEYS``. ``source_flops`` holds the training FLOPs, by 6ND, of the weights that a run started from, those of
the weights that these started from included; it is missing where there were none, or where they are not known."""

LATER_COLUMNS = frozenset({"variant", "val_by_source", "val_held_out", "val_policies", "source_flops"})
"""Columns that older records and tables lack. A missing value means the default."""

MAPPING_COLUMNS = frozenset({"versions", "val_by_source", "val_held_out", "val_policies"})
"""Columns whose values are mappings in a record, and JSON in a table."""

CORPUS_KEYS = ("nats_per_token", "stderr", "bits_per_byte", "documents", "sequences", "first_document", "fingerprint")
"""What a record holds of a source or a held-out corpus: its loss with one standard error, in nats per token, and in
bits per byte where they are known; the numbers of its validation documents and sequences; the lowest number that a
document of it has in ``validation.csv``; and the fingerprint of its prepared folder."""

POLICY_KEYS = ("nats_per_token", "stderr", "bits_per_byte", "documents", "sequences")
"""What a record holds of a decoding policy: the exact negative log-likelihood of the validation sequences under it,
with one standard error by document, in nats per token, and in bits per byte where they are known; and the numbers of
documents and sequences. The documents are numbered as in ``validation.csv``."""

METRICS_FILE = "metrics.csv"
RESULT_FILE = "result.json"
CONFIG_FILE = "config.yaml"
VALIDATION_FILE = "validation.csv"
HELD_OUT = "held_out"
"""The folder, in a run's folder, with the losses of the documents of each held-out corpus."""
POLICIES = "policies"
"""The folder, in a run's folder, with the losses of the validation documents under each decoding policy."""
VALIDATION_COLUMNS = ("steps", "document", "sequences", "nats_per_token")
DONE = "done"
DIVERGED = "diverged"


def write_records(folder: Path | str, records: Sequence[dict[str, Any]]) -> Path:
    """Writes a run's ``result.json``: at no time is a part of it to be seen. The folder is made if it does not exist.

    A record has the keys ``RESULT_COLUMNS``; older ones may lack ``LATER_COLUMNS``.

    Raises:
        ValueError: A record lacks a key or has a foreign one (a fault of the program, not of its user).
    """
    for record in records:
        wrong = sorted((set(record) ^ set(RESULT_COLUMNS)) - LATER_COLUMNS)
        if wrong:
            raise ValueError(f"a result record has missing or foreign keys: {wrong}")
    path = Path(folder) / RESULT_FILE
    write_json(path, [{column: record.get(column) for column in RESULT_COLUMNS} for record in records])
    return path


def read_records(folder: Path | str) -> list[dict[str, Any]]:
    """The records of a run's folder; none if the run has not written ``result.json`` yet.

    Raises:
        UserError: The file is not a JSON list of records.
    """
    path = Path(folder) / RESULT_FILE
    if not is_there(path):
        return []
    try:
        records = read_json(path)
    except FormatError as error:
        raise UserError(f"{error}; delete it and run again") from error
    if not isinstance(records, list) or not all(map(_is_record, records)):
        raise UserError(f"'{shortened(path)}' must hold a list of records; delete it and run again")
    return records


def _is_record(value: Any) -> bool:
    """Whether a run can resume from it: it names its run, and the number of its steps."""
    return isinstance(value, dict) and isinstance(value.get("steps"), int) and "run" in value


def is_done(folder: Path | str) -> bool:
    """Whether the run of this folder has finished: every budget has a record of a finished run.

    A run that diverged has finished too: the same configuration would diverge again.
    """
    try:
        records, budgets = read_records(folder), expected_records(folder)
    except UserError:
        return False
    return len(records) >= budgets and all(record.get("status") in (DONE, DIVERGED) for record in records)


def expected_records(folder: Path | str) -> int:
    """The number of budgets that the run of this folder is to reach: at least 1, also where there is no config.yaml.

    Raises:
        UserError: Its config.yaml cannot be read.
    """
    path = Path(folder) / CONFIG_FILE
    return expected_budgets(read_yaml(path)) if is_there(path) else 1


def expected_budgets(config: Any) -> int:
    """The results of a resolved configuration: one for each of its budgets (at least one) and milestones."""
    budget = config.get("budget") if isinstance(config, Mapping) else None
    flops, milestones = (budget.get(key) if isinstance(budget, Mapping) else None for key in ("flops", "milestones"))
    budgets = max(1, len(flops)) if isinstance(flops, list) else 1
    return budgets + (len(milestones) if isinstance(milestones, list) else 0)


def has_diverged(folder: Path | str) -> bool:
    """Whether the run of this folder has finished with a loss that is not a number."""
    return is_done(folder) and any(record["status"] == DIVERGED for record in read_records(folder))


def validation_path(folder: Path | str, held_out: str | None = None, policy: str | None = None) -> Path:
    """The path of a run's losses by document: of its own validation, of the held-out corpus of a name, or of its own
    validation under the decoding policy of a label."""
    if policy is not None:
        return Path(folder) / POLICIES / f"{policy}.csv"
    return Path(folder) / (VALIDATION_FILE if held_out is None else f"{HELD_OUT}/{held_out}.csv")


def write_validation(
    folder: Path | str,
    steps: int,
    documents: Sequence[tuple[int, int, float]],
    held_out: str | None = None,
    policy: str | None = None,
) -> Path:
    """Writes the validation loss of each document after ``steps`` optimizer steps; rows of other steps stay. Atomic.

    ``documents`` holds a tuple for every validation document: its number, the number of its sequences, and their mean
    loss in nats per token. ``held_out`` is the name of the corpus that they belong to; None: the run's own validation.
    ``policy`` is the label of the decoding policy that gives the losses; None: none does. The folder is made if it does
    not exist.
    """
    import pandas as pd

    path = validation_path(folder, held_out, policy)
    table = pd.DataFrame([(steps, *row) for row in documents], columns=list(VALIDATION_COLUMNS))
    with suppress(UserError):  # a damaged file must not cost a finished run its result
        if path.exists():
            before = read_validation(folder, held_out, policy)
            table = pd.concat([before[before["steps"] != steps], table]).sort_values(["steps", "document"])
    with written_atomically(path) as temporary:
        table.to_csv(temporary, index=False)
    return path


def read_validation(folder: Path | str, held_out: str | None = None, policy: str | None = None) -> pd.DataFrame:
    """The columns ``VALIDATION_COLUMNS``: whole numbers, and nats per token to the last digit (NaN if it diverged).

    They are of the run's own validation, of the held-out corpus of a name, or of the run's own validation under the
    decoding policy of a label.

    Raises:
        UserError: There is no such file, or it is damaged.
    """
    types = dict(zip(VALIDATION_COLUMNS, ("int64", "int64", "int64", "float64"), strict=True))
    return read_typed_csv(validation_path(folder, held_out, policy), types, "delete it and run again")


def read_typed_csv(path: Path, types: Mapping[str, Any], fix: str) -> pd.DataFrame:
    """A CSV file of a run's folder, with exactly the columns of ``types`` in their order; numbers to the last digit.

    Raises:
        UserError: There is no such file, or it is damaged; the message of a damaged one ends with ``fix``.
    """
    import pandas as pd

    try:
        text = read_text(path)
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)  # of cells that would be dropped
            table = pd.read_csv(io.StringIO(text), dtype=dict(types), float_precision="round_trip", index_col=False)
    except FormatError as error:
        raise UserError(f"{error}; {fix}") from error
    except (ValueError, ArithmeticError, pd.errors.ParserWarning) as error:  # errors of parsing are ValueErrors
        raise UserError(f"'{shortened(path)}' is damaged ({shortened(error)}); {fix}") from error
    if list(table.columns) != list(types):
        raise UserError(f"'{shortened(path)}': its columns must be {', '.join(types)}; {fix}")
    return table


# --- metrics ----------------------------------------------------------------------------------------------------------

NOISE_LEVELS = 10
"""The number of equal bins of the noise level, from 0 to 1, by which a loss is logged."""


def level_columns(split: Literal["train", "val"]) -> tuple[str, ...]:
    """The columns of ``metrics.csv`` with the loss by noise level, named by the middles of the bins in percent.

    `train_nats_at_t05` holds the mean of the tokens that were noised at a level above 0 and up to 0.1. A cell is empty
    where there was no such token.
    """
    return tuple(f"{split}_nats_at_t{100 * (2 * n + 1) // (2 * NOISE_LEVELS):02d}" for n in range(NOISE_LEVELS))


def metrics_rows(lines: Iterable[str]) -> list[dict[str, str]]:
    """The rows of a metrics file by column, empty cells left out; a last line that a kill cut short is dropped."""
    rows = [row for row in csv.DictReader(lines) if None not in row.values() and None not in row]
    return [{key: value for key, value in row.items() if value != ""} for row in rows if row["step"].isdigit()]


# --- evaluations and faults ------------------------------------------------------------------------------------------

EVALUATIONS_FILE = "evaluations.csv"
EVALUATION_COLUMNS = ("steps", "task", "score", "stderr", "n", "metric", "settings")
"""``score`` and ``stderr`` are in percent; ``settings`` say how it was measured."""


def write_evaluations(folder: Path | str, rows: Sequence[dict[str, Any]]) -> Path:
    """Adds rows (``EVALUATION_COLUMNS``) to a run's evaluations. A row replaces that of the same step and task. Atomic.

    Raises:
        UserError: The file that is there is damaged.
    """
    import pandas as pd

    path = Path(folder) / EVALUATIONS_FILE
    table = pd.DataFrame(rows, columns=list(EVALUATION_COLUMNS))
    if is_there(path):
        table = pd.concat([read_evaluations(folder), table])
    table = table.drop_duplicates(["steps", "task"], keep="last").sort_values(["steps", "task"])
    with written_atomically(path) as temporary:
        table.to_csv(temporary, index=False)
    return path


def read_evaluations(folder: Path | str) -> pd.DataFrame:
    """The columns ``EVALUATION_COLUMNS``; no rows where a run has no evaluations.

    Raises:
        UserError: The file is damaged.
    """
    import pandas as pd

    path = Path(folder) / EVALUATIONS_FILE
    if not is_there(path):
        return pd.DataFrame(columns=list(EVALUATION_COLUMNS))
    types = dict(zip(EVALUATION_COLUMNS, ("int64", str, "float64", "float64", "int64", str, str), strict=True))
    return read_typed_csv(path, types, "delete it and evaluate again")


def task_columns(folder: Path | str, steps: Any) -> dict[str, float]:
    """The columns of a results table that the evaluations at a step give; none where a run has no evaluations.

    Raises:
        UserError: The file is damaged.
    """
    columns: dict[str, float] = {}
    if not is_there(Path(folder) / EVALUATIONS_FILE):
        return columns  # without the time that pandas takes
    table = read_evaluations(folder)
    for row in table[table["steps"] == steps].to_dict("records"):
        columns[f"task_{row['task']}"] = float(row["score"])
        columns[f"task_{row['task']}_stderr"] = float(row["stderr"])
    return columns


FAULTS_FILE = "faults.csv"
FAULT_COLUMNS = ("step", "kind", "loss", "grad_norm", "first_ordinal", "last_ordinal", "action")
"""``kind``: `loss` or `gradient` where that is not finite, else `spike`; ``action``: `skipped` or `reported`."""
SKIPPED, REPORTED = "skipped", "reported"


def read_faults(folder: Path) -> list[dict[str, str]]:
    """The rows of a folder's file, in order of step; none where there is no file.

    Raises:
        UserError: The file cannot be read, or is damaged.
    """
    path = folder / FAULTS_FILE
    if not is_there(path):
        return []
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""), strict=True)
    try:
        rows = list(reader)
    except csv.Error as error:
        raise UserError(f"'{shortened(path)}' is damaged ({error}); delete it") from error
    if not {"step", "action"} <= set(reader.fieldnames or []):
        raise UserError(f"'{shortened(path)}' is damaged (it lacks the columns step and action); delete it")
    for row in rows:
        if None in row or None in row.values() or not re.fullmatch(r"\d{1,18}", row["step"]):
            raise UserError(f"'{shortened(path)}' is damaged (step {shortened(row['step'], 40)}); delete it")
    return rows


def write_faults(folder: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Replace the file by one of these rows, whole or not at all."""
    with written_atomically(folder / FAULTS_FILE) as path, path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FAULT_COLUMNS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def skipped_updates(run: Path) -> int:
    """Updates that a run skipped, those of its branches included (errors as :func:`read_faults`)."""
    folders = [run, *(path.parent for path in run.glob(f"branches/*/{FAULTS_FILE}"))]
    return sum(row.get("action") == SKIPPED for folder in folders for row in read_faults(folder))
