"""Which piece of a text each token is: what colours a token needs to know."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tokenizers import Tokenizer

from llada_lightning.data.encoding import decode, encode

MASKED = -1
"""Among ids: a token that is not known yet."""

_UNREADABLE = "\N{REPLACEMENT CHARACTER}"
_CHARACTER_BYTES = 4
"""The most bytes of a character in UTF-8."""
_WIDEST_GROUP = 16
"""Tokens tried together, where each ends within a character that the next one ends."""


@dataclass(frozen=True)
class Piece:
    """Text of one token, or of the fewest neighbours that are whole characters together.

    Args:
        text: `text`: as it is; `special`: the token's name; `broken`, bytes that are no text, or an id beyond the
            vocabulary: the id in angle brackets; `masked`: empty.
        begin, end: the half-open range of its tokens.
    """

    text: str
    begin: int
    end: int
    kind: Literal["text", "special", "broken", "masked"] = "text"


class Aligner:
    """Aligns tokens with the text that they decode to.

    A byte-level tokenizer may cut a character in two: such tokens become one piece. Without a tokenizer every token is
    a piece of its own, its id and a space.

    Args:
        tokenizer: None where there is none.
    """

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._texts: dict[tuple[int, ...], str] = {}
        self._special: dict[int, str] = {}
        self._anchor: list[int] = []
        if tokenizer is not None:
            added = tokenizer.get_added_tokens_decoder()
            self._special = {token_id: token.content for token_id, token in added.items() if token.special}
            # Some tokenizers drop a space at a text's beginning, which within a text is a space: decode behind a word.
            self._anchor = encode(tokenizer, "a")

    def pieces(self, ids: Sequence[int]) -> list[Piece]:
        """The pieces of a text, in order; together they hold each token once.

        Args:
            ids: tokens, and ``MASKED`` for each that is none yet.
        """
        found: list[Piece] = []
        begin = 0
        while begin < len(ids):
            found.append(self._piece(ids, begin))
            begin = found[-1].end
        return found

    def _piece(self, ids: Sequence[int], begin: int) -> Piece:
        first = ids[begin]
        if first == MASKED:
            return Piece("", begin, begin + 1, "masked")
        if self._tokenizer is None:
            return Piece(f"{first} ", begin, begin + 1)
        if first in self._special:
            return Piece(self._special[first], begin, begin + 1, "special")
        for end in range(begin + 1, min(len(ids), begin + _WIDEST_GROUP) + 1):
            if ids[end - 1] == MASKED or ids[end - 1] in self._special:
                break
            text = self._text(tuple(ids[begin:end]))
            if text and _UNREADABLE not in text:
                return Piece(text, begin, end)
            cut_off = len(text) - len(text.rstrip(_UNREADABLE))
            if not 0 < cut_off < _CHARACTER_BYTES or _UNREADABLE in text[:-cut_off]:
                break
        return Piece(f"⟨{first}⟩", begin, begin + 1, "broken")

    def _text(self, ids: tuple[int, ...]) -> str:
        """What tokens add to the text before them."""
        if ids not in self._texts:
            assert self._tokenizer is not None
            before = decode(self._tokenizer, self._anchor)
            self._texts[ids] = decode(self._tokenizer, [*self._anchor, *ids])[len(before) :]
        return self._texts[ids]
