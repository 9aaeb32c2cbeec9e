"""The paired difference of two validation losses, against numbers that are computed by hand."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.studies import NATS_TO_BITS_PER_BYTE, record
from llada_lightning.records import CORPUS_KEYS, write_records, write_validation
from llada_lightning.study.compare import Comparison, Difference, compare, find_result, paired_difference
from llada_lightning.study.results import read_covariance, write_covariance
from llada_lightning.support.errors import UserError

Documents = Sequence[tuple[int, int, float]]

A: Documents = [(0, 1, 2.0), (64, 2, 3.0), (320, 1, 4.0)]
B: Documents = [(0, 1, 1.0), (64, 2, 2.5), (320, 1, 4.5)]
T_OF_TWO = 4.302652729696142
"""Student's t of two degrees of freedom, 97.5 %."""


def mean(documents: Documents) -> float:
    return sum(count * loss for _, count, loss in documents) / sum(count for _, count, _ in documents)


def corpus(documents: Documents, first_document: int = 0, fingerprint: str = "f", bits: float = 0.5) -> dict[str, Any]:
    """What a record holds of a source or a held-out corpus."""
    nats = mean(documents)
    sequences = sum(count for _, count, _ in documents)
    values = (nats, 0.1, bits * nats, len(documents), sequences, first_document, fingerprint)
    return dict(zip(CORPUS_KEYS, values, strict=True))


def run(
    folder: Path,
    documents: Documents,
    objective: str = "arm",
    held_out: dict[str, Documents] | None = None,
    **other: Any,
) -> Path:
    """The folder of a run with one result; ``other`` overrides keys of its record."""
    held = {"val_held_out": {name: corpus(own) for name, own in held_out.items()}} if held_out else {}
    made = record(objective, "107k", 1e12, mean(documents), **{"run": folder.name, **held, **other})
    write_records(folder, [made])
    write_validation(folder, made["steps"], documents)
    for name, own in (held_out or {}).items():
        write_validation(folder, made["steps"], own, held_out=name)
    return folder


def compared(a: Path | str, b: Path | str) -> Comparison:
    return compare(find_result(str(a)), find_result(str(b)))


def refused(a: Path | str, b: Path | str) -> str:
    with pytest.raises(UserError) as raised:
        compared(a, b)
    message = str(raised.value)
    assert message.startswith("compare: ") and len(message.splitlines()) == 1
    return message


# --- the numbers ------------------------------------------------------------------------------------------------------


def test_the_difference_and_its_error_by_hand(tmp_path: Path) -> None:
    """Means over sequences 3 and 2.625; each document's deviation from the difference, weighted by its sequences."""
    [total] = compared(run(tmp_path / "a", A), run(tmp_path / "b", B)).corpora
    nats = total.nats_per_token
    assert (total.of, total.name, total.documents, total.sequences) == ("total", None, 3, 4)
    assert (nats.a, nats.b, nats.difference) == (3.0, 2.625, 0.375)
    deviations = [(1.0 - 0.375) / 4, 2 * (0.5 - 0.375) / 4, (-0.5 - 0.375) / 4]
    stderr = math.sqrt(3 / 2 * sum(each**2 for each in deviations))
    assert nats.stderr == pytest.approx(stderr) and stderr == pytest.approx(0.338020, abs=1e-6)
    assert nats.interval == pytest.approx((0.375 - T_OF_TWO * stderr, 0.375 + T_OF_TWO * stderr))
    of_a = [(2.0 - 3.0) / 4, 0.0, (4.0 - 3.0) / 4]
    of_b = [(1.0 - 2.625) / 4, 2 * (2.5 - 2.625) / 4, (4.5 - 2.625) / 4]
    unpaired = math.sqrt(3 / 2 * sum(each**2 for each in (*of_a, *of_b)))
    assert nats.unpaired_stderr == pytest.approx(unpaired) and nats.gain == pytest.approx(unpaired / stderr)
    assert total.bits_per_byte == Difference(
        *(pytest.approx(NATS_TO_BITS_PER_BYTE * value) for value in (nats.a, nats.b, nats.difference, stderr)),
        pytest.approx(tuple(NATS_TO_BITS_PER_BYTE * end for end in nats.interval or ())),
        pytest.approx(NATS_TO_BITS_PER_BYTE * unpaired),
    )


LOSSES = st.lists(
    st.tuples(st.integers(1, 5), st.floats(0.1, 12), st.floats(0.1, 12)), min_size=2, max_size=30
)  # fmt: skip


