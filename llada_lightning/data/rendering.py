"""Jinja templates of strangers, rendered in a process of their own: bounded in time, memory and length.

A chat template is a program. Jinja's sandbox keeps it from files and from Python's internals, but not from counting to
10^9 or from writing "a" * 10^10. One process serves all renderings, since a corpus is rendered row by row.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from llada_lightning.support.limited_process import LimitedProcess, ProcessEndedError

CPU_SECONDS = 5.0  # of all renderings of one call; one rendering takes less than a millisecond
MEMORY_BYTES = 1 << 30  # of the process
EXTRA_CHARS = 1 << 20  # a rendering may be twice as long as what the template was given, and this much longer

_process = LimitedProcess(__name__)


class RenderingError(Exception):
    """A template that cannot be rendered; the message is one line and does not name the template."""


def render(template: str, renderings: Sequence[Mapping[str, Any]]) -> list[str | RenderingError]:
    """Renders a Jinja template as transformers renders a chat template, each time with variables of the types of JSON.

    Returns the text of each rendering, or the error that it raised.

    Raises:
        RenderingError: The renderings together exceed the time, or they end the process.
    """
    try:
        answers = _process.call("render", [template, list(renderings)], CPU_SECONDS, MEMORY_BYTES)
    except ProcessEndedError as error:
        if error.over_time:
            raise RenderingError(f"it takes more than {CPU_SECONDS:g} seconds") from error
        raise RenderingError(f"it ends the process that renders it (exit code {error.code})") from error
    except OSError as error:
        raise RenderingError(f"no process can be started to render it ({error.strerror})") from error
    return [RenderingError(answer["error"]) if "error" in answer else answer["text"] for answer in answers]


# --- in the process ---------------------------------------------------------------------------------------------------


def _render_all(template: str, renderings: list[dict[str, Any]]) -> list[dict[str, str]]:
    most = 2 * len(json.dumps([template, renderings])) + EXTRA_CHARS
    return [_answer(template, variables, most) for variables in renderings]


CALLS = {"render": _render_all}
"""The functions of the process."""


def _answer(template: str, variables: dict[str, Any], most: int) -> dict[str, str]:
    try:
        text = _compiled(template).render(variables)
        if len(text) > most:
            return {"error": f"it writes {len(text):,} characters, more than the {most:,} that are read"}
        text.encode()
        return {"text": text}
    except UnicodeEncodeError:
        return {"error": "it writes half of a surrogate pair, which is no character"}
    except MemoryError:
        return {"error": f"it needs more than {MEMORY_BYTES >> 20:,} MiB of memory"}
    except TemplateError as error:
        reason = str(error)
    except Exception as error:  # a template may raise whatever Python raises
        reason = f"{type(error).__name__}: {error}"
    return {"error": " ".join(reason[:1000].split())}


class _Generation(Extension):
    """``{% generation %}``, with which transformers marks the assistant's part; the body is rendered as it is."""

    tags = {"generation"}  # noqa: RUF012  # as Jinja declares it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


@lru_cache(maxsize=8)
def _compiled(template: str) -> Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(template)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """The filter without the escapes for HTML of Jinja's own."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> NoReturn:  # which templates call to refuse messages
    raise TemplateError(message)
