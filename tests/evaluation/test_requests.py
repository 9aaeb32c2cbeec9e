"""What is scored: where a prompt and its continuation are parted, and the file of `llada score --pairs`."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models

from helpers.small_models import random_model
from helpers.small_tokenizers import byte_level, letters, sentence_piece, written
from llada_lightning.checkpoints.language_model import LanguageModel
from llada_lightning.evaluation.likelihood import log_likelihood
from llada_lightning.evaluation.requests import encode_pair, encode_text, read_pairs
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


# --- the file of pairs ------------------------------------------------------------------------------------------------

LM = replace(random_model(), tokenizer=letters())


def test_texts_and_ids_say_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(
        tmp_path, {"prompt": "ab", "continuation": "cd"}, "", {"prompt": [0, 1], "continuation": [2, 3], "more": 1}
    )
    first, second = read_pairs(path, LM)
    assert capsys.readouterr().err == f"note: {path}: not read: 'more' (1 row)\n"
    assert first == second
    assert (first.prompt, first.continuations, first.is_choice) == ([0, 1], [[2, 3]], False)
    assert first.written_bytes == first.scored_bytes == [2]


def test_choices_with_and_without_an_answer(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        {"prompt": "ab ", "choices": ["c", "dd"], "answer": 1},
        {"prompt": "ab", "choices": [" c", " dd"]},
    )
    first, second = read_pairs(path, LM)
    assert first.is_choice and (first.answer, second.answer) == (1, None)
    assert first.prompt == second.prompt == [0, 1]
    assert first.continuations == second.continuations == [[26, 2], [26, 3, 3]]
    assert first.written_bytes == [1, 2]
    assert second.written_bytes == second.scored_bytes == first.scored_bytes == [2, 3]  # the same ids, the same bytes


@pytest.mark.parametrize(
    ("prompt", "continuation", "moved"),
    [("a  ", "b", "  "), ("a\n", " b", "\n"), ("a", "b ", ""), ("  ", "b", "  "), ("", "b", "")],
)
def test_white_space_moves_to_the_continuation(prompt: str, continuation: str, moved: str) -> None:
    spoken = replace(LM, tokenizer=_Spelling())
    kept = prompt.removesuffix(moved)
    assert encode_pair(spoken, prompt, continuation, "it") == (
        list(map(ord, kept)),
        list(map(ord, moved + continuation)),
    )
    assert encode_pair(spoken, [1, 2], "b", "it") == ([1, 2], [98])


class _Spelling:
    """A tokenizer whose ids are code points."""

    def encode(self, text: str, add_special_tokens: bool) -> Any:
        return type("Encoding", (), {"ids": list(map(ord, text))})

    def to_str(self) -> str:
        return letters().to_str()  # of a kind that works in this process


def test_ids_need_no_tokenizer(tmp_path: Path) -> None:
    path = written(tmp_path, {"prompt": [1], "continuation": [2]})
    pair = read_pairs(path, random_model())[0]
    assert pair.written_bytes is pair.scored_bytes is None
    with pytest.raises(UserError, match="has no tokenizer"):
        read_pairs(written(tmp_path, {"prompt": "a", "continuation": "b"}), random_model())


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([{"prompt": "a", "continuation": "b"}, "{'prompt'"], r"pairs.jsonl:2 is not JSON"),
        (["[1]"], ":1: holds list, not a JSON object"),
        ([{"prompt": "a"}], ":1: has 'prompt'; a line has 'prompt' and either"),
        ([{"continuation": "a"}], ":1: has 'continuation'"),
        ([{"prompt": "a", "continuation": "b", "choices": ["c"]}], "either 'continuation' or 'choices'"),
        ([{"prompt": "a", "choices": []}], r":1: 'choices' is '\[\]'"),
        ([{"prompt": "a", "choices": "bc"}], "'choices' is 'bc'"),
        ([{"prompt": "a", "choices": ["b"], "answer": 1}], "'answer' is 1; give the index of a choice, 0 to 0"),
        ([{"prompt": "a", "choices": ["b"], "answer": "b"}], "'answer' is 'b'"),
        ([{"prompt": "a", "choices": ["b", "c"], "answer": True}], "'answer' is True"),
        ([{"prompt": 3, "continuation": "b"}], "'3' is neither a text nor a list of token ids"),
        ([{"prompt": [True], "continuation": "b"}], "neither a text nor"),
        ([{"prompt": "a", "continuation": "b"}, {"prompt": "a", "choices": ["b"]}], ":2: choices and continuations in"),
        ([{"prompt": "a", "continuation": [39]}], r":1: continuation: token 0 is \[MASK\]"),
        ([{"prompt": "a" * 48, "continuation": "b"}], ":1: a prompt of 48 .* context of 48"),
        ([{"prompt": "a ", "choices": ["b", [1]]}], "choices of both texts and ids"),
        ([{"prompt": "a", "continuation": [10**30]}], ":1: id 10+ is outside of the vocabulary of 40"),
        ([{"prompt": [-1], "continuation": "a"}], ":1: 'prompt': id -1 is outside"),
        ([{"prompt": "a", "continuation": ""}], ":1: the continuation is empty"),
        ([{"prompt": "a ", "continuation": []}], ":1: the continuation is empty"),
        ([{"prompt": "a", "choices": ["b", ""]}], ":1, choice 1: the continuation is empty"),
        ([{"prompt": "a", "continuation": "!"}], ":1: the tokenizer has no token for '!' there"),
        ([{"prompt": "a", "continuation": "b", "answer": 0}], ":1: has 'answer' beside 'continuation'"),
        ([{"prompt": "a", "continuation": "b", "system": "c"}], ":1: has 'system', which is not understood"),
        ([{"prompt": "a", "choices": ["b"], "context": "c"}], ":1: has 'context'"),
        (['{"prompt": "a", "prompt": "b", "continuation": "c"}'], ":1: the key 'prompt' is given twice in line 1"),
        (["", "[" * 100_000 + "]" * 100_000], ":2 is nested too deeply"),
        (["", ""], "holds no line"),
        (["", r'{"prompt": "a", "continuation": "b\ud800"}'], r":2: 'b\\ud800' holds half of a surrogate pair"),
        ([r'{"prompt": "\udc01", "continuation": "b"}'], ":1: 'prompt': .* surrogate"),
        ([r'{"prompt": "a", "choices": ["b", "\ud83d"]}'], ":1: .* surrogate"),
    ],
)
def test_mistakes_name_the_line(tmp_path: Path, lines: list[Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as told:
        read_pairs(written(tmp_path, *lines), LM)
    assert "\n" not in str(told.value)


def test_a_long_prompt_passes_when_it_is_to_be_cut(tmp_path: Path) -> None:
    path = written(tmp_path, {"prompt": "a" * 60, "continuation": "b"})
    pair = read_pairs(path, LM, "left")[0]
    assert (len(pair.prompt), pair.truncated) == (47, 13)


def test_a_prompt_is_cut_for_the_longest_choice_behind_what_the_tokenizer_puts_first(tmp_path: Path) -> None:
    path = written(tmp_path, {"prompt": "ab" * 30, "choices": ["c", "ddd"]})
    pair = read_pairs(path, replace(LM, text_prefix_ids=(31, 32)), "left")[0]
    assert pair.prompt == [31, 32, *[1, 0] * 21, 1] and pair.truncated == 17
    with pytest.raises(UserError, match=r"a prompt of 3 and a continuation of 47 tokens .*; shorten it"):
        read_pairs(
            written(tmp_path, {"prompt": "a", "continuation": "b" * 47}), replace(LM, text_prefix_ids=(31, 32)), "left"
        )


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        read_pairs(tmp_path / "none.jsonl", LM)
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "\xe9"}')
    with pytest.raises(UserError, match="not UTF-8"):
        read_pairs(tmp_path / "latin.jsonl", LM)