@given(LOSSES)
def test_swapped_runs_flip_the_sign(drawn: list[tuple[int, float, float]]) -> None:
    sequences, a, b = (np.array(column, dtype=np.float64) for column in zip(*drawn, strict=True))
    forth, back = paired_difference(a, b, sequences), paired_difference(b, a, sequences)
    assert back.difference == -forth.difference and (back.a, back.b) == (forth.b, forth.a)
    assert back.stderr == pytest.approx(forth.stderr) and back.unpaired_stderr == pytest.approx(forth.unpaired_stderr)
    assert forth.interval is not None and back.interval is not None
    assert [-end for end in back.interval[::-1]] == pytest.approx(list(forth.interval))


@given(LOSSES, st.floats(-2, 2))
def test_equal_differences_have_no_error(drawn: list[tuple[int, float, float]], shift: float) -> None:
    sequences, a, _ = (np.array(column, dtype=np.float64) for column in zip(*drawn, strict=True))
    found = paired_difference(a + shift, a, sequences)
    assert found.difference == pytest.approx(shift, abs=1e-12) and found.stderr == pytest.approx(0, abs=1e-12)


def test_one_document_has_no_error() -> None:
    found = paired_difference(np.array([2.0]), np.array([1.0]), np.array([3]))
    assert found == Difference(2.0, 1.0, 1.0, None, None, None) and found.gain is None


def test_the_error_is_that_of_the_studys_covariance(tmp_path: Path) -> None:
    rows = [find_result(str(run(tmp_path / name, own))) for name, own in (("a", A), ("b", B))]
    write_covariance(rows, tmp_path / "results.csv")
    c = read_covariance(tmp_path / "results.covariance.csv").to_numpy()
    [total] = compare(*rows).corpora
    assert total.nats_per_token.stderr == pytest.approx(math.sqrt(c[0, 0] + c[1, 1] - 2 * c[0, 1]))


def test_each_source_of_a_mixture_has_its_own(tmp_path: Path) -> None:
    """Also where one of the runs is of a version that did not record them."""
    sources = {"web": corpus(A[:2], bits=0.4), "code": corpus(A[2:], first_document=320, bits=0.8)}
    a = run(tmp_path / "a", A, val_by_source=dict(reversed(sources.items())))
    comparison = compared(run(tmp_path / "b", B), a)
    total, web, code = comparison.corpora
    assert [(each.of, each.name) for each in (total, web, code)] == [
        ("total", None), ("source", "web"), ("source", "code"),
    ]  # fmt: skip
    assert (web.documents, web.sequences, code.documents, code.sequences) == (2, 3, 1, 1)
    assert web.nats_per_token.difference == pytest.approx((1.0 + 5.0) / 3 - (2.0 + 6.0) / 3)
    assert code.nats_per_token.difference == 0.5 and code.nats_per_token.stderr is None
    assert total.nats_per_token.difference == pytest.approx(
        (3 * web.nats_per_token.difference + code.nats_per_token.difference) / 4
    )
    assert web.bits_per_byte is not None and code.bits_per_byte is not None
    assert web.bits_per_byte.difference == pytest.approx(0.4 * web.nats_per_token.difference)
    assert code.bits_per_byte.difference == pytest.approx(0.8 * 0.5)


def test_runs_of_other_data_are_compared_on_what_is_held_out_from_both(tmp_path: Path) -> None:
    a = run(tmp_path / "a", A, held_out={"wiki": A, "code": B})
    b = run(tmp_path / "b", A, held_out={"wiki": B}, data_fingerprint="0123456789" * 6)
    comparison = compared(a, b)
    [wiki] = comparison.corpora
    assert (wiki.of, wiki.name, wiki.nats_per_token.difference) == ("held out", "wiki", 0.375)
    assert comparison.left_out == {"total": "other data, d41d8cd9 and 0123456789…"}


def test_a_loss_without_bits_per_byte_is_compared_in_nats(tmp_path: Path) -> None:
    [total] = compared(
        run(tmp_path / "a", A, val_bits_per_byte=None), run(tmp_path / "b", B, val_bits_per_byte=None)
    ).corpora
    assert total.bits_per_byte is None


@pytest.mark.parametrize(
    ("objectives", "note"),
    [
        (("arm", "arm"), "both losses are exact"),
        (("llada", "llada"), "both losses are bounds"),
        (("llada", "arm"), "A's loss is a bound and the other one exact: A - B lies above the difference of the exact"),
        (("arm", "llada"), "B's loss is a bound and the other one exact: A - B lies below the difference of the exact"),
    ],
)
def test_the_kinds_of_the_losses_are_told(tmp_path: Path, objectives: tuple[str, str], note: str) -> None:
    a, b = (run(tmp_path / f"{n}", A, objective=objective) for n, objective in enumerate(objectives))
    comparison = compared(a, b)
    assert comparison.kind_note.startswith(note)
    assert comparison.as_dict()["same_kind"] == (objectives[0] == objectives[1])


