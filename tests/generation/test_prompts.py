"""Prompts: of every form from Python, from files and stdin, and of a conversation."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from helpers.small_models import random_model
from helpers.small_tokenizers import byte_level, sentence_piece
from helpers.speaking_models import BEGIN, CHAT_TEMPLATE, HEADER, HEADER_END, TURN_END, speaking_model, tokenizer
from llada_lightning.data.chat import Message
from llada_lightning.generation import prompts as prompt_sources
from llada_lightning.generation.prompts import (
    conversation_ids,
    fitting_ids,
    given_prompts,
    prompt_ids,
    read_prompts,
    with_gaps,
)
from llada_lightning.support.errors import UserError


@pytest.mark.parametrize("tokenizer", [byte_level, sentence_piece])
def test_a_gap_moves_no_space_into_the_text_behind_it(tokenizer: Any) -> None:
    """SentencePiece's tokenizers put a space before a text, and behind a gap no text begins."""
    with_mask = Tokenizer.from_str(tokenizer().to_str())
    with_mask.add_special_tokens(["[MASK]"])
    mask = with_mask.token_to_id("[MASK]")
    lm = random_model(vocab_size=400, tokenizer=with_mask, mask_token_id=mask)
    (ids,) = prompt_ids(lm, "the boats[MASK] home[MASK]", infill=True)
    home = lm.encode("came home")[-1]
    assert ids == [*lm.encode("the boats"), mask, home, mask]
    assert lm.decode([token for token in ids if token != mask]) == "the boats home"
    (word,) = prompt_ids(lm, "[MASK]me", infill=True)
    assert word == [mask, lm.encode("me")[-1]]


# --- from a command line ----------------------------------------------------------------------------------------------


def test_options_come_before_the_file_and_a_dash_is_stdin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "p.txt").write_text("three\r\n\nfour\u2028still four\n")
    monkeypatch.setattr("sys.stdin", io.StringIO("two\nlines\n"))
    assert given_prompts(["one", "-"], str(tmp_path / "p.txt")) == [
        "one",
        "two\nlines",
        "three",
        "four\u2028still four",
    ]


@pytest.mark.parametrize("kind", ["pipe", "file", "null"])
def test_what_is_piped_in_is_the_prompt_where_none_is_given(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "pipe":
        reading, writing = os.pipe()
        os.write(writing, b"piped\n")
        os.close(writing)
        stdin = os.fdopen(reading)
    else:
        (tmp_path / "in").write_text("piped\n")
        stdin = (tmp_path / "in" if kind == "file" else Path(os.devnull)).open()
    with stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        assert given_prompts(["one"], None) == ["one"]
        assert given_prompts([], None) == ([] if kind == "null" else ["piped"])


def test_a_jsonl_holds_texts_and_ids(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "a\\nb", "n": 1}\n\n{"prompt": [3, 4]}\n{"prompt": []}\n')
    assert read_prompts(str(tmp_path / "p.jsonl")) == ["a\nb", [3, 4], []]
    assert capsys.readouterr().err == f"note: prompts file '{tmp_path}/p.jsonl': not read: 'n' (1 row)\n"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("p.txt", None, "cannot be read"),
        ("p.txt", b"\n \n", "holds no prompt"),
        ("p.txt", b"\xff\xfe", "not UTF-8"),
        ("p.csv", b"a", "neither .txt nor .jsonl"),
        ("p.jsonl", b'{"prompt": "a"}\n{', "line 2 is not JSON"),
        ("p.jsonl", b'{"text": "a"}', "line 1: .* neither a text nor a list"),
        ("p.jsonl", b'{"prompt": [1, true]}', "neither a text nor a list"),
        ("p.jsonl", b"[1]", "neither a text nor a list"),
        ("p.jsonl", b"[" * 100_000 + b"]" * 100_000, "line 1 is nested too deeply"),
        ("p.jsonl", b'{"prompt": "a\0"}', "line 1 is not JSON"),
        ("p.jsonl", b'\n{"prompt": "a", "prompt": "b"}', "line 2: the key 'prompt' is given twice in line 2"),
        ("p.jsonl", b'{"prompt": "a", "system": "Be brief."}', "line 1: has 'system', which is not understood"),
        ("p.jsonl", b'{"prompt": "a", "input": "b"}', "line 1: has 'input'"),
        ("p\0.txt", None, "cannot be read: embedded null byte"),
    ],
)
def test_a_file_that_is_none_of_prompts(tmp_path: Path, name: str, content: bytes | None, words: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=words) as mistake:
        read_prompts(str(tmp_path / name))
    assert len(str(mistake.value).splitlines()) == 1


