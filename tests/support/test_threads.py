"""The number of threads that a user sets, and the share of the cores of one of several runs."""

from __future__ import annotations

import os

import pytest

from llada_lightning.support.threads import CORES, shared_among, threads_set, usable_cores


@pytest.fixture(autouse=True)
def six_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)), raising=False)


@pytest.mark.parametrize(
    ("environment", "threads"),
    [
        ({}, None),
        ({"OMP_NUM_THREADS": "3"}, 3),
        ({"MKL_NUM_THREADS": "2"}, 2),
        ({"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "2"}, 1),
        ({"OMP_NUM_THREADS": "4,2"}, 4),
        ({"OMP_NUM_THREADS": "", "MKL_NUM_THREADS": "5"}, 5),
        ({"OMP_NUM_THREADS": "0", "MKL_NUM_THREADS": "many"}, None),
    ],
)
def test_what_is_set_for_either_library_counts(environment: dict[str, str], threads: int | None) -> None:
    assert threads_set(environment) == threads


@pytest.mark.parametrize(("share", "cores"), [(None, 6), ("2", 2), ("99", 6), ("0", 6), ("x", 6)])
def test_the_cores_are_those_of_the_system_or_a_share_of_them(share: str | None, cores: int) -> None:
    assert usable_cores({} if share is None else {CORES: share}) == cores


def test_runs_at_once_share_the_cores() -> None:
    assert shared_among(4, {"A": "b"}) == {"A": "b", CORES: "1"}
    assert shared_among(1, {})[CORES] == "6"
    assert shared_among(2, {CORES: "4"})[CORES] == "2"
    assert shared_among(20, {})[CORES] == "1"


def test_both_libraries_get_the_number_that_is_set_for_one() -> None:
    given = shared_among(2, {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "2"})
    assert (given["OMP_NUM_THREADS"], given["MKL_NUM_THREADS"]) == ("1", "1")
    assert shared_among(2, {"MKL_NUM_THREADS": "2"})["OMP_NUM_THREADS"] == "2"