# --- which results ----------------------------------------------------------------------------------------------------


def test_results_of_several_budgets_go_by_their_names_or_branches(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    records = [
        record("arm", "107k", budget, mean(own), run=f"r{n}") for n, (budget, own) in enumerate(((1e12, A), (3e12, B)))
    ]
    write_records(folder, records)
    for made, own in zip(records, (A, B), strict=True):
        write_validation(folder, made["steps"], own)
    steps = [made["steps"] for made in records]
    assert compared(folder / "r0", folder / "r1").corpora[0].nats_per_token.difference == 0.375
    assert compared(folder / "branches" / str(steps[1]), folder / "r0").corpora[0].nats_per_token.difference == -0.375
    assert f"holds 2 results; name one of them: {folder}/r0, {folder}/r1" in refused(folder, folder / "r1")
    assert "r2' is no result of" in refused(folder / "r2", folder / "r1") and "has: r0, r1" in refused(
        folder / "branches" / "7", folder / "r1"
    )
    assert f"r1@{steps[1]} is given twice" in refused(folder / "r1", folder / "branches" / str(steps[1]))


def test_what_is_no_result_is_named(tmp_path: Path) -> None:
    a = run(tmp_path / "a", A)
    assert "neither a run folder with a result.json nor a result's name in one" in refused(a, tmp_path / "none")
    write_records(tmp_path / "empty", [])
    assert "holds 0 results; name one of them: none" in refused(tmp_path / "empty", a)


def changed(tmp_path: Path, **other: Any) -> str:
    return refused(run(tmp_path / "a", A), run(tmp_path / "b", B, **other))


def test_what_does_not_share_documents_is_refused_with_the_reason(tmp_path: Path) -> None:
    assert "different tokenizers (bpe-1024, other)" in changed(tmp_path, tokenizer="other")
    assert (
        "(total: other data, d41d8cd9 and cafe); runs on different data are compared on a corpus that both were given "
        "as data.held_out"
    ) in changed(tmp_path, data_fingerprint="cafe")
    assert "(total: other sequence lengths, 128 and 64)" in changed(tmp_path, sequence_length=64)
    b = run(tmp_path / "c", B[:2])
    assert (
        "share no validation documents that have losses (total: other documents by val_sequences or val_seed, 3 "
        "documents with 4 sequences and 2 documents with 3 sequences)"
    ) in refused(tmp_path / "a", b)
    other = run(tmp_path / "d", B, data_fingerprint="cafe", held_out={"wiki": A})
    again = run(tmp_path / "e", B, val_held_out={"wiki": corpus(A, fingerprint="g")})
    assert "held out wiki: other data, f and g)" in refused(other, again)


def test_a_result_without_losses_by_document_is_refused_with_the_reason(tmp_path: Path) -> None:
    a, b = run(tmp_path / "a", A), run(tmp_path / "b", B)
    (b / "validation.csv").unlink()
    assert "(total: b@762: no validation.csv)" in refused(a, b)
    assert "(total: c@762: loss not finite)" in refused(a, run(tmp_path / "c", B, val_nats_per_token=math.nan))
    (b / "validation.csv").write_text("steps\n")
    assert re.search(
        r"\(total: b@762: '.*validation\.csv': its columns must be .* delete it and run again\)", refused(b, a)
    )
    c, d = (run(tmp_path / name, own, held_out={"wiki": own}) for name, own in (("e", A), ("f", B)))
    assert [each.of for each in compared(c, d).corpora] == ["total", "held out"]
    (d / "held_out" / "wiki.csv").unlink()
    comparison = compared(c, d)
    assert [each.of for each in comparison.corpora] == ["total"]
    assert comparison.left_out == {"held out wiki": "f@762: no wiki.csv"}


@pytest.mark.parametrize(
    "damage",
    [
        "text",
        {"web": 1},
        {"web": {}},
        {"web": {**corpus(A), "first_document": "a"}},
        {"web": {**corpus(A), "nats_per_token": []}},
    ],
)
def test_damaged_losses_of_corpora_are_one_line(tmp_path: Path, damage: Any) -> None:
    a, b = run(tmp_path / "a", A, val_by_source=damage), run(tmp_path / "b", B)
    assert refused(b, a) == "compare: val_by_source of a@762 is damaged; run it again"
