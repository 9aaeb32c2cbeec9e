"""Messages as token ids by a chat template (Jinja): the ids of transformers' ``apply_chat_template``.

One thing differs. Control tokens come from the template alone: the text of a message never becomes one, whatever it
spells. Control tokens are those flagged special, those with a role (BOS, EOS, ...), and those with which the template
begins and ends messages, even where the tokenizer does not flag them. Other added tokens, such as ``</think>`` in many
tokenizers, are tokens in a message too, as they are for transformers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import pairwise, product
from typing import Any, Literal

from tokenizers import Tokenizer

from llada_lightning.data.encoding import decode_batch, encode_batch, encode_with_offsets, lost_bytes
from llada_lightning.data.rendering import RenderingError, render
from llada_lightning.data.tokenizers import as_special
from llada_lightning.support.errors import UserError
from llada_lightning.support.printing import shortened

Role = Literal["system", "user", "assistant"]

_START_TOKENS = ("<|startoftext|>", "<|begin_of_text|>", "<s>", "[BOS]")
_Encoded = tuple[list[int], list[tuple[int, int]]]
"""The ids, and where the characters of each begin and end."""
_PRIVATE = range(0xF0000, 0xFFFFE)
"""Unicode's supplementary private use area A, which texts do not use; characters that a text does use are left out."""

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
"""The form for tokenizers without special tokens for dialogues: roles as text. Only EOS ends an answer."""


