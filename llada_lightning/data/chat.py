"""Messages as token ids by a chat template (Jinja).

Special tokens come from the template alone. Text that people or a model wrote never becomes one, whatever it spells.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Literal, NoReturn

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from llada_lightning.data.encoding import decode_batch, encode, encode_batch, lost_bytes
from llada_lightning.errors import UserError

Role = Literal["system", "user", "assistant"]

KNOWN_START_TOKENS = ("<|startoftext|>", "<|begin_of_text|>", "<s>", "[BOS]")
_PRIVATE = range(0xF0000, 0xFFFFE)
"""Unicode's supplementary private use area A: in no text by agreement; what is taken all the same is left out."""

LLADA_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message.role }}<|end_header_id|>\n\n"
    "{{ message.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
"""The form of LLaDA-8B-Instruct's dialogues; its tokenizer has the four special tokens."""

PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ '' if loop.first else '\n\n' }}{{ message.role }}:\n{{ message.content }}"
    "{% endfor %}{{ '\n\nassistant:\n' if add_generation_prompt else '' }}"
)
"""For tokenizers without special tokens of a dialogue: roles as text. EOS alone ends an answer."""


@dataclass(frozen=True)
class Message:
    """What one side said."""

    role: Role
    content: str


@dataclass(frozen=True)
class ChatTemplate:
    """A template with the tokenizer that it is for.

    Args:
        text: Jinja.
        tokenizer: which takes special tokens that a text spells out for text.
        special: what no text may become: id -> token.
        eos_token: what the template gets as ``eos_token``.
        name: for people.
    """

    text: str
    tokenizer: Tokenizer
    special: Mapping[int, str]
    eos_token: str
    name: str

    @classmethod
    def of(
        cls, text: str, tokenizer: Tokenizer, eos_id: int, acting_ids: Iterable[int | None], name: str
    ) -> ChatTemplate:
        """With the tokenizer's special tokens, and those that mean something to the sampler or the objective."""
        special = {i: token.content for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        acting = {i: tokenizer.id_to_token(i) for i in (eos_id, *acting_ids) if i is not None}
        special |= {i: token for i, token in acting.items() if token}
        return cls(text, tokenizer, special, special.get(eos_id, ""), name)

    def ids(self, messages: Sequence[Message]) -> list[int]:
        """The prompt that asks for the next answer.

        Raises:
            UserError: the template is broken or refuses the messages.
        """
        guard = self._guard(messages)
        return self._ids_of(self._rendered(messages, guard, ask=True), guard)

    def turn_ids(self, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
        """The prompt that asks for the last message, which is the assistant's, and that message with what ends it.

        Raises:
            UserError: as :meth:`ids`, or the template writes a prompt otherwise where its answer follows.
        """
        guard = self._guard(messages)
        prompt, whole = self._rendered(messages[:-1], guard, ask=True), self._rendered(messages, guard, ask=False)
        if not whole.startswith(prompt):
            raise UserError(
                f"chat template of '{self.name}': an answer does not follow its prompt as the template writes it; "
                "choose --data.chat_template plain, or another template"
            )
        return self._ids_of(prompt, guard), self._ids_of(whole[len(prompt) :], guard)

    def lost_bytes(self, texts: Sequence[str]) -> list[int]:
        """How many bytes of each text its tokens do not give back."""
        decoded = decode_batch(self.tokenizer, encode_batch(self.tokenizer, texts))
        return list(map(lost_bytes, texts, decoded))

    def lacking(self) -> list[str]:
        """Special tokens that the template writes, by their look, and that the tokenizer does not have."""
        known = set(self.special.values())
        return sorted(set(re.findall(r"<\|[a-z_]+\|>", self.text)) - known)

    def _guard(self, messages: Sequence[Message]) -> dict[int, str]:
        """Each character of a special token to one that no message holds.

        Messages written with these share no character with a special token, so that none can begin, end or stand in
        them, not even together with the template's text around. White space stays: templates trim it.
        """
        characters = sorted({char for token in self.special.values() for char in token if not char.isspace()})
        taken = {char for message in messages for char in message.content}
        free = (chr(code) for code in _PRIVATE if chr(code) not in taken)
        return {ord(char): private for char, private in zip(characters, free, strict=False)}

    def _rendered(self, messages: Sequence[Message], guard: Mapping[int, str], ask: bool) -> str:
        guarded = [replace(message, content=message.content.translate(guard)) for message in messages]
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        has = self.tokenizer.token_to_id
        try:
            return environment.from_string(self.text).render(
                messages=[vars(message) for message in guarded],
                add_generation_prompt=ask,
                bos_token=next((token for token in KNOWN_START_TOKENS if has(token) is not None), ""),
                eos_token=self.eos_token,
            )
        except TemplateError as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"chat template of '{self.name}': {reason}; mend the template, or leave out what it refuses"
            ) from error

    def _ids_of(self, rendered: str, guard: Mapping[int, str]) -> list[int]:
        meant = {ord(private): chr(code) for code, private in guard.items()}
        ids_of = {token: token_id for token_id, token in self.special.items()}
        ids: list[int] = []
        for piece in re.split(f"({_any_of(self.special.values())})", rendered):
            ids += [ids_of[piece]] if piece in ids_of else self._text_ids(piece.translate(meant))
        return ids

    def _text_ids(self, text: str) -> list[int]:
        """The ids of text, cut within what the tokenizer takes for a special token against its promise."""
        ids = self._encode(text)
        if self.special.keys().isdisjoint(ids):
            return ids
        between = (f"(?<={re.escape(token[0])})(?={re.escape(token[1:])})" for token in self.special.values())
        return [token_id for part in re.split("|".join(between), text) for token_id in self._encode(part)]

    def _encode(self, text: str) -> list[int]:
        return encode(self.tokenizer, text)


def _any_of(tokens: Iterable[str]) -> str:
    """A pattern for the longest of the tokens at a place."""
    return "|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True))


def _refuse(message: str) -> NoReturn:
    """What templates call where they refuse messages."""
    raise TemplateError(message)
