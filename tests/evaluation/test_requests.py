"""Texts as requests: where a prompt and its continuation are parted, whatever the tokenizer does at the join."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
from tokenizers import Tokenizer, models

from helpers.small_models import random_model
from helpers.small_tokenizers import byte_level, sentence_piece
from llada_lightning.checkpoints.language_model import LanguageModel
from llada_lightning.evaluation.likelihood import log_likelihood
from llada_lightning.evaluation.requests import encode_pair, encode_text
from llada_lightning.support.errors import UserError


@cache
def lm_with(tokenizer: Any, objective: str = "llada") -> LanguageModel:
    return random_model(objective, vocab_size=400, tokenizer=tokenizer())


@pytest.mark.parametrize("tokenizer", [byte_level, sentence_piece])
@pytest.mark.parametrize(
    ("prompt", "continuation"),
    [
        ("the boats came ho", "me"),  # ` home` is one token
        ("the boats came ho", "use"),
        ("the boats came ho", "meward"),
        ("the boats came", " home"),
        ("the boats came ", "home"),
        ("Answer:", " Oslo"),
        ("Answer:\n", "Oslo"),
        ("Answer", ": Oslo"),
        ("", "home"),
        ("", " home"),
    ],
)
def test_both_parts_spell_their_texts(tokenizer: Any, prompt: str, continuation: str) -> None:
    lm = lm_with(tokenizer)
    head, tail = encode_pair(lm, prompt, continuation, "it")
    assert tail and lm.decode([*head, *tail]) == lm.decode(lm.encode(prompt + continuation))
    assert head == lm.encode(prompt.rstrip())
    if lm.encode(prompt + continuation)[: len(head)] == head:
        assert [*head, *tail] == lm.encode(prompt + continuation)


def test_a_token_that_spans_the_join_is_parted() -> None:
    lm = lm_with(byte_level)
    assert len(lm.encode(" home")) == 1
    for continuation in ("me", "use", "meward"):
        assert encode_pair(lm, "the boats came ho", continuation, "it")[1] == lm.encode(continuation)
    # Behind ids no text is known; SentencePiece's space is left out there, too.
    pieces = lm_with(sentence_piece)
    assert encode_pair(pieces, [5], " home", "it")[1] == encode_pair(pieces, "came", " home", "it")[1]
    assert pieces.encode(" home") != encode_pair(pieces, [5], " home", "it")[1]


@pytest.mark.parametrize("objective", ["arm", "llada"])
def test_no_continuation_is_certain_because_it_has_no_token(objective: str) -> None:
    lm = lm_with(byte_level, objective)
    pairs = [encode_pair(lm, "the boats came ho", text, "it") for text in ("me", "use", "meward")]
    scores = log_likelihood(lm, pairs, 8)
    assert all(score.mean < -1 and score.method != "empty" for score in scores)
    assert [score.tokens for score in scores] == [len(lm.encode(text)) for text in ("me", "use", "meward")]


def test_what_is_empty_is_refused_by_name() -> None:
    lm = lm_with(byte_level)
    for prompt, continuation in (("a", ""), ("a ", ""), ([1], []), ("", "")):
        with pytest.raises(UserError, match="question 3: the continuation is empty"):
            encode_pair(lm, prompt, continuation, "question 3")
    bare = replace(lm, tokenizer=Tokenizer(models.BPE(vocab={"a": 0}, merges=[])))
    with pytest.raises(UserError, match="text 1: the tokenizer has no token for 'bbb'"):
        encode_text(bare, "bbb", "text 1")
    assert encode_text(bare, "aba", "text 1") == [0, 0] and encode_text(bare, "\n", "text 1") == []
