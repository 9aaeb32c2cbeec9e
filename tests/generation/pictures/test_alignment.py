"""Tokens and the text that they are."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from helpers.speaking_models import tokenizer
from llada_lightning.generation.pictures.alignment import MASKED, Aligner
from llada_lightning.support.printing import visible


def encoded(text: str) -> list[int]:
    return tokenizer().encode(text, add_special_tokens=False).ids


@given(st.text(alphabet=st.characters(exclude_characters="\N{REPLACEMENT CHARACTER}", exclude_categories=["Cs"])))
def test_pieces_join_to_the_text_and_hold_each_token_once(text: str) -> None:
    ids = encoded(text)
    pieces = Aligner(tokenizer()).pieces(ids)
    assert "".join(piece.text for piece in pieces) == text
    assert [place for piece in pieces for place in range(piece.begin, piece.end)] == list(range(len(ids)))


@given(st.lists(st.integers(MASKED, 310), max_size=40))
def test_any_tokens_at_all_have_pieces_without_replacement_characters(ids: list[int]) -> None:
    pieces = Aligner(tokenizer()).pieces(ids)
    assert [place for piece in pieces for place in range(piece.begin, piece.end)] == list(range(len(ids)))
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(piece.text for piece in pieces)
    assert [ids[piece.begin] for piece in pieces if piece.kind == "masked"] == [MASKED] * ids.count(MASKED)


@pytest.mark.parametrize(("character", "tokens"), [("诗", 3), ("😀", 4), ("é", 2), ("x", 1)])
def test_a_character_of_several_tokens_is_one_piece(character: str, tokens: int) -> None:
    ids = encoded(character)
    assert len(ids) == tokens
    (piece,) = Aligner(tokenizer()).pieces(ids)
    assert (piece.text, piece.begin, piece.end, piece.kind) == (character, 0, tokens, "text")


def test_bytes_that_are_no_character_are_shown_as_ids() -> None:
    first, second, third = encoded("诗")
    pieces = Aligner(tokenizer()).pieces([second, first, MASKED, first, second, *encoded("a")])
    assert [piece.text for piece in pieces] == [f"⟨{second}⟩", f"⟨{first}⟩", "", f"⟨{first}⟩", f"⟨{second}⟩", "a"]
    assert [piece.kind for piece in pieces] == ["broken", "broken", "masked", "broken", "broken", "text"]
    assert third not in (first, second)


def test_special_tokens_go_by_their_names_and_unknown_ids_by_their_numbers() -> None:
    pieces = Aligner(tokenizer()).pieces([tokenizer().token_to_id("[EOS]"), 100_000])
    assert [(piece.text, piece.kind) for piece in pieces] == [("[EOS]", "special"), ("⟨100000⟩", "broken")]


def test_without_a_tokenizer_tokens_are_their_ids() -> None:
    assert [piece.text for piece in Aligner(None).pieces([7, MASKED, 12])] == ["7 ", "", "12 "]


def test_a_word_keeps_the_space_before_it_where_a_tokenizer_drops_that_of_the_first() -> None:
    words = Tokenizer(models.WordLevel({"a": 0, "▁a": 1, "▁cat": 2, "▁sat": 3}, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.Metaspace()
    words.decoder = decoders.Metaspace()
    assert words.decode([2, 3]) == "cat sat"
    assert [piece.text for piece in Aligner(words).pieces([2, 3])] == [" cat", " sat"]


def test_what_would_act_on_a_terminal_is_seen_instead() -> None:
    assert visible("a\x1b[31m\r\x00\x7f\x9b\u202eb\n\tc") == "a␛[31m␍␀␡··b\n\tc"
    assert visible("Füße 诗 😀") == "Füße 诗 😀"
