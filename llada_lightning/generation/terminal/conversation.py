"""A conversation as token ids: by the checkpoint's chat template, or as plain text where it has none.

Special tokens come from the template alone. Text that people or the model wrote never becomes one, whatever it spells.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Literal, NoReturn

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from llada_lightning.checkpoints import LanguageModel
from llada_lightning.errors import UserError

Role = Literal["system", "user", "assistant"]

KNOWN_START_TOKENS = ("<|startoftext|>", "<|begin_of_text|>", "<s>", "[BOS]")
_PRIVATE = range(0xF0000, 0xFFFFE)
"""Unicode's supplementary private use area A: in no text by agreement; what is taken all the same is left out."""


@dataclass(frozen=True)
class Message:
    """What one side said."""

    role: Role
    content: str


def conversation_ids(lm: LanguageModel, messages: Sequence[Message]) -> list[int]:
    """The prompt that asks for the next answer.

    Args:
        lm: with a chat template, or without: then the messages are joined by new lines.
        messages: the last one is the user's.

    Raises:
        UserError: there is no tokenizer, or the template is broken or refuses the messages.
    """
    if lm.chat_template is None:
        return lm.encode_prompt("".join(f"{message.content}\n" for message in messages))
    special = _special_tokens(lm)
    guard = _guard(special.values(), messages)
    guarded = [replace(message, content=message.content.translate(guard)) for message in messages]
    rendered = _rendered(lm, lm.chat_template, guarded)
    meant = {ord(private): chr(code) for code, private in guard.items()}
    ids_of = {token: token_id for token_id, token in special.items()}
    ids: list[int] = []
    for piece in re.split(f"({_any_of(special.values())})", rendered):
        ids += [ids_of[piece]] if piece in ids_of else _text_ids(lm, piece.translate(meant), special)
    return ids


def fitting_ids(lm: LanguageModel, messages: Sequence[Message], length: int) -> tuple[list[int], int]:
    """The prompt of the newest turns that leave room for an answer of ``length`` tokens, and how many were left out.

    A turn is a question and its answer. The system's message and the last question stay, also where they do not fit:
    the sampler refuses these.
    """
    system = [message for message in messages if message.role == "system"]
    said = [message for message in messages if message.role != "system"]
    left_out = 0
    while True:
        ids = conversation_ids(lm, system + said[2 * left_out :])
        if len(ids) + length <= lm.context_length or len(said) <= 2 * (left_out + 1):
            return ids, left_out
        left_out += 1


def _special_tokens(lm: LanguageModel) -> dict[int, str]:
    """What no text may become: the tokenizer's special tokens, and those that mean something to the sampler."""
    tokenizer: Any = lm.tokenizer
    if tokenizer is None:
        lm.encode("")  # which says that there is none
    special = {i: token.content for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    acting = {i: tokenizer.id_to_token(i) for i in (*lm.end_token_ids, lm.mask_token_id) if i is not None}
    return special | {i: token for i, token in acting.items() if token}


def _guard(special: Iterable[str], messages: Sequence[Message]) -> dict[int, str]:
    """Each character of a special token to one that no message holds.

    Messages written with these share no character with a special token, so that none can begin, end or stand in them,
    not even together with the template's text around. White space stays: templates trim it.
    """
    characters = sorted({char for token in special for char in token if not char.isspace()})
    taken = {char for message in messages for char in message.content}
    free = (chr(code) for code in _PRIVATE if chr(code) not in taken)
    return {ord(char): private for char, private in zip(characters, free, strict=False)}


def _any_of(tokens: Iterable[str]) -> str:
    """A pattern for the longest of the tokens at a place."""
    return "|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True))


def _text_ids(lm: LanguageModel, text: str, special: dict[int, str]) -> list[int]:
    """The ids of text, cut within what the tokenizer takes for a special token against its promise."""
    ids = lm.encode(text)
    if special.keys().isdisjoint(ids):
        return ids
    parts = re.split("|".join(f"(?<={re.escape(t[0])})(?={re.escape(t[1:])})" for t in special.values()), text)
    return [token_id for part in parts for token_id in lm.encode(part)]


def _rendered(lm: LanguageModel, template: str, messages: Sequence[Message]) -> str:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    tokenizer: Any = lm.tokenizer
    try:
        return environment.from_string(template).render(
            messages=[vars(message) for message in messages],
            add_generation_prompt=True,
            bos_token=next((token for token in KNOWN_START_TOKENS if tokenizer.token_to_id(token) is not None), ""),
            eos_token=tokenizer.id_to_token(lm.eos_token_id) or "",
        )
    except TemplateError as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"chat template of '{lm.name}': {reason}; mend the template, or leave out what it refuses"
        ) from error


def _refuse(message: str) -> NoReturn:
    """What templates call where they refuse messages."""
    raise TemplateError(message)
