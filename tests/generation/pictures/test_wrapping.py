"""Lines of a figure."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from llada_lightning.generation.pictures.dialogue import Mark
from llada_lightning.generation.pictures.wrapping import wrap


def lines(text: str, columns: int, step: int = 0) -> list[str]:
    return ["".join(run.text for run in line) for line in wrap([Mark(text, step)], columns)]


@given(st.lists(st.text("ab  诗\t", min_size=1, max_size=12), min_size=1, max_size=12), st.integers(4, 20))
def test_no_character_is_lost_and_no_line_too_wide(texts: list[str], columns: int) -> None:
    marks = [Mark(text, 1) for text in texts]
    wrapped = wrap(marks, columns)
    assert "".join(run.text for line in wrapped for run in line) == "".join(texts).replace("\t", "→   ")
    for line in wrapped:
        assert cell_len("".join(run.text for run in line).rstrip()) <= columns
        for run, following in pairwise(line):
            assert run.column + run.cells == following.column


def test_words_stay_whole_where_they_fit() -> None:
    assert lines("one two three", 9) == ["one two ", "three"]
    assert lines("abcdefghijkl", 5) == ["abcde", "fghij", "kl"]


def test_a_word_of_several_tokens_is_not_torn() -> None:
    marks = [Mark("one", 1), Mark(" inter", 2), Mark("national", 3)]
    assert [[run.text for run in line] for line in wrap(marks, 14)] == [["one", " "], ["inter", "national"]]
    assert [run.mark.step for line in wrap(marks, 14) for run in line] == [1, 2, 2, 3]


def test_a_new_line_that_was_written_is_seen_and_one_that_was_given_is_not() -> None:
    assert lines("a\n\nb", 9, step=1) == ["a↵", "↵", "b"]
    assert lines("a\n\nb", 9) == ["a", "", "b"]


def test_equal_tokens_beside_each_other_stay_apart() -> None:
    assert [run.text for run in wrap([Mark("a", 1), Mark("a", 1)], 9)[0]] == ["a", "a"]
