"""Corpora -> tokens -> litdata shards -> batches. The facts of a tokenizer are here: to read them takes no library."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache

from llada_lightning.support.files import json_sha256

TOKENIZER_NAME = "tokenizer.json"
TOKENIZER_CONFIG_NAME = "tokenizer_config.json"
TEMPLATE_NAME = "chat_template.jinja"
ROLES_NAME = "special_tokens_map.json"
MANIFEST_NAME = "manifest.json"  # of a prepared data folder, which names the tokenizer's special tokens, too


@dataclass(frozen=True)
class TokenizerInfo:
    """What a model has to know about its tokenizer.

    Args:
        vocab_size: The largest id plus one, special tokens included.
        eos_token: The name of the token that ends every document.
        eos_id: The id of that token.
        mask_token: The name of [MASK], which no text is ever encoded to; None: an objective without masks is trained.
        mask_id: The id of [MASK]; None with ``mask_token``.
        fingerprint: The SHA-256 of the tokenizer's content and special ids.
    """

    vocab_size: int
    eos_token: str
    eos_id: int
    mask_token: str | None
    mask_id: int | None
    fingerprint: str


@lru_cache(maxsize=2)  # a large vocabulary takes a second, and a run asks at each of its phases
def tokenizer_fingerprint(text: str, eos_id: int, mask_id: int | None) -> str:
    """Returns the SHA-256 of the content of a ``tokenizer.json``, whatever its layout, and of its special ids.

    Raises:
        ValueError: The text is not JSON.
    """
    return json_sha256({"tokenizer": json.loads(text), "eos_id": eos_id, "mask_id": mask_id})
