"""Text of others within Markdown: seen as it is, whatever markup it spells."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from llada_lightning.support.printing import visible

_SPECIAL = re.compile(r"([\\`*_{}\[\]|~$#])")
"""Characters that begin something in Markdown wherever they stand; ``#`` does so at some places only.

``!`` begins nothing before an escaped bracket.
"""


def escaped(value: Any) -> Any:
    """Returns a text as plain text within a line of Markdown; what a template calls safe, and no text, as it is."""
    if not isinstance(value, str) or hasattr(value, "__html__"):
        return value
    text = visible(" ".join(value.split())).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = _SPECIAL.sub(r"\\\1", text)
    return re.sub(r"^(\d+)([.)] )|^([-+=])", _not_a_list, text)


def _not_a_list(found: re.Match[str]) -> str:
    """The beginning of a text that would be a list, or underline the line before it."""
    return f"{found[1]}\\{found[2]}" if found[1] else f"\\{found[3]}"


def markdown_environment(package: str) -> Environment:
    """Returns Jinja for the templates in the folder of a package, whose values are :func:`escaped`."""
    return template_environment(package, autoescape=False, finalize=escaped)


def template_environment(package: str, *, autoescape: bool, finalize: Callable[[Any], Any]) -> Environment:
    """Returns Jinja for the templates in the folder of a package; lines with nothing but a tag leave no line."""
    return Environment(
        loader=PackageLoader(package, "."), autoescape=autoescape, finalize=finalize,
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip


def tidied(text: str) -> str:
    """Returns a page without several empty lines in a row, and with one newline at its end."""
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"
