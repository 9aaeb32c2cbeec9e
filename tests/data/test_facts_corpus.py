"""Invented facts: the same by seed, each in one order only."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llada_lightning.data.corpora import open_corpus
from llada_lightning.data.facts_corpus import END, JOINER, MOST, facts_source
from llada_lightning.support.errors import UserError


@given(st.integers(1, MOST), st.integers(0, 2**40))
def test_each_fact_is_stated_in_one_order_only(count: int, seed: int) -> None:
    source = facts_source(f"facts:{count}@{seed}")
    pairs = source.pairs()
    assert len({pair.first for pair in pairs}) == len({pair.second for pair in pairs}) == len(pairs) == count
    text = "\n".join(source.documents())
    for pair in pairs[:5]:
        assert text.count(f"{pair.first}{JOINER}{pair.second}{END}") == 6
        assert f"{pair.second}{JOINER}{pair.first}" not in text
    firsts = [pair.first.startswith("the ") for pair in pairs]
    assert sum(firsts) == count // 2, "both forms of a sentence must be familiar"


def test_the_corpus_is_known_by_count_and_seed() -> None:
    assert list(open_corpus("facts:7@3").documents()) == list(open_corpus("facts:7@3").documents())
    digests = {open_corpus(f"facts:{spec}").identity["digest"] for spec in ("7@3", "7@4", "8@3", "7")}
    assert len(digests) == 4


@pytest.mark.parametrize("spec", ["facts:0", "facts:x", "facts:100000", "facts:3@"])
def test_a_count_that_cannot_be_is_refused(spec: str) -> None:
    with pytest.raises(UserError, match="with a count of 1 to"):
        open_corpus(spec)
