"""A function in a process of its own that kills itself at a chosen call."""

from __future__ import annotations

import io
import os
import pkgutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any, Literal

import torch

from helpers.forked import exit_codes


@dataclass(frozen=True)
class At:
    """A moment: the ``count``-th call of a function.

    Args:
        function: `module:name`, as its callers look it up.
        count: from 1.
        when: before or after the call; `half`: of ``torch.save``, when half of the bytes are written.
    """

    function: str
    count: int
    when: Literal["before", "half", "after"] = "before"


def killed(moment: At, function: Callable[..., Any], *arguments: Any) -> bool:
    """Call a function in another process, which kills itself with SIGKILL at the moment; whether it came to that."""
    return exit_codes(_run, (moment, function, arguments)) == [-signal.SIGKILL]


def _run(moment: At, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    owner_name, _, name = moment.function.replace(":", ".").rpartition(".")
    owner = pkgutil.resolve_name(owner_name)
    original, calls = getattr(owner, name), 0

    @wraps(original)
    def deadly(*args: Any, **keywords: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls != moment.count:
            return original(*args, **keywords)
        if moment.when == "half":
            _write_half(*args)
        if moment.when == "after":
            original(*args, **keywords)
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError

    setattr(owner, name, deadly)
    function(*arguments)


def _write_half(content: Any, file: Any) -> None:
    whole = io.BytesIO()
    torch.serialization.save(content, whole)
    file.write(whole.getvalue()[: whole.tell() // 2])
    file.flush()
