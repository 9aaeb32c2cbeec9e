"""Conversations as tokens: the template's special tokens, and nobody else's."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from helpers.speaking_models import BEGIN, CHAT_TEMPLATE, HEADER, HEADER_END, TURN_END, speaking_model, tokenizer
from llada_lightning.data.chat import Message
from llada_lightning.generation.prompts import conversation_ids, fitting_ids
from llada_lightning.support.errors import UserError

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
