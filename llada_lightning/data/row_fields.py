"""Which fields of a row of people's data are not read, so that none changes its meaning in silence.

A field that holds nothing (null, an empty text, list or object) counts as absent. A field that other tools make part of
a prompt or of an answer, and that cannot be used, is refused by its name. Any other field (``id``, ``source``, ...) is
not read, and one note on stderr names these fields and counts their rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from llada_lightning.errors import UserError
from llada_lightning.printing import shortened, warn_once

REFUSED = frozenset({
    "context", "contexts", "passage", "document", "documents", "tools", "functions", "tool_calls", "function_call",
    "tool_call_id", "reasoning", "reasoning_content", "thinking", "image", "images", "video", "videos", "audio",
    "audios", "chosen", "rejected", "loss_mask", "train_detail", "training_detail", "chat_template_kwargs",
})  # fmt: skip
"""What other tools make part of a prompt or an answer, or of what is learned, and what nothing here can use."""

REFUSED_BESIDE_PROMPTS = REFUSED | {
    "system", "system_prompt", "instruction", "input", "history", "messages", "conversations", "weight",
}  # fmt: skip
"""The same for files of prompts without dialogues."""

_MOST_NAMED = 12


class UnreadFields(Counter[str]):
    """Name of a field that is not read -> number of rows that have it."""

    def add_row(
        self, row: Mapping[str, Any], known: Collection[str], where: str, refused: Collection[str] = REFUSED
    ) -> None:
        """Counts the fields of a row that hold something and that are not known.

        Raises:
            UserError: one of them is to be refused; the message names it and the row's place.
        """
        others = [name for name in present_fields(row) if name not in known]
        for name in others:
            if name in refused:
                raise UserError(
                    f"{where}: has '{name}', which is not understood here; put it into the text, or remove it"
                )
        self.update(f"'{shortened(name, 60)}'" for name in others)

    def note(self, source: str) -> None:
        """Names the fields on stderr.

        Args:
            source: of the rows, for people.
        """
        if self:
            counted = [f"{name} ({rows} row{'s' * (rows > 1)})" for name, rows in self.most_common()]
            warn_once(f"note: {shortened(source)}: not read: {some(counted)}")


def present_fields(row: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a row that hold something."""
    return {name: value for name, value in row.items() if not _is_empty(value)}


def some(names: Iterable[str]) -> str:
    """Names, not too many of them."""
    listed = list(names)
    more = f" and {len(listed) - _MOST_NAMED} more" if len(listed) > _MOST_NAMED else ""
    return ", ".join(listed[:_MOST_NAMED]) + more


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, str | list | dict) and not value)
