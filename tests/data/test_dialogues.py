"""Rows as dialogues: their forms, the fields beside them, turns, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llada_lightning.data.chat import Message
from llada_lightning.data.dialogues import Context, answered_turns, dialogue, read_dialogues
from llada_lightning.data.text_files import UnreadFields
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
