"""The difference of two results' validation losses, with its error, from the losses of the documents that they share.

A hard document is hard for both models, so the losses of one document are alike, and the standard error of the
difference is below what the two standard errors would give. It follows from each document's difference
(``results.covariance_of_means``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from scipy.special import stdtrit

from llada_lightning.records import CORPUS_KEYS, RESULT_FILE, read_records, read_validation, validation_path
from llada_lightning.study.results import LARGEST_NUMBER, Row, covariance_of_means, documents_of, typed_record
from llada_lightning.support.errors import UserError
from llada_lightning.support.files import expanded, is_there
from llada_lightning.support.printing import shortened

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Difference:
    """The losses of two results on the same documents, and the first one minus the second, in one unit.

    Attributes:
        a, b: The two losses.
        difference: ``a - b``.
        stderr: The standard error of the difference, over documents as pairs; None: fewer than two documents.
        interval: The interval of 95 % of the difference, by Student's t for one document less than there are.
        unpaired_stderr: What the standard error would be if the two losses were of different documents.
    """

    a: float
    b: float
    difference: float
    stderr: float | None
    interval: tuple[float, float] | None
    unpaired_stderr: float | None

    @property
    def gain(self) -> float | None:
        """The unpaired standard error over the paired one; None where there is none, or the pairs leave no error."""
        return self.unpaired_stderr / self.stderr if self.stderr and self.unpaired_stderr is not None else None

    def scaled(self, factor: float) -> Difference:
        """The same in another unit."""

        def times(value: float | None) -> float | None:
            return None if value is None else factor * value

        interval = None if self.interval is None else (factor * self.interval[0], factor * self.interval[1])
        return Difference(
            a=factor * self.a,
            b=factor * self.b,
            difference=factor * self.difference,
            stderr=times(self.stderr),
            interval=interval,
            unpaired_stderr=times(self.unpaired_stderr),
        )


@dataclass(frozen=True)
class Compared:
    """One corpus on which two results are compared.

    Attributes:
        of: `total`, `source` (of a mixture) or `held out`.
        name: The name of the source or of the held-out corpus; None: the total.
        documents, sequences: The validation documents that the results share, and the sequences that begin in them.
        nats_per_token: The difference in nats per token.
        bits_per_byte: The difference in bits per byte; None where they are not known.
    """

    of: Literal["total", "source", "held out"]
    name: str | None
    documents: int
    sequences: int
    nats_per_token: Difference
    bits_per_byte: Difference | None


@dataclass(frozen=True)
class Comparison:
    """Two results compared.

    Attributes:
        a, b: The rows that are compared.
        corpora: The total first, then the sources of a mixture, then held-out corpora.
        left_out: What both results have a loss of and is not compared -> the reason.
    """

    a: Row
    b: Row
    corpora: list[Compared]
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def kind_note(self) -> str:
        """Whether both losses are of one kind, and what it means for the difference where they are not."""
        first, second = (row.record["val_kind"] for row in (self.a, self.b))
        if first == second:
            return f"both losses are {'bounds' if first == 'bound' else first}"
        bound, side = ("A", "above") if first == "bound" else ("B", "below")
        return (
            f"{bound}'s loss is a bound and the other one exact: A - B lies {side} the difference of the exact losses"
        )

    def as_dict(self) -> dict[str, Any]:
        """What ``--json`` prints."""

        def result(row: Row) -> dict[str, Any]:
            keys = ("run", "steps", "objective", "variant", "shape", "flops_6nd", "flops_total", "seed", "val_kind")
            return {"folder": str(row.folder), **{key: row.record[key] for key in keys}}

        def unit(difference: Difference | None) -> dict[str, Any] | None:
            return None if difference is None else {**asdict(difference), "gain": difference.gain}

        corpora = [
            {**asdict(each), "nats_per_token": unit(each.nats_per_token), "bits_per_byte": unit(each.bits_per_byte)}
            for each in self.corpora
        ]
        same = self.a.record["val_kind"] == self.b.record["val_kind"]
        ends = {"a": result(self.a), "b": result(self.b)}
        return {**ends, "same_kind": same, "note": self.kind_note, "corpora": corpora, "left_out": self.left_out}


def paired_difference(a_G: np.ndarray, b_G: np.ndarray, sequences_G: np.ndarray) -> Difference:
    """Returns the difference of two means over sequences, from the mean of each document (arrays of (G,) float64)."""
    share_G = sequences_G / sequences_G.sum()
    a, b, difference = (float(share_G @ values_G) for values_G in (a_G, b_G, a_G - b_G))
    if len(a_G) < 2:
        return Difference(a, b, difference, None, None, None)
    variance_a, variance_b, variance = np.diag(
        covariance_of_means(np.stack([a_G, b_G, a_G - b_G], axis=1), sequences_G)
    )
    stderr = math.sqrt(variance)
    half = float(stdtrit(len(a_G) - 1, (1 + CONFIDENCE) / 2)) * stderr
    interval = (difference - half, difference + half)
    return Difference(a, b, difference, stderr, interval, math.sqrt(variance_a + variance_b))


def find_result(given: str) -> Row:
    """Returns the result that a path names: of a run folder with one result, `FOLDER/RESULT`, or `FOLDER/branches/N`.

    Raises:
        UserError: There is no such result, or the folder has several.
    """
    path = expanded(given)
    shown = f"'{shortened(given)}'"
    if is_there(path / RESULT_FILE):
        records, folder = read_records(path), path
        if len(records) != 1:
            names = ", ".join(f"{given.rstrip('/')}/{record['run']}" for record in records) or "none"
            raise UserError(f"compare: {shown} holds {len(records)} results; name one of them: {names}")
        [record] = records
    else:
        branch = path.parent.name == "branches"
        folder = path.parent.parent if branch else path.parent
        if not is_there(folder / RESULT_FILE):
            raise UserError(f"compare: {shown} is neither a run folder with a {RESULT_FILE} nor a result's name in one")
        key = "steps" if branch else "run"
        records = [record for record in read_records(folder) if str(record[key]) == path.name]
        if not records:
            names = ", ".join(str(record["run"]) for record in read_records(folder)) or "none"
            raise UserError(f"compare: {shown} is no result of '{shortened(folder)}', which has: {names}")
        record = records[0]
    return Row(typed_record(record, f"'{shortened(folder / RESULT_FILE)}'"), folder)


def compare(a: Row, b: Row) -> Comparison:
    """Compares two results on all validation documents that they share, and on those of each source or held-out corpus.

    Raises:
        UserError: They have different tokenizers, a result has no losses by document, or they share no documents.
    """
    if a.label == b.label and a.folder is not None and b.folder is not None and a.folder.samefile(b.folder):
        raise UserError(f"compare: {a.label} is given twice; give two results")
    ours, theirs = a.record, b.record
    if ours["tokenizer"] != theirs["tokenizer"]:
        raise UserError(
            f"compare: {a.label} and {b.label} have different tokenizers ({_digits(ours['tokenizer'])}, "
            f"{_digits(theirs['tokenizer'])}), so they have no validation tokens in common; prepare the data of one "
            "with --tokenizer of the other"
        )
    found: list[Compared] = []
    left_out: dict[str, str] = {}
    try:
        found += _total(a, b)
    except _NotComparableError as other:
        left_out["total"] = str(other)
    theirs_held_out = _corpora(b, "val_held_out")
    for name, loss in _corpora(a, "val_held_out").items():
        if name in theirs_held_out:
            try:
                found.append(_held_out(a, b, name, loss, theirs_held_out[name]))
            except _NotComparableError as other:
                left_out[f"held out {name}"] = str(other)
    if not found:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in left_out.items())
        apart = a.record["data_fingerprint"] != b.record["data_fingerprint"]
        way = "; runs on different data are compared on a corpus that both were given as data.held_out" * apart
        raise UserError(
            f"compare: {a.label} and {b.label} share no validation documents that have losses ({reasons}){way}"
        )
    return Comparison(a, b, found, left_out)


class _NotComparableError(Exception):
    """Two results cannot be compared on a corpus, with the reason."""


def _total(a: Row, b: Row) -> Iterator[Compared]:
    """The difference on all documents of the runs' own validation, and that of each source of a mixture."""
    _check_equal("data", a.record["data_fingerprint"], b.record["data_fingerprint"])
    tables = _shared(a, b)
    bits = _bits(a.record["val_nats_per_token"], a.record["val_bits_per_byte"])
    yield _compared("total", None, tables, bits)
    sources = _corpora(a, "val_by_source") or _corpora(b, "val_by_source")  # one of the two may be of an older version
    documents = tables[0]["document"].to_numpy()
    starts = np.array([loss["first_document"] for loss in sources.values()])
    source_of_G = np.searchsorted(starts, documents, side="right") - 1
    for number, (name, loss) in enumerate(sources.items()):
        own_G = source_of_G == number
        if own_G.any():
            own = (tables[0][own_G], tables[1][own_G])
            yield _compared("source", name, own, _bits(loss["nats_per_token"], loss["bits_per_byte"]))


