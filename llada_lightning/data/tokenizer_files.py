"""A tokenizer with the files beside it: what is copied with it, and what the files say about its use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from llada_lightning.data.encoding import encode
from llada_lightning.data.manifest import TOKENIZER_NAME, local_path
from llada_lightning.data.tokenizers import (
    KNOWN_EOS_TOKENS,
    KNOWN_MASK_TOKENS,
    named_tokens,
    tokenizer_file,
    tokenizer_from_text,
)
from llada_lightning.support.errors import UserError
from llada_lightning.support.reading import parse_json, read_text

TOKENIZER_CONFIG_NAME = "tokenizer_config.json"
GENERATION_CONFIG_NAME = "generation_config.json"
TEMPLATE_NAME = "chat_template.jinja"
ROLES_NAME = "special_tokens_map.json"
_COMPANIONS = (TOKENIZER_CONFIG_NAME, ROLES_NAME, TEMPLATE_NAME, GENERATION_CONFIG_NAME)
_TURN_ENDS = ("<|eot_id|>", "<|im_end|>")
"""Tokens that end a turn where a chat template has them, whatever the configuration calls EOS."""
_KNOWN = {"eos_token": KNOWN_EOS_TOKENS, "mask_token": KNOWN_MASK_TOKENS}


@dataclass(frozen=True)
class TokenizerFiles:
    """A tokenizer and the files it came in.

    Args:
        tokenizer: The tokenizer. Text never becomes one of its special tokens.
        files: The content of ``tokenizer.json`` and of the files beside it, by file name.
        named: The names of ``eos_token`` and ``mask_token`` in the files.
        name: The name of the tokenizer, for messages.
    """

    tokenizer: Tokenizer
    files: dict[str, bytes]
    named: dict[str, str]
    name: str

    @classmethod
    def of_text(cls, text: str, name: str) -> TokenizerFiles:
        """Returns the tokenizer of a ``tokenizer.json`` without other files.

        Args:
            text: The text of the file.
            name: The name of the file, for messages.

        Raises:
            UserError: it is not a tokenizer.
        """
        return cls(tokenizer_from_text(text, name), {TOKENIZER_NAME: text.encode()}, {}, name)

    @classmethod
    def of_path(cls, spec: str | Path) -> TokenizerFiles:
        """Returns a tokenizer with the files beside it.

        Args:
            spec: The path of a ``tokenizer.json`` or of a folder with one, or a name on the Hugging Face hub.

        Raises:
            UserError: there is no such tokenizer, or a file cannot be read.
        """
        path = tokenizer_file(str(spec))
        try:
            alone = cls.of_text(read_text(path), str(path))
            beside = {name: path.with_name(name) for name in _COMPANIONS}
            files = {name: file.read_bytes() for name, file in beside.items() if file.is_file()}
            named = named_tokens(path.parent)
        except (OSError, UnicodeDecodeError, RecursionError) as error:
            raise UserError(f"tokenizer '{path}' cannot be read ({error}); give a tokenizer.json") from error
        return replace(alone, files={**alone.files, **files}, named=named)

    def with_template_of(self, folder: str) -> TokenizerFiles:
        """Returns the same with the chat template and the roles of special tokens that a local folder holds, if any."""
        place = local_path(folder)
        paths = [] if place is None else [Path(place) / name for name in (TEMPLATE_NAME, ROLES_NAME)]
        found = {path.name: path.read_bytes() for path in paths if path.is_file()}
        return replace(self, files={**self.files, **found})

    @cached_property
    def named_ids(self) -> dict[str, int]:
        """The ids of ``eos_token`` and ``mask_token``: by the names in the files, else by the common names."""
        found = {key: self.candidates(key) for key in _KNOWN}
        return {key: ids[0] for key, ids in found.items() if ids}

    def candidates(self, key: str) -> list[int]:
        """Returns the ids that may be ``eos_token`` or ``mask_token``: the named one first, then the common names."""
        ids = (self.tokenizer.token_to_id(token) for token in (self.named.get(key, ""), *_KNOWN[key]))
        return [token_id for token_id in ids if token_id is not None]

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """The content of ``tokenizer_config.json``; empty where there is no such file.

        Raises:
            UserError: the file is not a JSON object.
        """
        return self._object(TOKENIZER_CONFIG_NAME)

    def _object(self, companion: str) -> Mapping[str, Any]:
        try:
            values = parse_json(self.files.get(companion, b"{}"), companion)
        except UserError as error:
            raise self._damaged(companion) from error
        if not isinstance(values, dict):
            raise self._damaged(companion)
        return values

    @cached_property
    def special_tokens(self) -> dict[str, str]:
        """The special tokens by role (``bos_token``, ...) as the files name them; "" where a file says there is none.

        Raises:
            UserError: a file is not a JSON object.
        """
        files = [self.config, self._object(ROLES_NAME)]
        if "added_tokens_decoder" not in self.config:  # then transformers, too, believes special_tokens_map.json first
            files.reverse()
        found: dict[str, str] = {}
        for key, value in (item for file in files for item in file.items() if item[0].endswith("_token")):
            token = value.get("content") if isinstance(value, dict) else value
            if isinstance(token, str) or token is None:
                found[key] = found.get(key) or token or ""
        return {**self.named, **found}

    def _damaged(self, companion: str, what: str = "is damaged; copy it again") -> UserError:
        return UserError(f"'{self.name}': {companion} beside it {what}")

    @property
    def chat_template(self) -> str | None:
        """The chat template: the file beside the tokenizer, else that of its configuration (of several, the default).

        Raises:
            UserError: the template is not text.
        """
        if TEMPLATE_NAME in self.files:
            try:
                return self.files[TEMPLATE_NAME].decode("utf-8-sig")
            except UnicodeDecodeError as error:
                raise self._damaged(TEMPLATE_NAME, "is not UTF-8; copy it again") from error
        template = self.config.get("chat_template")
        try:
            if isinstance(template, list):
                template = {entry["name"]: entry["template"] for entry in template}.get("default")
            if not isinstance(template, str | None):
                raise TypeError
        except (TypeError, LookupError) as error:
            what = "has a chat_template that is neither text nor a list of named ones; correct it"
            raise self._damaged(TOKENIZER_CONFIG_NAME, what) from error
        return template

    @property
    def prefix_ids(self) -> tuple[int, ...]:
        """The ids before a text: by ``add_bos_token``, else those that the tokenizer's post-processor adds."""
        bos = self.config.get("bos_token")
        bos = bos.get("content") if isinstance(bos, dict) else bos
        bos_id = self.tokenizer.token_to_id(bos) if isinstance(bos, str) else None
        adds = self.config.get("add_bos_token")
        if adds is False:
            return ()
        if adds is True and bos_id is not None:
            return (bos_id,)
        plain, full = (encode(self.tokenizer, "a", special=add) for add in (False, True))
        starts = [i for i in range(len(full)) if full[i : i + len(plain)] == plain]
        return tuple(full[: starts[0]]) if plain and starts else ()

    @property
    def end_ids(self) -> tuple[int, ...]:
        """The ids that end an answer besides those of the model: the configuration's EOS and the end of a turn."""
        template = self.chat_template or ""
        tokens = [self.named.get("eos_token", ""), *(token for token in _TURN_ENDS if token in template)]
        ids = (self.tokenizer.token_to_id(token) for token in tokens)
        return tuple(token_id for token_id in ids if token_id is not None)