@dataclass(frozen=True)
class Message:
    """One message of a dialogue."""

    role: Role
    content: str


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template with its tokenizer.

    Args:
        text: The text of the template, in Jinja.
        tokenizer: The tokenizer, which encodes special tokens that a text spells as text.
        roles: The special tokens by their names in the template: ``bos_token``, ``eos_token``, ...
        acting: The ids that have a meaning for the sampler or the objective.
        name: The name of the template, for messages.
    """

    text: str
    tokenizer: Tokenizer
    roles: Mapping[str, str]
    acting: frozenset[int]
    name: str

    @classmethod
    def of(
        cls,
        text: str,
        tokenizer: Tokenizer,
        eos_id: int,
        acting_ids: Iterable[int | None],
        name: str,
        roles: Mapping[str, str] | None = None,
    ) -> ChatTemplate:
        """Returns a template with the roles that the tokenizer's files name; "" where a file says there is none.

        Tokens that the tokenizer lacks are left out. Where no file names ``eos_token``, it is that of ``eos_id``; where
        none names ``bos_token``, the first common one that the tokenizer has. ``acting_ids`` have a meaning for the
        sampler or the objective besides EOS.
        """
        has = tokenizer.token_to_id
        named = {key: token for key, token in (roles or {}).items() if not token or has(token) is not None}
        guessed = {
            "bos_token": next((token for token in _START_TOKENS if has(token) is not None), ""),
            "eos_token": tokenizer.id_to_token(eos_id) or "",
        }
        acting = frozenset(i for i in (eos_id, *acting_ids) if i is not None)
        return cls(text, tokenizer, {**guessed, **named}, acting, name)

    def ids(self, messages: Sequence[Message]) -> list[int]:
        """Returns the ids of the prompt for the next answer.

        Raises:
            UserError: The template is broken, exceeds its limits, or refuses the messages.
        """
        disguise = self._disguise(messages)
        (prompt,) = self._rendered([(messages, True)], disguise)
        return self._ids_of(prompt, disguise)

    def turn_ids(self, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
        """Returns the ids of a prompt, and those of its answer, the last message, with the tokens that end it.

        Raises:
            UserError: As :meth:`ids`, or the template writes a prompt with an answer differently than without one, or
                it writes tokens that the tokenizer lacks.
        """
        disguise = self._disguise(messages)
        prompt, whole = self._rendered([(messages[:-1], True), (messages, False)], disguise)
        shown = [disguise.removed(text) for text in (prompt, whole)]
        self._check_tokens(shown, messages)
        if not shown[1].startswith(shown[0]):
            raise self._mistake(
                "an answer does not follow its prompt as the template writes it; choose --data.chat_template plain, or "
                "another template"
            )
        if messages[-1].content.strip() and not shown[1].removeprefix(shown[0]).strip():
            raise self._mistake(
                f"it writes nothing for the answer '{shortened(messages[-1].content, 60)}'; choose "
                "--data.chat_template plain, or another template"
            )
        prompt_ids, whole_ids = self._ids_of(prompt, disguise), self._ids_of(whole, disguise)
        if whole_ids[: len(prompt_ids)] == prompt_ids:
            return prompt_ids, whole_ids[len(prompt_ids) :]
        return prompt_ids, self._ids_of(whole[len(prompt) :], disguise, first=False)  # a token would span both

    def lost_bytes(self, texts: Sequence[str]) -> list[int]:
        """Returns the number of bytes of each text that its tokens do not decode to."""
        decoded = decode_batch(self.tokenizer, encode_batch(self.tokenizer, texts))
        return list(map(lost_bytes, texts, decoded))

    def _check_tokens(self, texts: Iterable[str], messages: Sequence[Message]) -> None:
        """Refuses what looks like a token and comes from the template, but is not in the tokenizer."""
        looks = {look for text in texts for look in re.findall(r"<\|[a-z_]+\|>", text)}
        lacking = [look for look in looks if self.tokenizer.token_to_id(look) is None]
        lacking = [look for look in lacking if not any(look in message.content for message in messages)]
        if lacking:
            raise self._mistake(
                f"it writes {', '.join(sorted(lacking))}, and the tokenizer has no such token; choose "
                "--data.chat_template plain, or another tokenizer"
            )

    def _mistake(self, what: str) -> UserError:
        return UserError(f"chat template of '{shortened(self.name)}': {what}")

    # --- the text -----------------------------------------------------------------------------------------------------

    def _disguise(self, messages: Sequence[Message]) -> _Disguise:
        characters = sorted({char for token in self._control.values() for char in token if not char.isspace()})
        taken = {char for message in messages for char in message.content}
        free = (chr(code) for code in _PRIVATE if chr(code) not in taken)
        return _Disguise({ord(char): private for char, private in zip(characters, free, strict=False)})

    def _rendered(self, asked: Sequence[tuple[Sequence[Message], bool]], disguise: _Disguise) -> list[str]:
        """Renderings in which the characters that came from messages can be told from those of the template.

        Written in disguise, messages share no character with a control token, so that none can begin, end or be in
        them, not even together with the text of the template around them. But a template may read a message, and must
        see the text itself. So both are rendered. They agree unless the template reads or changes the text; then the
        disguised rendering holds the same text and tells the origin of each character. If they differ, only punctuation
        is disguised, for templates that change letters; if they differ still, only the control tokens that a message
        spells, which most messages do not.
        """

        def rendered(*ways: Callable[[str], str]) -> list[str | RenderingError]:
            variables = []
            for way, (messages, ask) in product(ways, asked):
                variables.append(self._variables([Message(m.role, way(m.content)) for m in messages], ask))
            try:
                return render(self.text, variables)
            except RenderingError as error:
                raise self._refused(error) from error

        texts = rendered(str, disguise.put_on)
        seen, hidden = [self._text(text) for text in texts[: len(asked)]], texts[len(asked) :]
        for way in (disguise.put_on_signs, partial(self._without_spelled, disguise)):
            found = [text for text in hidden if isinstance(text, str)]
            if list(map(disguise.removed, found)) == seen:
                return found
            hidden = rendered(way)
        return [self._text(text) for text in hidden]

    def _without_spelled(self, disguise: _Disguise, content: str) -> str:
        """The text with the control tokens that it spells disguised."""
        for _, begin, end in self._control_spans(content, self._encode(content)):
            content = content[:begin] + disguise.put_on(content[begin:end]) + content[end:]  # as long as before
        return content

    def _variables(self, messages: Sequence[Message], ask: bool) -> dict[str, Any]:
        said = [{"role": message.role, "content": message.content} for message in messages]
        return {**self.roles, "messages": said, "add_generation_prompt": ask, "tools": None, "documents": None}

    def _text(self, rendered: str | RenderingError) -> str:
        if isinstance(rendered, RenderingError):
            raise self._refused(rendered) from rendered
        return rendered

    def _refused(self, error: RenderingError) -> UserError:
        return self._mistake(f"{shortened(error)}; correct the template, or leave out what it refuses")

    # --- its tokens ---------------------------------------------------------------------------------------------------

    @cached_property
    def _control(self) -> dict[int, str]:
        """The control tokens, which no text may become: id -> token."""
        return {**self._known, **self._marks}

    @cached_property
    def _known(self) -> dict[int, str]:
        """The control tokens that are special for the tokenizer, its files or the model."""
        special = {i: token.content for i, token in self.tokenizer.get_added_tokens_decoder().items() if token.special}
        roles = (self.tokenizer.token_to_id(token) for token in self.roles.values())
        acting = {i: self.tokenizer.id_to_token(i) for i in (*self.acting, *roles) if i is not None}
        return special | {i: token for i, token in acting.items() if token}

    @cached_property
    def _marks(self) -> dict[int, str]:
        """The control tokens with which the template begins and ends messages, flagged or not.

        They are in the rendering of a dialogue that does not ask for an answer: where it asks, a template may begin the
        answer with ``<think>``, which is part of it. Words and white space that were added to the tokenizer are not
        control tokens.
        """
        said = [Message("system", "0"), Message("user", "0"), Message("assistant", "0"), Message("user", "0")]
        try:
            texts = render(self.text, [self._variables(some, False) for some in (said, said[1:], said[1:2])])
        except RenderingError:  # reported when the messages themselves are rendered
            return {}
        written = {i for text in texts if isinstance(text, str) for i in self._encode(text)[0]}
        added = {i: token.content for i, token in self.tokenizer.get_added_tokens_decoder().items() if i in written}
        return {i: token for i, token in added.items() if len(token) > 1 and re.search(r"[^\w\s]", token)}

    @cached_property
    def _reader(self) -> Tokenizer:
        """The tokenizer, in which all special tokens are added ones."""
        added = self.tokenizer.get_added_tokens_decoder()
        missing = tuple(token for i, token in self._known.items() if i not in added)
        return as_special(self.tokenizer, missing) if missing else self.tokenizer

    @cached_property
    def _anchor(self) -> str:
        """A token to put before a later text, where the tokenizer encodes the first text differently; else "".

        Tokenizers like SentencePiece put a space before a text, and before no later part of it.
        """
        added = self._reader.get_added_tokens_decoder()
        plain = (added[i] for i in self._known if i in added)
        token = next((t.content for t in plain if not (t.lstrip or t.rstrip or t.single_word or t.normalized)), "")
        return token if self._encode(f"{token}a")[0][1:] != self._encode("a")[0] else ""

    def _encode(self, text: str, before: str = "") -> _Encoded:
        """Encodes a text behind a token as transformers does: special tokens that it spells are special tokens."""
        promise, self._reader.encode_special_tokens = self._reader.encode_special_tokens, False
        try:
            ids, offsets = encode_with_offsets(self._reader, before + text)
        finally:
            self._reader.encode_special_tokens = promise
        begun = 1 if before else 0
        spans = [(begin - len(before), end - len(before)) for begin, end in offsets[begun:]]
        return ids[begun:], spans

    def _control_spans(self, text: str, encoded: _Encoded) -> Iterator[tuple[int, int, int]]:
        """Yields the place of each control token among the tokens, and where its characters begin and end.

        An unknown character has the id of a special token too, and does not spell it.
        """
        for place, (token_id, (begin, end)) in enumerate(zip(*encoded, strict=True)):
            token = self._control.get(token_id)
            if token is not None and self._normalized(text[begin:end]) == self._normalized(token):
                yield place, begin, end

    def _normalized(self, token: str) -> str:
        normalizer = self.tokenizer.normalizer
        return token.strip() if normalizer is None else str(normalizer.normalize_str(token.strip()))

    def _ids_of(self, rendered: str, disguise: _Disguise, first: bool = True) -> list[int]:
        """The ids of a rendering, in which control tokens whose characters came from messages, in disguise, are text.

        ``first``: whether it does not follow another text.
        """
        text = disguise.removed(rendered)
        encoded = self._encode(text, "" if first else self._anchor)
        spans = [(*span, disguise.is_on(rendered[span[1] : span[2]])) for span in self._control_spans(text, encoded)]
        if not any(spelled for *_, spelled in spans):
            return encoded[0]
        ids: list[int] = []
        place = char = 0  # up to which all is done
        spoiled = False  # the text from there on spells a control token
        for at, begin, end, spelled in [*spans, (len(encoded[0]), len(text), len(text), False)]:
            spoiled |= spelled
            if not spelled:
                piece = text[char:begin]
                ids += self._text_ids(piece, first and char == 0) if spoiled else encoded[0][place:at]
                ids += encoded[0][at : at + 1]
                place, char, spoiled = at + 1, end, False
        return ids

    def _text_ids(self, text: str, first: bool) -> list[int]:
        """Returns the ids of a text, which is cut within each control token that the tokenizer reads in it."""
        ids: list[int] = []
        parts = [text]
        while parts:
            part = parts.pop()
            if self._anchor and (ids or not first):
                encoded = self._encode(part, self._anchor)
            else:
                encoded = encode_with_offsets(self.tokenizer, part)
            cuts = [begin + 1 for _, begin, end in self._control_spans(part, encoded) if begin + 1 < end]
            if cuts:
                parts += reversed([part[a:b] for a, b in pairwise([0, *cuts, len(part)])])
            else:
                ids += encoded[0]
        return ids


@dataclass(frozen=True)
class _Disguise:
    """A replacement of each character of the control tokens by one that no message holds.

    White space is not disguised, because templates trim it.
    """

    private: Mapping[int, str]

    @cached_property
    def _meant(self) -> dict[int, str]:
        return {ord(private): chr(code) for code, private in self.private.items()}

    @cached_property
    def _signs(self) -> dict[int, str]:
        return {code: private for code, private in self.private.items() if not chr(code).isalnum()}

    def put_on(self, text: str) -> str:
        return text.translate(self.private)

    def put_on_signs(self, text: str) -> str:
        """Replaces all characters but letters and digits."""
        return text.translate(self._signs)

    def removed(self, text: str) -> str:
        return text.translate(self._meant)

    def is_on(self, text: str) -> bool:
        return any(ord(char) in self._meant for char in text)
