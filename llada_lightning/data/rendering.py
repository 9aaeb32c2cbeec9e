"""Jinja templates of strangers, rendered in a process of their own: bounded in time, memory and length.

A chat template is a program. Jinja's sandbox keeps it from files and from Python's internals, but not from counting to
10^9 or from writing "a" * 10^10. The process ends at its limits, even within one operation, and the next rendering
starts another. One process serves all renderings, since a corpus is rendered row by row.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

CPU_SECONDS = 5.0
"""Processor time of all renderings of one call; one rendering takes less than a millisecond."""
MEMORY_BYTES = 1 << 30
"""Address space of the process."""
EXTRA_CHARS = 1 << 20
"""A rendering may be twice as long as what the template was given, and this many characters longer."""


class RenderingError(Exception):
    """A template that cannot be rendered; the message is one line and does not name the template."""


def render(template: str, renderings: Sequence[Mapping[str, Any]]) -> list[str | RenderingError]:
    """Renders a template as transformers renders a chat template.

    Args:
        template: Jinja.
        renderings: The variables of each rendering, made of JSON's types.

    Returns:
        The text of each rendering, or the error that it raised.

    Raises:
        RenderingError: the renderings together exceed the time, or they end the process.
    """
    global _worker
    worker = _worker if _worker is not None and _worker.owner == os.getpid() else _Worker()
    _worker = None  # until the answer is complete: an interrupted one would be taken for that of the next call
    answers = worker.answers({"template": template, "renderings": list(renderings)})
    _worker = worker
    return [RenderingError(answer["error"]) if "error" in answer else answer["text"] for answer in answers]


class _Worker:
    """The process. It answers each line of JSON with a line, and ends with this object or this process."""

    def __init__(self) -> None:
        # -I: a module in the folder that the user is in is never imported; the path is that of this process.
        program = f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import serve; serve()"
        self.owner = os.getpid()
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-c", program, str(CPU_SECONDS), str(MEMORY_BYTES)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is meant for this process
            )
        except OSError as error:
            raise RenderingError(f"no process can be started to render it ({error.strerror})") from error
        weakref.finalize(self, _end, self._process, self.owner)

    def answers(self, request: dict[str, Any]) -> list[dict[str, str]]:
        assert self._process.stdin is not None and self._process.stdout is not None
        answer = b""
        with suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        if answer:
            found: list[dict[str, str]] = json.loads(answer)
            return found
        code = self._process.wait()
        if code == -signal.SIGPROF:
            raise RenderingError(f"it takes more than {CPU_SECONDS:g} seconds")
        raise RenderingError(f"it ends the process that renders it (exit code {code})")


_worker: _Worker | None = None


def _end(process: subprocess.Popen[bytes], owner: int) -> None:
    if os.getpid() != owner:  # a forked process has copies of the pipes, and no child to end
        return
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        assert stream is not None
        with suppress(OSError):  # what was not sent to a process that has ended
            stream.close()


# --- in the process ---------------------------------------------------------------------------------------------------


def serve() -> None:
    """Answers the lines of stdin until it is closed. The arguments are the limits of time and memory."""
    seconds, memory = float(sys.argv[1]), int(sys.argv[2])
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # which ends the process
    for limit, value in ((resource.RLIMIT_AS, memory), (resource.RLIMIT_CORE, 0)):
        hard = resource.getrlimit(limit)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        with suppress(ValueError, OSError):  # macOS refuses limits of address space
            resource.setrlimit(limit, (value, value))
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_PROF, seconds)
        request = json.loads(line)
        most = 2 * len(line) + EXTRA_CHARS
        answers = [_answer(request["template"], variables, most) for variables in request["renderings"]]
        answer = json.dumps(answers).encode()
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.buffer.write(answer + b"\n")
        sys.stdout.buffer.flush()


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
        return {"error": f"it needs more than {resource.getrlimit(resource.RLIMIT_AS)[0] >> 20:,} MiB of memory"}
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
    """Unlike Jinja's own filter: without escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> NoReturn:
    """What templates call where they refuse messages."""
    raise TemplateError(message)
