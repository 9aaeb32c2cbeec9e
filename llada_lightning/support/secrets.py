"""Secrets stay out of what a run writes: an address that carries a password or a token is refused, and not repeated."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from llada_lightning.support.errors import UserError

_PASSWORD = re.compile(r"(?<=://)[^/@\s'\"]*:[^/@\s'\"]*(?=@)")
"""`user:password` of `scheme://user:password@host`."""
_TOKEN = re.compile(
    r"(?i)(?<=[?&;])((?:[\w-]*(?:token|secret|password|passwd|signature|credential|api-?_?key|accesskeyid))|sig|key)"
    r"=[^&;#\s'\"]+"
)
"""`token=…` and its like in an address's query, signed addresses of clouds included."""


def redacted(text: str) -> str:
    """The text with the secrets of its addresses left out."""
    return _TOKEN.sub(r"\1=***", _PASSWORD.sub("***", text))


def refuse_secrets(settings: dict[str, Any]) -> None:
    """Refuse settings that would put a secret into config.yaml, launch.yaml, logs and W&B.

    Args:
        settings: nested, as parsed.

    Raises:
        UserError: names the setting, and not its value.
    """
    for key, value in _texts(settings):
        if redacted(value) != value:
            raise UserError(
                f"{key}: the address holds a password or a token, which config.yaml and W&B would keep; put it into "
                "the environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, HF_TOKEN), and give the bare address"
            )


def _texts(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every text below a value, keys of mappings too, with the dotted name of its setting."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for name, item in value.items():
            yield key, str(name)
            name = name if isinstance(name, str) and name.isidentifier() else ""
            yield from _texts(item, f"{key}.{name}".strip("."))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _texts(item, key)
    elif not isinstance(value, (int, float, type(None))):
        yield key, str(value)
