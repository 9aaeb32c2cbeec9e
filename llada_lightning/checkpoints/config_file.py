"""A ``config.json``: its values, each checked when it is asked for."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llada_lightning.errors import UserError
from llada_lightning.model.transformer import POSITIVE, is_positive
from llada_lightning.reading import read_json, shortened

CONFIG_NAME = "config.json"
GENERATION_CONFIG_NAME = "generation_config.json"

NO_TOKEN = -1
"""What some configurations give as the id of a token that the model does not have."""


def is_whole(value: Any, least: int) -> bool:
    """Whether a value is a whole number of 64 bits, and not too small."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 2**63


def mistake(key: str, value: Any, fix: str) -> UserError:
    """The error of a value that does not serve."""
    return UserError(f"{key} is {shortened(json.dumps(value))}; {fix}")


@dataclass(frozen=True)
class ConfigFile:
    """The values of a JSON file, and errors that name it.

    Args:
        path: of the file.
        values: what it holds.
    """

    path: Path
    values: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> ConfigFile:
        """The file's content.

        Raises:
            UserError: it cannot be read, or is not a JSON object.
        """
        values = read_json(path)
        if not isinstance(values, dict):
            raise UserError(f"'{path}' holds {type(values).__name__}, not an object; copy the checkpoint again")
        return cls(path, values)

    def get(self, key: str, absent: Any = None) -> Any:
        """The value of a key; ``absent`` where it is null or not there."""
        value = self.values.get(key)
        return absent if value is None else value

    def mistake(self, key: str, mend: str) -> UserError:
        """The error of a value that does not serve; it names the file."""
        return UserError(f"'{self.path}': {mistake(key, self.values.get(key), mend)}")

    def whole(self, key: str, absent: int | None = None, least: int = 1) -> int:
        """A whole number.

        Raises:
            UserError: it is none, too small, or missing without a value for that.
        """
        value = self.get(key, absent)
        if not is_whole(value, least):
            raise self.mistake(key, f"it must be a whole number of at least {least}")
        return int(value)

    def number(self, key: str, absent: float | None = None) -> float:
        """A positive number.

        Raises:
            UserError: it is none, or missing without a value for that.
        """
        value = self.get(key, absent)
        if not is_positive(value):
            raise self.mistake(key, POSITIVE)
        return float(value)

    def several(self, key: str) -> tuple[Any, ...]:
        """The values of a key that holds one, a list or null."""
        value = self.get(key, [])
        return tuple(value) if isinstance(value, list) else (value,)

    def token_ids(self, key: str) -> tuple[Any, ...]:
        """The token ids of a key that holds one, a list or null; -1 means that there is none, as in LLaMA-1's files."""
        return tuple(value for value in self.several(key) if is_whole(value, 0) or value != NO_TOKEN)

    def told_id(self, key: str, vocab_size: int) -> int | None:
        """A token id that only other programs use; None where it is null or -1.

        An id outside of the vocabulary is left out, too, with a note on stderr: the weights are whole without it.

        Raises:
            UserError: it is not a whole number.
        """
        value = self.get(key, NO_TOKEN)
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.mistake(key, f"it must be an id of the vocabulary, 0 to {vocab_size - 1}, or null")
        if 0 <= value < vocab_size:
            return value
        if value != NO_TOKEN:
            print(
                f"note: '{self.path}': {key} {shortened(value, 40)} is outside of the vocabulary of {vocab_size} and "
                "is left out; nothing uses it here",
                file=sys.stderr,
            )
        return None

    def refuse(self, required: dict[str, tuple[Any, ...]], absent: dict[str, Any]) -> None:
        """Refuse a model whose mathematics is another one than our Transformer's.

        Args:
            required: for each key the values that are ours; null is what the key's absence is.
            absent: what the absence of a key means, where it is not one of ours.

        Raises:
            UserError: names the key and its value.
        """
        for key, ours in required.items():
            value = self.get(key, absent.get(key, ours[0]))
            if value not in ours:
                known = " or ".join(json.dumps(v) for v in ours if v is not None) or "null"
                if key not in self.values:
                    raise UserError(
                        f"'{self.path}': {key} is absent, which means {json.dumps(value)}; only {known} is supported"
                    )
                raise self.mistake(key, f"only {known} is supported")


def read_generation_ends(folder: Path, vocab_size: int) -> tuple[int, ...]:
    """The ids in ``generation_config.json`` that end an answer; none without the file.

    Args:
        folder: of the model.
        vocab_size: of the model.

    Raises:
        UserError: the file cannot be read, or an id lies outside of the vocabulary.
    """
    path = folder / GENERATION_CONFIG_NAME
    if not path.is_file():
        return ()
    config = ConfigFile.read(path)
    ends = config.token_ids("eos_token_id")
    if not all(is_whole(end, 0) and end < vocab_size for end in ends):
        raise config.mistake("eos_token_id", f"it must hold ids of the vocabulary, 0 to {vocab_size - 1}")
    return ends
