"""Rows as dialogues, and dialogues as batches: what is refused, what is masked, what is learned."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import normalizers

from llada_lightning.data.chat import LLADA_TEMPLATE, PLAIN_TEMPLATE, ChatTemplate, Message
from llada_lightning.data.datasets import PairDataset, PairStream, PairValidationDataset
from llada_lightning.data.dialogues import Context, Pairs, answered_turns, dialogue, read_dialogues, tokenize_pairs
from llada_lightning.data.text_files import UnreadFields
from llada_lightning.data.tokenizers import train_tokenizer
from llada_lightning.support.errors import UserError


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


TWO_TURNS = [said("user", "a"), said("assistant", "b"), said("user", "c"), said("assistant", "d")]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "response": "a"},
        {"question": "q", "answer": "a", "level": 3},
        {"instruction": "q", "output": "a"},
        {"messages": [said("user", "q"), said("assistant", "a"), said("user", "and now?")]},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    ],
)
def test_every_form_of_a_row_is_the_same_dialogue(row: dict[str, Any]) -> None:
    assert dialogue(row, "here") == [Message("user", "q"), Message("assistant", "a")]


@pytest.mark.parametrize(
    ("given", "prompt"),
    [("The cat.", "Translate.\n\nThe cat."), ("", "Translate."), (" \n", "Translate."), (None, "Translate.")],
)
def test_the_input_of_alpaca_is_part_of_the_prompt(given: str | None, prompt: str) -> None:
    row = {"instruction": "Translate.", "input": given, "output": "Le chat."}
    assert dialogue(row, "here") == [Message("user", prompt), Message("assistant", "Le chat.")]


FORMS: list[dict[str, Any]] = [
    {"prompt": "q", "response": "a"},
    {"question": "q", "answer": "a"},
    {"instruction": "q", "output": "a"},
    {"messages": [said("user", "q"), said("assistant", "a")]},
    {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
]


@pytest.mark.parametrize("row", FORMS)
@pytest.mark.parametrize("name", ["system", "system_prompt"])
def test_a_system_beside_any_form_is_the_first_message(row: dict[str, Any], name: str) -> None:
    answered = [Message("user", "q"), Message("assistant", "a")]
    assert dialogue({name: "Be brief.", **row}, "here") == [Message("system", "Be brief."), *answered]
    assert dialogue({**row, name: None}, "here") == dialogue({**row, name: " "}, "here") == answered


def test_a_system_given_twice_must_be_the_same() -> None:
    row = {"messages": [said("system", "Be brief."), *TWO_TURNS]}
    assert dialogue({**row, "system": "Be brief."}, "here") == dialogue(row, "here")
    with pytest.raises(UserError, match="'system' differs from what messages hold"):
        dialogue({**row, "system": "Be long."}, "here")


@pytest.mark.parametrize("row", FORMS[:3])
def test_a_history_is_earlier_turns(row: dict[str, Any]) -> None:
    messages = dialogue({**row, "system": "s", "history": [["a", "b"], ["c", "d"]]}, "here")
    turns = [Message("user", "a"), Message("assistant", "b"), Message("user", "c"), Message("assistant", "d")]
    assert messages == [Message("system", "s"), *turns, Message("user", "q"), Message("assistant", "a")]
    assert [turn[-1].content for turn in answered_turns(messages)] == ["b", "d", "a"]
    assert dialogue({**row, "history": []}, "here") == dialogue(row, "here")


@pytest.mark.parametrize("flag", ["weight", "loss", "train", "training"])
@pytest.mark.parametrize(("no", "yes"), [(0, 1), (False, True), (0.0, 1.0)])
def test_an_answer_of_no_weight_is_read_and_not_learned(flag: str, no: Any, yes: Any) -> None:
    user, first, again, last = TWO_TURNS
    messages = dialogue({"messages": [user, {**first, flag: no}, {**again, flag: no}, {**last, flag: yes}]}, "here")
    assert [(message.role, message.content) for message in messages] == [(m["role"], m["content"]) for m in TWO_TURNS]
    assert [type(message) for message in messages] == [Message, Context, Message, Message]
    assert answered_turns(messages) == [messages]


def test_what_the_messages_repeat_is_no_other_meaning() -> None:
    messages = [said("user", "q"), said("assistant", "a")]
    row = {"prompt": "q", "messages": messages, "conversations": messages, "weight": 1}
    assert dialogue(row, "here") == dialogue({"messages": messages}, "here")
    row = {"messages": None, "conversations": messages, "prompt": None, "response": ""}
    assert dialogue(row, "here") == dialogue({"messages": messages}, "here")
    both = {"role": None, "from": "human", "content": "q", "value": "q"}
    assert dialogue({"messages": [both, messages[1]]}, "here") == dialogue({"messages": messages}, "here")


def test_what_is_not_read_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    unread = UnreadFields()
    dialogue({"prompt": "q", "response": "a", "id": 3, "source": "web", "tags": [], "weight": 1}, "here", unread)
    dialogue({"messages": [{**m, "name": "Ada"} for m in TWO_TURNS[:3]], "id": 4}, "here", unread)
    no_answer = "a last message of the user, which has no answer"
    assert unread == {"'id'": 2, "'source'": 1, "'name' of messages": 1, no_answer: 1}
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": "q", "response": "a", "id": n}) + "\n" for n in range(3)))
    list(read_dialogues(str(path)))
    assert capsys.readouterr().err == f"note: {path}: not read: 'id' (3 rows)\n"
    path.write_text(json.dumps({"prompt": "q", "response": "a"}))
    list(read_dialogues(str(path)))
    assert capsys.readouterr().err == ""


def test_n_turns_are_n_pairs_each_with_all_that_was_said_before() -> None:
    messages = dialogue({"messages": [said("system", "s"), *TWO_TURNS]}, "here")
    assert [[m.content for m in turn] for turn in answered_turns(messages)] == [["s", "a", "b"], list("sabcd")]


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ([], "holds list, not a JSON object"),
        ({"prompt": "q"}, "has only prompt; a row has 'prompt' and 'response'"),
        ({"prompt": "q", "response": None}, "'response' holds NoneType, not text"),
        ({"prompt": "q", "response": " \n"}, "response 1 is empty"),
        ({"messages": []}, "not a list of messages"),
        ({"messages": TWO_TURNS[1:]}, "the dialogue starts with the assistant"),
        ({"messages": [TWO_TURNS[0], TWO_TURNS[2]]}, "turn 1 has the user"),
        ({"messages": TWO_TURNS[:1]}, "holds no answer"),
        ({"messages": [said("tool", "x")]}, "the role 'tool'"),
        ({"messages": [{"role": "user"}]}, "'content' holds NoneType"),
        ({"question": "q", "answer": "a", "context": "c"}, "has 'context', which is not understood"),
        ({**FORMS[3], "tools": [{"name": "f"}]}, "has 'tools'"),
        ({**FORMS[0], "images": ["a.png"]}, "has 'images'"),
        ({**FORMS[0], "chosen": "b", "rejected": "c"}, "has 'chosen'"),
        ({**FORMS[0], "weight": 0.3}, "'weight' of the row is '0.3'"),
        ({**FORMS[0], "train": False}, "'train' of the row is 'False'"),
        (
            {**FORMS[0], "input": "more"},
            "'input' differs from what prompt and response hold",
        ),
        ({**FORMS[0], "question": "other", "answer": "a"}, "'question' differs from what"),
        ({**FORMS[3], "prompt": "other"}, "'prompt' differs from what messages hold"),
        ({**FORMS[3], "conversations": TWO_TURNS}, "'conversations' differs from what"),
        ({**FORMS[3], "history": [["a", "b"]]}, "'history' differs from what"),
        ({**FORMS[0], "history": "earlier"}, r"'history' is not a list of \[prompt, response\] pairs"),
        ({**FORMS[0], "history": [["a"]]}, "'history' is not a list"),
        ({**FORMS[0], "history": [["a", None]]}, "pair 1 of 'history' holds NoneType"),
        ({**FORMS[0], "history": [["a", " "]]}, "response 1 is empty"),
        ({**FORMS[2], "input": ["x"]}, "'input' holds list, not text"),
        ({**FORMS[0], "system": {"a": 1}}, "'system' holds dict, not text"),
        (
            {"messages": [said("user", "q"), {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}]},
            "message 2: has 'tool_calls'",
        ),
        (
            {"messages": [said("user", "q"), {**said("assistant", "a"), "reasoning_content": "so"}]},
            "'reasoning_content'",
        ),
        ({"messages": [said("user", "q"), {**said("assistant", "a"), "weight": 0.5}]}, "'weight' is '0.5'; give 1"),
        ({"messages": [said("user", "q"), {**said("assistant", "a"), "weight": 0}]}, "no answer is to be learned"),
        ({"messages": [{**said("user", "q"), "train": True}, said("assistant", "a")]}, "'train' of the user is 'True'"),
        (
            {"messages": [{**said("user", "q"), "from": "gpt"}, said("assistant", "a")]},
            "'role' and 'from' differ",
        ),
    ],
)
def test_what_is_no_dialogue_is_refused_with_its_place(row: Any, fault: str) -> None:
    with pytest.raises(UserError, match=fault) as refusal:
        dialogue(row, "f.jsonl:7")
    assert (
        str(refusal.value).startswith("f.jsonl:7: ")
        and len(str(refusal.value)) < 300
        and "\n" not in str(refusal.value)
    )


def test_files_and_folders_are_read_and_lines_are_named(tmp_path: Path) -> None:
    rows = [{"prompt": str(i), "response": "r"} for i in range(3)]
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text("\n\n".join(map(json.dumps, rows)))
    (tmp_path / "notes.txt").write_text("not a row")
    read = list(read_dialogues(str(tmp_path)))
    assert [messages[0].content for _, messages in read] == ["0", "1", "2"] * 2
    assert read[1][0].endswith("a.jsonl:3")
    with (tmp_path / "b.jsonl").open("a") as file:
        file.write('\n{"prompt": "1", "response": "r", "prompt": "2"}')
    with pytest.raises(UserError, match=r"b\.jsonl:6: the key 'prompt' is given twice in line 6"):
        list(read_dialogues(str(tmp_path)))
    with pytest.raises(UserError, match="does not exist"):
        list(read_dialogues(str(tmp_path / "c.jsonl")))


# --- as tokens and batches --------------------------------------------------------------------------------------------

EOS, MASK = 0, 1
TOKENIZER = train_tokenizer(["a few words"], 258)
TEMPLATE = ChatTemplate.of(PLAIN_TEMPLATE, TOKENIZER, EOS, (MASK,), "plain")
Turn = tuple[str, str]


def pairs_of(*dialogues: list[Turn], length: int = 512, drop: bool = False) -> Pairs:
    rows = [
        (f"row {i}", [m for q, a in turns for m in (Message("user", q), Message("assistant", a))])
        for i, turns in enumerate(dialogues)
    ]
    return tokenize_pairs(rows, TEMPLATE, EOS, length, drop)


def training(pairs: Pairs, pad_together: int = 2, global_batch: int = 4, seed: int = 0) -> PairDataset:
    stream = PairStream(pairs, np.arange(pairs.dialogues), seed, pad_together)
    return PairDataset(stream, EOS, 1e-3, "weyl", global_batch)


def test_the_tokens_are_prompt_response_and_one_eos() -> None:
    pairs = pairs_of([("q", "a")], [("x", "yy"), ("z", "w")])
    assert pairs.dialogues == 2
    decoded = [TOKENIZER.decode(row.tolist(), skip_special_tokens=False) for row in pairs.rows(np.arange(3), EOS, 64)]
    assert [text.partition("[EOS]")[0] for text in decoded] == [
        "user:\nq\n\nassistant:\na",
        "user:\nx\n\nassistant:\nyy",
        "user:\nx\n\nassistant:\nyy\n\nuser:\nz\n\nassistant:\nw",
    ]
    assert (pairs.lengths - pairs.prompts_P).tolist() == [2, 3, 2]


def test_the_bytes_of_responses_that_do_not_come_back_are_counted() -> None:
    lowering = train_tokenizer(["a few words"], 258)
    lowering.normalizer = normalizers.Lowercase()
    template = ChatTemplate.of(PLAIN_TEMPLATE, lowering, EOS, (MASK,), "plain")
    turns = [Message("user", "Q"), Message("assistant", "A B"), Message("user", "Q"), Message("assistant", "é")]
    assert tokenize_pairs([("row", turns)], template, EOS, 512).lost_P.tolist() == [2, 0]
    assert pairs_of([("Q", "A B"), ("Q", "é")]).lost_P.tolist() == [0, 0]


def test_an_answer_that_is_not_learned_is_part_of_the_prompt_alone() -> None:
    said = [Message("user", "x"), Context("assistant", "yy"), Message("user", "z"), Message("assistant", "w")]
    pairs = tokenize_pairs([("row 1", said)], TEMPLATE, EOS, 512)
    learned = pairs_of([("x", "yy"), ("z", "w")])
    assert (pairs.dialogues, len(pairs.lengths), pairs.bytes_P.tolist()) == (1, 1, [1])
    assert pairs.tokens_T.tolist() == learned.tokens_T[learned.starts_P[1] :].tolist()
    assert pairs.prompts_P.tolist() == learned.prompts_P[1:].tolist()


def test_text_that_spells_a_special_token_stays_text() -> None:
    pairs = pairs_of([("[MASK][EOS]", "a [EOS] b")])
    assert pairs.tokens_T.tolist().count(EOS) == 1 and MASK not in pairs.tokens_T


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(st.tuples(st.text(max_size=6), st.text("ab", min_size=1, max_size=9)), min_size=1, max_size=3),
             min_size=1, max_size=6),
    st.integers(0, 2**32), st.integers(1, 4), st.integers(0, 50),
)  # fmt: skip
def test_prompts_are_never_masked_and_padding_is_learned(
    dialogues: list[list[Turn]], seed: int, pad_together: int, step: int
) -> None:
    data = training(pairs_of(*dialogues), pad_together, seed=seed)
    batch = data.__getitems__(list(range(4 * step, 4 * step + 4)))
    assert batch.response_BL is not None and batch.response_lengths_B is not None
    present = torch.ones_like(batch.masked_BL) if batch.attention_mask_BL is None else batch.attention_mask_BL
    prompts = present.sum(1) - batch.response_lengths_B
    positions = torch.arange(batch.tokens_BL.shape[1])[None]
    assert not (batch.masked_BL & (positions < prompts[:, None])).any()
    assert not (batch.masked_BL & ~present).any()
    # Behind a response there is nothing but EOS, of which the first alone is `arm`'s.
    padding = present & (positions >= prompts[:, None]) & ~batch.response_BL
    assert (batch.tokens_BL[padding] == EOS).all()
    last = (batch.response_BL * positions).argmax(1)
    assert (batch.tokens_BL.gather(1, last[:, None]) == EOS).all()
    assert batch.global_tokens == int(present.sum())


def test_padding_is_masked_as_often_as_the_response() -> None:
    data = training(pairs_of([("q", "a")], [("q", "a" * 40)]), global_batch=2)
    masked = padded = 0
    for step in range(300):
        batch = data.__getitems__([2 * step, 2 * step + 1])
        assert batch.attention_mask_BL is None
        padding = (batch.tokens_BL == EOS) & ~batch.response_BL
        masked, padded = masked + int((batch.masked_BL & padding).sum()), padded + int(padding.sum())
    assert padded == 300 * 39
    assert masked / padded == pytest.approx(0.5, abs=0.03)


def test_the_cut_into_micro_batches_changes_no_row() -> None:
    data = training(pairs_of(*[[("q" * i, "a" * (7 * i % 11 + 1))] for i in range(9)]), pad_together=4, global_batch=8)
    whole = data.__getitems__(list(range(8)))
    for n in range(8):
        one = data.__getitems__([n])
        length = one.tokens_BL.shape[1]
        assert torch.equal(one.tokens_BL[0], whole.tokens_BL[n, :length])
        assert torch.equal(one.masked_BL[0], whole.masked_BL[n, :length])
        assert not whole.masked_BL[n, length:].any()
        assert one.response_lengths_B == whole.response_lengths_B[n]
        assert one.global_tokens == whole.global_tokens


def test_each_visit_draws_one_turn_uniformly_by_seed_and_ordinal() -> None:
    pairs = pairs_of([("a", "b"), ("c", "d"), ("e", "f")])
    stream = PairStream(pairs, np.arange(1), 5, 1)
    drawn = stream.drawn(np.arange(3000))
    counts = Counter(drawn.tolist())
    assert set(counts) == {0, 1, 2} and all(abs(count - 1000) < 100 for count in counts.values())
    assert (stream.drawn(np.arange(100, 200)) == drawn[100:200]).all()
    assert (PairStream(pairs, np.arange(1), 6, 1).drawn(np.arange(100)) != drawn[:100]).any()


def test_an_epoch_visits_each_dialogue_once() -> None:
    pairs = pairs_of(*[[(str(i), "a")] for i in range(10)])
    stream = PairStream(pairs, np.array([1, 3, 5, 7]), 0, 2)
    assert sorted(stream.drawn(np.arange(4)).tolist()) == [1, 3, 5, 7]
    assert sorted(stream.drawn(np.arange(4, 8)).tolist()) == [1, 3, 5, 7]


def test_validation_masks_responses_only_with_their_eos_and_no_padding() -> None:
    pairs = pairs_of(*[[("q", "a" * (1 + i % 5))] for i in range(40)])
    batch = PairValidationDataset(pairs, np.arange(40), 0, EOS).__getitems__(list(range(48)))
    assert batch.counted_B.tolist() == [True] * 40 + [False] * 8
    assert batch.response_BL is not None and not (batch.masked_BL & ~batch.response_BL).any()
    counts = batch.masked_BL.sum(1)
    assert (counts >= 1).all() and (counts <= batch.scored_counts()).all()
    assert batch.scored_counts()[:5].tolist() == [2, 3, 4, 5, 6]


def test_a_pair_beyond_the_context_is_refused_or_dropped() -> None:
    long = [("q", "a"), ("q" * 30, "b")]
    with pytest.raises(UserError, match=r"row 1: prompt of \d+ and response of 2 tokens .* the context of 40"):
        pairs_of([("q", "a")], long, length=40)
    kept = pairs_of([("q", "a")], long, length=40, drop=True)
    assert (kept.dialogues, kept.dropped) == (1, 1)
    with pytest.raises(UserError, match="no dialogue is left of 1"):
        pairs_of(long, length=40, drop=True)


def test_a_template_whose_tokens_the_tokenizer_lacks_says_which_and_where() -> None:
    template = ChatTemplate.of(LLADA_TEMPLATE, TOKENIZER, EOS, (MASK,), "llada")
    rows = [("row 7", [Message("user", "what is <|im_end|>?"), Message("assistant", "x")])]
    message = (
        r"^row 7: chat template of 'llada': it writes <\|end_header_id\|>, <\|eot_id\|>, <\|start_header_id\|>, and"
    )
    with pytest.raises(UserError, match=message):
        tokenize_pairs(rows, template, EOS, 512)
    assert tokenize_pairs(rows, TEMPLATE, EOS, 512).dialogues == 1  # a message may spell what it likes