@pytest.mark.parametrize(("name", "content"), [("p.txt", "the sea\n"), ("p.jsonl", '{"prompt": "the sea"}\n')])
def test_a_byte_order_mark_is_no_part_of_a_prompt(
    name: str, content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8-sig")
    assert read_prompts(str(tmp_path / name)) == ["the sea"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\ufeffthe sea\n"))
    assert given_prompts(["-"], None) == ["the sea"]


def test_stdin_that_gives_no_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", None)
    assert given_prompts([], None) == []
    with pytest.raises(UserError, match="stdin is closed"):
        given_prompts(["-"], None)
    monkeypatch.setattr("sys.stdin", io.StringIO("four"))
    monkeypatch.setattr(prompt_sources, "MAX_TEXT_BYTES", 3)
    with pytest.raises(UserError, match="stdin has more than 3 characters"):
        given_prompts(["-"], None)
    with (tmp_path / "out").open("w") as file:  # opened for writing
        monkeypatch.setattr("sys.stdin", file)
        with pytest.raises(UserError, match="stdin cannot be read"):
            given_prompts(["-"], None)


def test_bytes_that_are_no_text() -> None:
    with pytest.raises(UserError, match="character 2 is not UTF-8"):
        given_prompts(["a\udcff"], None)


def test_gaps_are_so_many_mask_tokens() -> None:
    assert with_gaps("a[MASK:3]b[MASK]c<m>", "<m>") == "a<m><m><m>b<m>c<m>"
    assert with_gaps("[MASK:x] [mask:3]", "<m>") == "[MASK:x] [mask:3]"
    for gap in ("[MASK:0]", "[MASK:99999999999]"):
        with pytest.raises(UserError, match="give from 1"):
            with_gaps(gap, "<m>")


# --- of a conversation ------------------------------------------------------------------------------------------------

SPECIAL = [BEGIN, HEADER, HEADER_END, TURN_END, "[EOS]", "[MASK]"]
SPECIAL_IDS = [tokenizer().token_to_id(token) for token in SPECIAL]


def said(*contents: str) -> list[Message]:
    return [Message("user" if n % 2 == 0 else "assistant", text) for n, text in enumerate(contents)]


def test_ids_are_those_of_transformers(tmp_path: Path) -> None:
    tokenizer().save(str(tmp_path / "tokenizer.json"))
    reference = PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"), bos_token=BEGIN, eos_token="[EOS]", chat_template=CHAT_TEMPLATE
    )
    messages = [Message("system", "be\nbrief"), *said("one two? ", "诗 three\n", " four")]
    expected = reference.apply_chat_template(
        [vars(message) for message in messages], add_generation_prompt=True, return_dict=False
    )
    ids = conversation_ids(speaking_model(template=CHAT_TEMPLATE), messages)
    assert ids == expected
    assert ids.count(tokenizer().token_to_id(TURN_END)) == 4


pieces = st.sampled_from(
    [*SPECIAL, *(t[:3] for t in SPECIAL), *(t[2:] for t in SPECIAL), "a", " ", "\n", "<", "|", "\U000f0000"]
)


@settings(deadline=None)  # the first example starts the tokenizer's process
@given(st.lists(pieces, max_size=8).map("".join), st.lists(pieces, max_size=4).map("".join))
def test_nothing_that_is_said_becomes_a_special_token(question: str, answer: str) -> None:
    lm = speaking_model(template=CHAT_TEMPLATE)
    ids = conversation_ids(lm, said(question, answer, "x"))
    plain = conversation_ids(lm, said("a", "b", "x"))
    assert [i for i in ids if i in SPECIAL_IDS] == [i for i in plain if i in SPECIAL_IDS]
    text = tokenizer().decode(ids, skip_special_tokens=False)
    parts = [f"{HEADER}user{HEADER_END}\n\n{question.strip()}", f"{HEADER}assistant{HEADER_END}\n\n{answer.strip()}"]
    assert text.startswith(BEGIN + parts[0] + TURN_END + parts[1] + TURN_END)


def test_a_special_token_cannot_be_put_together_with_the_template() -> None:
    lm = speaking_model(template="<|eot_{{ messages[0].content }}|>")
    ids = conversation_ids(lm, said("id"))
    assert tokenizer().token_to_id(TURN_END) not in ids
    assert lm.decode(ids) == TURN_END


def test_a_tokenizer_that_reads_special_tokens_in_text_is_held_back() -> None:
    lm = speaking_model(template=CHAT_TEMPLATE)
    tokenizer().encode_special_tokens = False
    try:
        assert lm.encode(TURN_END) == [tokenizer().token_to_id(TURN_END)]
        ids = conversation_ids(lm, said(f"a{TURN_END}[MASK]b"))
    finally:
        tokenizer().encode_special_tokens = True
    assert ids.count(tokenizer().token_to_id(TURN_END)) == 1
    assert tokenizer().token_to_id("[MASK]") not in ids
    assert f"a{TURN_END}[MASK]b" in tokenizer().decode(ids, skip_special_tokens=False)


def test_without_a_template_a_conversation_is_plain_text() -> None:
    lm = speaking_model()
    assert conversation_ids(lm, said("one", "two [MASK]", "three")) == lm.encode("one\ntwo [MASK]\nthree\n")
    assert not set(conversation_ids(lm, said("[EOS][MASK]"))) & set(SPECIAL_IDS)


@pytest.mark.parametrize("template", [None, CHAT_TEMPLATE])
def test_the_oldest_turns_are_left_out_where_the_context_is_full(template: str | None) -> None:
    system = Message("system", "sys")
    messages = [system, *said(*(f"{n}" * 10 for n in range(9)))]
    whole = len(conversation_ids(speaking_model(template=template), messages))
    lm = speaking_model(template=template, context_length=whole * 2 // 3)
    ids, left_out = fitting_ids(lm, messages, 10)
    assert 0 < left_out < 4
    assert ids == conversation_ids(lm, [system, *messages[1 + 2 * left_out :]])
    one_more = conversation_ids(lm, [system, *messages[2 * left_out - 1 :]])
    assert len(ids) + 10 <= lm.context_length < len(one_more) + 10
    assert fitting_ids(lm, messages[:2], 10) == (conversation_ids(lm, messages[:2]), 0)
    assert fitting_ids(lm, messages, whole) == (conversation_ids(lm, [system, messages[-1]]), 4)


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('no system') }}",
        "{% for %}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ 'n: ' + (messages|length) }}",
        "{{ range(10**9) }}",
        "{{ 'a' * 10**10 }}",
    ],
)
def test_a_template_that_is_broken_refuses_or_is_after_more(template: str) -> None:
    with pytest.raises(UserError, match="chat template of 'a small model'") as mistake:
        conversation_ids(speaking_model(template=template), said("a"))
    assert len(str(mistake.value).splitlines()) == 1
