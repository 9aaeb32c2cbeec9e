"""Dialogues for supervised fine-tuning: rows of JSONL files or of Hugging Face datasets, checked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast, get_args

from llada_lightning.data.chat import Message, Role
from llada_lightning.data.corpora import HUB_PREFIX, DatasetCorpus, list_path
from llada_lightning.data.text_files import Meter, json_records, mended
from llada_lightning.errors import UserError

_PAIRS = (("prompt", "response"), ("question", "answer"), ("instruction", "output"))
_ROLES = {"human": "user", "gpt": "assistant"}
"""Names of roles that some datasets have."""
_FORMS = "; a row has " + ", or ".join(f"'{first}' and '{second}'" for first, second in _PAIRS) + ", or 'messages'"


def read_dialogues(source: str) -> Iterator[tuple[str, list[Message]]]:
    """Each row's place, for people, and its messages, which end with an answer.

    Args:
        source: a JSONL file (compressed or not), a folder of them, or ``hf:NAME[:CONFIG][@SPLIT]``.

    Raises:
        UserError: there is no such source, or a row is not a dialogue; the message names the row.
    """
    for where, row in _rows(source):
        yield where, dialogue(row, where)


def _rows(source: str) -> Iterator[tuple[str, Any]]:
    if source.startswith(HUB_PREFIX):
        rows = DatasetCorpus(source[len(HUB_PREFIX) :], text_field="messages").rows()
        yield from ((f"{source} row {number}", row) for number, row in enumerate(rows, 1))
        return
    path = Path(source).expanduser()
    if not path.exists():
        raise UserError(f"data.path: '{source}' does not exist; give a .jsonl file, a folder of them, or hf:NAME")
    files = [file for _, file in list_path(path)]
    for file in [f for f in files if ".json" in "".join(f.suffixes[-2:])] if path.is_dir() else files:
        yield from json_records(file, Meter())


def dialogue(row: Any, where: str) -> list[Message]:
    """The messages of one row: a system's first where there is one, then user and assistant by turns.

    Raises:
        UserError: fields are missing or empty, or the turns are not in this order.
    """
    if not isinstance(row, dict):
        raise UserError(f"{where}: holds {type(row).__name__}, not a JSON object{_FORMS}")
    given = row.get("messages", row.get("conversations"))
    if given is not None:
        messages = _messages(given, where)
    else:
        pair = next((pair for pair in _PAIRS if set(pair) <= set(row)), None)
        if pair is None:
            raise UserError(f"{where}: has only {', '.join(row) or 'nothing'}{_FORMS}")
        said = [_text(row[field], f"{where}: '{field}'") for field in pair]
        messages = [Message("user", said[0]), Message("assistant", said[1])]
    turns = messages[1:] if messages[0].role == "system" else messages
    for i, message in enumerate(turns):
        expected = ("user", "assistant")[i % 2]
        if message.role != expected:
            begins = "the dialogue starts with" if i == 0 else f"turn {i // 2 + 1} has"
            raise UserError(f"{where}: {begins} the {message.role}, and the {expected}'s message belongs there")
        if message.role == "assistant" and not message.content.strip():
            raise UserError(f"{where}: response {i // 2 + 1} is empty; fill it in, or remove the row")
    if len(turns) < 2:
        raise UserError(f"{where}: holds no answer; a dialogue needs a user's message and the assistant's")
    return messages if messages[-1].role == "assistant" else messages[:-1]


def _messages(given: Any, where: str) -> list[Message]:
    if not isinstance(given, Sequence) or isinstance(given, str) or not given:
        raise UserError(f"{where}: 'messages' is no list of messages with 'role' and 'content'")
    messages = []
    for entry in given:
        role, content = (
            (entry.get("role", entry.get("from")), entry.get("content", entry.get("value")))
            if isinstance(entry, dict)
            else (None, None)
        )
        role = _ROLES.get(role, role) if isinstance(role, str) else role
        if role not in get_args(Role):
            raise UserError(f"{where}: a message has the role {role!r}; known are {', '.join(get_args(Role))}")
        messages.append(Message(cast(Role, role), _text(content, f"{where}: the {role}'s 'content'")))
    return messages


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{where} holds {type(value).__name__}, not text; correct the row, or remove it")
    return mended(value)


def answered_turns(messages: Sequence[Message]) -> list[list[Message]]:
    """An n-turn dialogue as n single-turn ones: each answer with all that was said before it (paper, App. B.1)."""
    return [list(messages[: i + 1]) for i, message in enumerate(messages) if message.role == "assistant"]
