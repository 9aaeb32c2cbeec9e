"""Rows as dialogues: three forms, turns, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llada_lightning.data.chat import Message
from llada_lightning.data.dialogues import answered_turns, dialogue, read_dialogues
from llada_lightning.errors import UserError


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
        ({"messages": []}, "no list of messages"),
        ({"messages": TWO_TURNS[1:]}, "the dialogue starts with the assistant"),
        ({"messages": [TWO_TURNS[0], TWO_TURNS[2]]}, "turn 1 has the user"),
        ({"messages": TWO_TURNS[:1]}, "holds no answer"),
        ({"messages": [said("tool", "x")]}, "the role 'tool'"),
        ({"messages": [{"role": "user"}]}, "'content' holds NoneType"),
    ],
)
def test_what_is_no_dialogue_is_refused_with_its_place(row: Any, fault: str) -> None:
    with pytest.raises(UserError, match=fault) as refusal:
        dialogue(row, "f.jsonl:7")
    assert str(refusal.value).startswith("f.jsonl:7: ") and "\n" not in str(refusal.value)


def test_files_and_folders_are_read_and_lines_are_named(tmp_path: Path) -> None:
    rows = [{"prompt": str(i), "response": "r"} for i in range(3)]
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text("\n\n".join(map(json.dumps, rows)))
    (tmp_path / "notes.txt").write_text("not a row")
    read = list(read_dialogues(str(tmp_path)))
    assert [messages[0].content for _, messages in read] == ["0", "1", "2"] * 2
    assert read[1][0].endswith("a.jsonl:3")
    with pytest.raises(UserError, match="does not exist"):
        list(read_dialogues(str(tmp_path / "c.jsonl")))
