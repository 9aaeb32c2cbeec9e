"""Dialogues for supervised fine-tuning (paper, Sec. 2.3): rows as messages, and messages as tokens.

No field of a row changes its meaning in silence: :func:`dialogue` says which fields are read, and ``text_files`` which
of the others are refused. A field that belongs to another form of a row may only repeat what the messages say.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from llada_lightning.data.chat import ChatTemplate, Message, Role
from llada_lightning.data.corpora import HUB_PREFIX, DatasetCorpus, list_path
from llada_lightning.data.text_files import Meter, UnreadFields, json_records, present_fields, some, without_surrogates
from llada_lightning.objectives import noise
from llada_lightning.objectives.noise import Purpose
from llada_lightning.support.errors import UserError
from llada_lightning.support.files import expanded
from llada_lightning.support.printing import shortened

_ALPACA = ("instruction", "output")
_PAIRS = (("prompt", "response"), ("question", "answer"), _ALPACA)
_LISTS = ("messages", "conversations")
_SYSTEM = ("system", "system_prompt")
_FLAGS = ("weight", "loss", "train", "training")
"""The names, in the formats of OpenAI, ms-swift and Axolotl, of the field that tells whether an answer is learned."""
_OF_FORMS = (*_LISTS, *(field for pair in _PAIRS for field in pair), "input", *_SYSTEM, "history")
_ROLES = {"human": "user", "gpt": "assistant"}
"""The roles under the names that some datasets use."""
_FORMS = "; a row has " + ", or ".join(f"'{first}' and '{second}'" for first, second in _PAIRS) + ", or 'messages'"
_NO_LIST = "'messages' is not a list of messages with 'role' and 'content'"
_NO_ANSWER = "a last message of the user, which has no answer"


class Context(Message):
    """An answer that is not learned; it is part of the prompt of later answers."""


def read_dialogues(source: str) -> Iterator[tuple[str, list[Message]]]:
    """Yields the place of each row, for messages, and its dialogue, which ends with an answer.

    A note on stderr names the fields that are not read. The source is a JSONL file (compressed or not), a folder of
    them, or ``hf:NAME[:CONFIG][@SPLIT]``.

    Raises:
        UserError: There is no such source, or a row is not a dialogue; the message names the row.
    """
    unread = UnreadFields()
    for where, row in _rows(source):
        yield where, dialogue(row, where, unread)
    unread.note(source)


def _rows(source: str) -> Iterator[tuple[str, Any]]:
    if source.startswith(HUB_PREFIX):
        rows = DatasetCorpus(source[len(HUB_PREFIX) :], text_field="messages").rows()
        yield from ((f"{source} row {number}", row) for number, row in enumerate(rows, 1))
        return
    path = expanded(source)
    if not path.exists():
        raise UserError(f"data.path: '{source}' does not exist; give a .jsonl file, a folder of them, or hf:NAME")
    files = [file for _, file in list_path(path)]
    for file in [f for f in files if ".json" in "".join(f.suffixes[-2:])] if path.is_dir() else files:
        yield from json_records(file, Meter())


def dialogue(row: Any, where: str, unread: UnreadFields | None = None) -> list[Message]:
    """Returns the messages of one row: that of the system if there is one, then user and assistant by turns.

    A row has ``messages`` (``role`` and ``content``), ``conversations`` (ShareGPT's ``from`` and ``value``), or a pair
    of texts: ``prompt`` and ``response``, ``question`` and ``answer``, ``instruction`` and ``output``. Alpaca's
    ``input`` follows its instruction behind an empty line. ``system`` or ``system_prompt``, beside any of them, is the
    system's message. ``history``, beside a pair, is a list of earlier [prompt, response] pairs, which are turns of the
    dialogue like the last one. An answer of ``weight`` 0 is a :class:`Context`. ``unread`` counts what is not read.

    Raises:
        UserError: Fields are missing, empty, unknown or contradict one another, or the turns are not in this order.
    """
    if not isinstance(row, dict):
        raise UserError(f"{where}: holds {type(row).__name__}, not a JSON object{_FORMS}")
    fields = present_fields(row)
    unread = UnreadFields() if unread is None else unread
    of_messages = UnreadFields()
    listed = next((name for name in _LISTS if name in fields), None)
    form: tuple[str, ...]
    if listed is not None:
        form, read = (listed,), {listed}
        messages = _messages(fields[listed], where, of_messages)
    else:
        form = _pair_of(row, fields, where)
        read = {*form, "history"} | ({"input"} if form == _ALPACA else set())
        messages = _of_pair(row, fields, form, where)
    if messages[0].role != "system":
        name = next((name for name in _SYSTEM if name in fields), "")
        system = _text(fields[name], f"{where}: '{name}'") if name else ""
        messages = [Message("system", system), *messages] if system.strip() else messages
    for name in _FLAGS:
        if fields.get(name, 1) != 1:
            raise UserError(
                f"{where}: '{name}' of the row is {_quoted(fields[name])}; only 1 is supported, remove the field"
            )
    unread.add_row(fields, (*_OF_FORMS, *_FLAGS), where)
    for name in (name for name in _OF_FORMS if name in fields and name not in read):
        if not _repeats(fields[name], messages, where):
            raise UserError(f"{where}: '{name}' differs from what {' and '.join(form)} hold; remove one of them")
    turns = messages[1:] if messages[0].role == "system" else messages
    _check_turns(turns, where)
    if messages[-1].role != "assistant":
        messages.pop()
        unread.update([_NO_ANSWER])
    unread.update(f"{name} of messages" for name in of_messages)
    return messages


def _pair_of(row: dict[str, Any], fields: dict[str, Any], where: str) -> tuple[str, str]:
    """The names of the row's pair of texts."""
    for present in (fields, row):
        for pair in _PAIRS:
            if set(pair) <= set(present):
                return pair
    if any(row.get(name) is not None for name in _LISTS):
        raise UserError(f"{where}: {_NO_LIST}")
    raise UserError(f"{where}: has only {some(map(shortened, row)) or 'nothing'}{_FORMS}")


def _of_pair(row: dict[str, Any], fields: dict[str, Any], pair: tuple[str, ...], where: str) -> list[Message]:
    prompt, response = (_text(row[field], f"{where}: '{field}'") for field in pair)
    if pair == _ALPACA:
        given = _text(fields.get("input", ""), f"{where}: 'input'")
        prompt = "\n\n".join(text for text in (prompt, given) if text.strip()) or prompt
    earlier = _history(fields.get("history", []), where)
    return [*earlier, Message("user", prompt), Message("assistant", response)]


def _history(given: Any, where: str) -> Iterator[Message]:
    pairs = given if isinstance(given, list) else [None]
    for number, pair in enumerate(pairs, 1):
        if not (isinstance(pair, Sequence) and not isinstance(pair, str) and len(pair) == 2):
            raise UserError(f"{where}: 'history' is not a list of [prompt, response] pairs; write it so, or remove it")
        said = [_text(text, f"{where}: pair {number} of 'history'") for text in pair]
        yield from (Message("user", said[0]), Message("assistant", said[1]))


def _messages(given: Any, where: str, unread: UnreadFields) -> list[Message]:
    """The messages of a list."""
    if not isinstance(given, Sequence) or isinstance(given, str) or not given:
        raise UserError(f"{where}: {_NO_LIST}")
    messages = []
    for number, entry in enumerate(given, 1):
        place = f"{where}: message {number}"
        fields = {} if not isinstance(entry, dict) else {k: v for k, v in entry.items() if v is not None}
        role = _one_of(fields, ("role", "from"), place)
        role = _ROLES.get(role, role) if isinstance(role, str) else role
        if role not in get_args(Role):
            raise UserError(f"{place} has the role {_quoted(role)}; known are {', '.join(get_args(Role))}")
        unread.add_row(fields, ("role", "from", "content", "value", *_FLAGS), place)
        content = _text(_one_of(fields, ("content", "value"), place), f"{where}: the {role}'s 'content'")
        kind = Message if _is_learned(fields, role, place) else Context
        messages.append(kind(cast(Role, role), content))
    return messages


def _is_learned(fields: dict[str, Any], role: str, place: str) -> bool:
    """Whether the flags of a message are 1; an answer without flags is learned."""
    flags = {name: fields[name] for name in _FLAGS if name in fields}
    for name, value in flags.items():
        if value not in (0, 1):
            raise UserError(f"{place}: '{name}' is {_quoted(value)}; give 1 (learned) or 0 (not learned)")
        if value and role != "assistant":
            raise UserError(
                f"{place}: '{name}' of the {role} is {_quoted(value)}, and only answers are learned; remove it"
            )
    return role != "assistant" or all(flags.values())


def _check_turns(turns: Sequence[Message], where: str) -> None:
    for i, message in enumerate(turns):
        expected = ("user", "assistant")[i % 2]
        if message.role != expected:
            begins = "the dialogue starts with" if i == 0 else f"turn {i // 2 + 1} has"
            raise UserError(f"{where}: {begins} the {message.role}, and the {expected}'s message belongs there")
        if message.role == "assistant" and not message.content.strip():
            raise UserError(f"{where}: response {i // 2 + 1} is empty; fill it in, or remove the row")
    if len(turns) < 2:
        raise UserError(f"{where}: holds no answer; a dialogue needs a user's message and the assistant's")
    if not answered_turns(turns):
        raise UserError(f"{where}: no answer is to be learned, each has the weight 0; remove the row")


def _repeats(value: Any, messages: Sequence[Message], where: str) -> bool:
    """Whether the messages hold already what a field of another form holds."""
    if isinstance(value, str):
        return value.strip() in {message.content.strip() for message in messages} or not value.strip()
    said = [message for message in messages if message.role != "system"]
    try:
        again = _messages(value, where, UnreadFields())
    except UserError:
        return False
    return again in (messages, said)


def _one_of(fields: dict[str, Any], names: tuple[str, str], place: str) -> Any:
    """The value of a field that has two names."""
    values = [fields[name] for name in names if name in fields]
    if len(values) == 2 and values[0] != values[1]:
        raise UserError(f"{place}: '{names[0]}' and '{names[1]}' differ; remove one of them")
    return values[0] if values else None


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{where} holds {type(value).__name__}, not text; correct the row, or remove it")
    return without_surrogates(value)


def _quoted(value: Any) -> str:
    return f"'{shortened(value, 60)}'"


def answered_turns(messages: Sequence[Message]) -> list[list[Message]]:
    """Returns an n-turn dialogue as n single-turn ones: each answer with all messages before it (paper, App. B.1).

    An answer that is not learned is one of the messages before, and not a turn of its own.
    """
    learned = (i for i, message in enumerate(messages) if message.role == "assistant" and type(message) is not Context)
    return [list(messages[: i + 1]) for i in learned]


# --- as tokens --------------------------------------------------------------------------------------------------------

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Pairs:
    """All P single-turn pairs of N dialogues, one behind the other, in memory.

    Args:
        tokens_T: (T,) int32: The prompt and response of each pair, and the EOS that ends it.
        starts_P: (P + 1,) int64: The position of each pair's beginning in ``tokens_T``.
        prompts_P: (P,) int64: The number of tokens of each prompt.
        first_N: (N + 1,) int64: The first pair of each dialogue.
        bytes_P: (P,) int64: The UTF-8 bytes of each response.
        lost_P: (P,) int64: The number of these bytes that the response's tokens do not decode to.
        dropped: The number of dialogues that were left out because they do not fit.
    """

    tokens_T: npt.NDArray[np.int32]
    starts_P: Ints
    prompts_P: Ints
    first_N: Ints
    bytes_P: Ints
    lost_P: Ints
    dropped: int = 0

    @property
    def dialogues(self) -> int:
        """The number of dialogues (N)."""
        return len(self.first_N) - 1

    @property
    def lengths(self) -> Ints:
        """The number of tokens of each pair, its EOS included: (P,) int64."""
        return np.diff(self.starts_P)

    def drawn(self, dialogues: Ints, seed: int, ordinals: Ints) -> Ints:
        """Returns one pair of each of (B,) dialogues, drawn uniformly by seed and ordinal (App. B.1): (B,) int64."""
        u = noise.uniform_by_ordinal(seed, Purpose.TURN, ordinals)[:, 0]
        first, turns = self.first_N[dialogues], self.first_N[dialogues + 1] - self.first_N[dialogues]
        return first + np.floor(u * turns).astype(np.int64)

    def fingerprint(self) -> str:
        """Returns the SHA-256 of the tokens and of their division into pairs."""
        digest = hashlib.sha256()
        for array in (self.tokens_T, self.starts_P, self.prompts_P, self.first_N):
            digest.update(np.ascontiguousarray(array).tobytes() + b"|")
        return digest.hexdigest()

    def rows(self, pairs: Ints, eos_id: int, length: int) -> Tensor:
        """Returns the tokens of pairs, padded with EOS: (B, length) int64."""
        tokens_BL = torch.full((len(pairs), length), eos_id)
        for row, pair in zip(tokens_BL, pairs, strict=True):
            own = self.tokens_T[self.starts_P[pair] : self.starts_P[pair + 1]]
            row[: len(own)] = torch.from_numpy(own.astype(np.int64))
        return tokens_BL


def tokenize_pairs(
    dialogues: Iterable[tuple[str, Sequence[Message]]],
    template: ChatTemplate,
    eos_id: int,
    sequence_length: int,
    drop_long: bool = False,
) -> Pairs:
    """Returns the pairs of dialogues (each behind its place), which EOS ends and which are no longer than a context.

    ``drop_long``: whether dialogues with a longer pair are left out instead of refused.

    Raises:
        UserError: The template refuses a dialogue, a pair is too long, or no dialogue is left.
    """
    tokens: list[npt.NDArray[np.int32]] = []
    prompts, sizes, losses, turns = [], [], [], []
    dropped = 0
    for where, messages in dialogues:
        try:
            answered = answered_turns(messages)
            encoded = [template.turn_ids(turn) for turn in answered]
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
        pairs = [(prompt, answer if answer[-1:] == [eos_id] else [*answer, eos_id]) for prompt, answer in encoded]
        longest = max(pairs, key=lambda pair: len(pair[0]) + len(pair[1]))
        if len(longest[0]) + len(longest[1]) > sequence_length:
            if not drop_long:
                raise UserError(
                    f"{where}: prompt of {len(longest[0])} and response of {len(longest[1])} tokens are longer than "
                    f"the context of {sequence_length}; raise --data.context_length, or leave such rows out with "
                    "--data.drop_long true"
                )
            dropped += 1
            continue
        tokens += [np.array(prompt + answer, dtype=np.int32) for prompt, answer in pairs]
        prompts += [len(prompt) for prompt, _ in pairs]
        responses = [turn[-1].content for turn in answered]
        losses += template.lost_bytes(responses)
        sizes += [len(response.encode()) for response in responses]
        turns.append(len(pairs))
    if not turns:
        raise UserError(f"data.path: no dialogue is left of {dropped}; give others, or raise --data.context_length")
    lengths = [len(own) for own in tokens]
    return Pairs(
        np.concatenate(tokens),
        np.cumsum([0, *lengths]),
        np.array(prompts, dtype=np.int64),
        np.cumsum([0, *turns]),
        np.array(sizes, dtype=np.int64),
        np.array(losses, dtype=np.int64),
        dropped,
    )