def _held_out(a: Row, b: Row, name: str, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> Compared:
    """The difference on a corpus that is held out from both."""
    _check_equal("data", ours["fingerprint"], theirs["fingerprint"])
    tables = _shared(a, b, name)
    return _compared("held out", name, tables, _bits(ours["nats_per_token"], ours["bits_per_byte"]))


def _check_equal(what: str, ours: Any, theirs: Any) -> None:
    if ours != theirs:
        raise _NotComparableError(f"other {what}, {_digits(ours)} and {_digits(theirs)}")


Tables = tuple[pd.DataFrame, pd.DataFrame]
"""The losses by document of the two results, of the same documents in the same order."""


def _shared(a: Row, b: Row, held_out: str | None = None) -> Tables:
    """The losses by document of both: of their own validations, or of a held-out corpus."""
    _check_equal("sequence lengths", a.record["sequence_length"], b.record["sequence_length"])
    read: Callable[[Path], pd.DataFrame] = partial(read_validation, held_out=held_out)

    def table_of(row: Row) -> pd.DataFrame:
        assert row.folder is not None
        try:
            return documents_of(row, read, validation_path(row.folder, held_out))
        except UserError as error:
            raise _NotComparableError(f"{row.label}: {error}") from error

    first, second = table_of(a), table_of(b)
    same = ["document", "sequences"]
    if not np.array_equal(first[same].to_numpy(), second[same].to_numpy()):
        counts = [f"{len(table)} documents with {table['sequences'].sum()} sequences" for table in (first, second)]
        raise _NotComparableError(f"other documents by val_sequences or val_seed, {counts[0]} and {counts[1]}")
    return first, second


def _compared(
    of: Literal["total", "source", "held out"], name: str | None, tables: Tables, bits_per_nat: float | None
) -> Compared:
    sequences_G = tables[0]["sequences"].to_numpy()
    a_G, b_G = (table["nats_per_token"].to_numpy() for table in tables)
    nats = paired_difference(a_G, b_G, sequences_G)
    bits = None if bits_per_nat is None else nats.scaled(bits_per_nat)
    return Compared(of, name, len(sequences_G), int(sequences_G.sum()), nats, bits)


def _bits(nats_per_token: float | None, bits_per_byte: float | None) -> float | None:
    """Bits per byte for each nat per token, a number of the validation text that both results share."""
    return bits_per_byte / nats_per_token if bits_per_byte and nats_per_token and math.isfinite(bits_per_byte) else None


def _corpora(row: Row, column: str) -> dict[str, dict[str, Any]]:
    """The losses of corpora of a record, in order of their documents; none where it has none.

    Raises:
        UserError: They are not what a record holds.
    """
    value = row.record[column] or {}
    try:
        for loss in value.values():
            numbers = [loss[key] for key in ("nats_per_token", "bits_per_byte", "first_document")]
            if not (
                set(loss) >= set(CORPUS_KEYS)
                and all(number is None or abs(float(number)) < LARGEST_NUMBER for number in numbers)
                and isinstance(loss["first_document"], int)
                and isinstance(loss["fingerprint"], str)
            ):
                raise ValueError
        return dict(sorted(value.items(), key=lambda each: int(each[1]["first_document"])))
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise UserError(f"compare: {column} of {row.label} is damaged; run it again") from error


def _digits(value: Any) -> str:
    """A value, or the first digits of a fingerprint."""
    return shortened(value) if len(str(value)) < 20 else f"{str(value)[:10]}…"
