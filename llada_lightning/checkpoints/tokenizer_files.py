"""A tokenizer in a checkpoint's folder: the files to carry along, and the settings in them that inference uses."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from llada_lightning.checkpoints.description import GENERATION_CONFIG_NAME, Description
from llada_lightning.data.encoding import encode
from llada_lightning.data.manifest import TOKENIZER_NAME, local_path
from llada_lightning.data.tokenizers import (
    KNOWN_EOS_TOKENS,
    KNOWN_MASK_TOKENS,
    as_special,
    named_tokens,
    tokenizer_file,
    tokenizer_from_text,
    without_special_beyond,
)
from llada_lightning.support.errors import UserError
from llada_lightning.support.printing import warn
from llada_lightning.support.reading import parse_json, read_text

TOKENIZER_CONFIG_NAME = "tokenizer_config.json"
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
        tokenizer: The tokenizer, which never turns text into one of its special tokens.
        files: The contents by name of ``tokenizer.json`` and of the files beside it.
        named: The tokens ``eos_token`` and ``mask_token``, as the files name them.
        name: The name of the tokenizer, for messages.
    """

    tokenizer: Tokenizer
    files: dict[str, bytes]
    named: dict[str, str]
    name: str

    @classmethod
    def of_text(cls, text: str, name: str) -> TokenizerFiles:
        """The files of a ``tokenizer.json`` alone.

        Raises:
            UserError: it is not a tokenizer.
        """
        return cls(tokenizer_from_text(text, name), {TOKENIZER_NAME: text.encode()}, {}, name)

    @classmethod
    def of_path(cls, spec: str | Path) -> TokenizerFiles:
        """The files of a ``tokenizer.json``, a folder with one, or a name on the hub, with the files beside it.

        Raises:
            UserError: there is none.
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
        """The same with the chat template that a local folder keeps beside it, if any, and the roles of its tokens."""
        place = local_path(folder)
        paths = [] if place is None else [Path(place) / name for name in (TEMPLATE_NAME, ROLES_NAME)]
        found = {path.name: path.read_bytes() for path in paths if path.is_file()}
        return replace(self, files={**self.files, **found})

    @cached_property
    def named_ids(self) -> dict[str, int]:
        """Ids of ``eos_token`` and ``mask_token``: named by the files, else by the usual names."""
        found = {key: self._candidates(key) for key in _KNOWN}
        return {key: ids[0] for key, ids in found.items() if ids}

    def _candidates(self, key: str) -> list[int]:
        ids = (self.tokenizer.token_to_id(token) for token in (self.named.get(key, ""), *_KNOWN[key]))
        return [token_id for token_id in ids if token_id is not None]

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """``tokenizer_config.json``; empty where there is none.

        Raises:
            UserError: it is not a JSON object.
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
        """Special tokens by role (``bos_token``, ``eos_token``, ...), as the files name them; "": they name none.

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
        """The template in the file beside the tokenizer, else in its configuration; of several, the default.

        Raises:
            UserError: it is no text.
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
        """The token ids before a text: by ``add_bos_token``, else by the tokenizer's own post-processor."""
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
        """Tokens that end an answer besides those of the model: the configuration's EOS, the end of a turn."""
        template = self.chat_template or ""
        tokens = [self.named.get("eos_token", ""), *(token for token in _TURN_ENDS if token in template)]
        ids = (self.tokenizer.token_to_id(token) for token in tokens)
        return tuple(token_id for token_id in ids if token_id is not None)

    def fitted(self, description: Description, given: bool, known: bool = False) -> TokenizerFiles:
        """The tokenizer fitted to a model: its special tokens are found, and no text becomes one of them.

        Args:
            description: The description of the model.
            given: Whether the user gave the tokenizer. The model's own folder may name another EOS in its configuration
                (a turn's).
            known: Whether the tokenizer is the model's, by its fingerprint.

        Raises:
            UserError: the tokenizer has other special ids than the model, or ids that the model lacks.
        """
        mend = "give the model's own with --tokenizer"
        tokenizer, left_out = without_special_beyond(self.tokenizer, description.vocab_size)
        if not known and not set(description.end_token_ids) & set(self._candidates("eos_token")):
            tokenizer, left_out = self.tokenizer, []  # nothing shows that it is the model's
        largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        if largest >= description.vocab_size:
            raise UserError(
                f"tokenizer '{self.name}' has ids up to {largest}, the model only {description.vocab_size}; {mend}"
            )
        ids = {"eos_token": description.eos_token_id, "mask_token": description.mask_token_id}
        for key, token_id in ids.items():
            if token_id is None:
                continue
            title = {"eos_token": "EOS", "mask_token": "[MASK]"}[key]
            if tokenizer.id_to_token(token_id) is None:
                raise UserError(
                    f"tokenizer '{self.name}' has {largest + 1} ids and no {token_id}, the model's {title}; {mend}"
                )
            alike = {token_id} if key == "mask_token" else set(description.end_token_ids)
            others = self._candidates(key)
            if (given or key == "mask_token") and others and not alike & set(others):
                raise UserError(f"tokenizer '{self.name}' has {title} as {others[0]}, the model as {token_id}; {mend}")
        if left_out:
            warn(
                f"note: tokenizer '{self.name}': {', '.join(left_out)} is left out, because the model has no embedding "
                f"for ids from {description.vocab_size} on; text is encoded as before"
            )
        special = [i for i in (*description.end_token_ids, description.mask_token_id) if i is not None]
        return replace(self, tokenizer=_with_special(tokenizer, special))

    def files_for(self, description: Description) -> dict[str, bytes]:
        """The files to write beside a model; with a configuration for transformers where there is none."""
        if TOKENIZER_CONFIG_NAME in self.files:
            return self.files
        ids = {
            "bos_token": description.bos_token_id,
            "eos_token": description.eos_token_id,
            "pad_token": description.eos_token_id if description.pad_token_id is None else description.pad_token_id,
            "mask_token": description.mask_token_id,
        }
        tokens = {key: self.tokenizer.id_to_token(i) for key, i in ids.items() if i is not None}
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": description.context_length,
            "clean_up_tokenization_spaces": False,
            **{key: token for key, token in tokens.items() if token is not None},
        }
        return {**self.files, TOKENIZER_CONFIG_NAME: (json.dumps(config, indent=2) + "\n").encode()}


def _with_special(tokenizer: Tokenizer, ids: list[int]) -> Tokenizer:
    added = tokenizer.get_added_tokens_decoder()
    plain = [i for i in ids if not (i in added and added[i].special)]
    tokens = tuple(token for token in map(tokenizer.id_to_token, plain) if token is not None)
    return as_special(tokenizer, tokens) if tokens else tokenizer
