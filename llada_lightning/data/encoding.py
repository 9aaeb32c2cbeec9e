"""Text to token ids and back: the one place where text is given to the tokenizers library.

A ``tokenizer.json`` of a stranger may hold a regular expression that backtracks for ever, or replacements that make of
one character a million. The library can be neither interrupted nor limited, and gives up with a panic. So only a
tokenizer whose every part is known to need time and memory in proportion to the text, byte-level BPE without a
normalizer, works in this process. Any other one works in a child process with limits of CPU time and memory, which is
ended where it exceeds them. Loading such a file is tried in a child process first.

The limits grow with the text, so that no honest tokenizer meets them. On systems other than Linux the limit of memory
may not be held.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import weakref
from collections import Counter
from collections.abc import Sequence
from typing import Any, cast

from tokenizers import Tokenizer

from llada_lightning.support.errors import UserError, panics_as_exceptions
from llada_lightning.support.printing import shortened
from llada_lightning.support.reading import parse_json

CPU_SECONDS = 20
"""CPU time of one request to the child process, on all cores together; loading a vocabulary of 250,000 takes 2."""

CHARACTERS_PER_CPU_SECOND = 50_000
"""Further CPU time by the length of the text; the slowest common tokenizers encode ten times as many."""

MEMORY_BYTES = 4 << 30
"""Memory of the child process; a vocabulary of 250,000 takes half a GiB."""

BYTES_PER_CHARACTER = 1 << 10
"""Further memory by the length of the text; the library holds about 100 bytes for each token."""

_CAUSE = ", by a regular expression or a replacement without bound"

# Runs in the child: one JSON object a line in, one out.
_CHILD = """\
import json, math, resource, signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
sys.path[:] = json.loads(sys.argv[1])
from tokenizers import Tokenizer

def limit(name, value):
    number = getattr(resource, name)
    most = resource.getrlimit(number)[1]
    resource.setrlimit(number, (value if most == resource.RLIM_INFINITY else min(value, most), most))

def load(text):
    global tokenizer
    tokenizer = Tokenizer.from_str(text)

def encode(texts, special, spelled):
    tokenizer.encode_special_tokens = spelled
    if len(texts) == 1:
        return [tokenizer.encode(texts[0], add_special_tokens=special).ids]
    return [encoding.ids for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=special)]

def offsets(text, spelled):
    tokenizer.encode_special_tokens = spelled
    encoding = tokenizer.encode(text, add_special_tokens=False)
    return [encoding.ids, encoding.offsets]

def decode(ids, skip):
    return tokenizer.decode_batch(ids, skip_special_tokens=skip)

for line in sys.stdin.buffer:
    call, arguments, seconds, memory = json.loads(line)
    used = resource.getrusage(resource.RUSAGE_SELF)
    limit("RLIMIT_CPU", math.ceil(used.ru_utime + used.ru_stime) + seconds)
    limit("RLIMIT_DATA", memory)
    try:
        answer = {"value": {"load": load, "encode": encode, "offsets": offsets, "decode": decode}[call](*arguments)}
    except BaseException as error:
        answer = {"error": " ".join(str(error).split())}
    sys.stdout.write(json.dumps(answer) + "\\n")
    sys.stdout.flush()
"""


def load(text: str, name: str) -> Tokenizer:
    """Returns the tokenizer of the text of a ``tokenizer.json``.

    Args:
        text: The text of the file.
        name: The name of the file, for messages.

    Raises:
        UserError: it is not a tokenizer, or loading it exceeds the limits.
    """
    record = parse_json(text, f"'{shortened(name)}'")
    if not _is_linear(record):
        child = _Child()
        try:
            child.load(text, name)
        finally:
            child.close()
    try:
        with panics_as_exceptions():
            return Tokenizer.from_str(text)
    except Exception as error:  # the library raises bare Exceptions
        raise _no_tokenizer(name, error) from error


def encode(tokenizer: Tokenizer, text: str, *, special: bool = False) -> list[int]:
    """Returns the ids of a text.

    Args:
        tokenizer: The tokenizer.
        text: The text.
        special: Whether the tokenizer's post-processor may add special tokens.

    Raises:
        UserError: the tokenizer cannot encode the text, or exceeds the limits.
    """
    return encode_batch(tokenizer, [text], special=special)[0]


def encode_batch(tokenizer: Tokenizer, texts: Sequence[str], *, special: bool = False) -> list[list[int]]:
    """Returns the ids of each text, encoded on several cores; see :func:`encode`."""
    size = sum(map(len, texts))
    child = _child_of(tokenizer)
    if child is not None:
        arguments = [list(texts), special, tokenizer.encode_special_tokens]
        return cast("list[list[int]]", child.ask("encode", arguments, size))
    try:
        with panics_as_exceptions():
            if len(texts) == 1:  # without the threads of a batch
                return [list(tokenizer.encode(texts[0], add_special_tokens=special).ids)]
            encodings = tokenizer.encode_batch_fast(list(texts), add_special_tokens=special)
            return [encoding.ids for encoding in encodings]
    except Exception as error:  # the library raises bare Exceptions
        raise _failure("encode", size, shortened(error)) from error


def encode_with_offsets(tokenizer: Tokenizer, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Returns the ids of a text, and where the characters of each begin and end; see :func:`encode`."""
    child = _child_of(tokenizer)
    if child is not None:
        ids, offsets = child.ask("offsets", [text, tokenizer.encode_special_tokens], len(text))
        return ids, [(begin, end) for begin, end in offsets]
    try:
        with panics_as_exceptions():
            encoding = tokenizer.encode(text, add_special_tokens=False)
    except Exception as error:  # the library raises bare Exceptions
        raise _failure("encode", len(text), shortened(error)) from error
    return list(encoding.ids), list(encoding.offsets)


def decode(tokenizer: Tokenizer, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
    """Returns the text of ids.

    Args:
        tokenizer: The tokenizer.
        ids: The ids; those that the tokenizer does not have are left out.
        skip_special_tokens: Whether special tokens are left out.

    Raises:
        UserError: the tokenizer cannot decode the ids, or exceeds the limits.
    """
    return decode_batch(tokenizer, [ids], skip_special_tokens=skip_special_tokens)[0]


def decode_batch(tokenizer: Tokenizer, ids: Sequence[Sequence[int]], *, skip_special_tokens: bool = True) -> list[str]:
    """Returns the text of each sequence of ids; see :func:`decode`."""
    size = sum(map(len, ids))
    child = _child_of(tokenizer)
    if child is not None:
        return cast("list[str]", child.ask("decode", [list(map(list, ids)), skip_special_tokens], size))
    try:
        with panics_as_exceptions():
            return tokenizer.decode_batch(list(map(list, ids)), skip_special_tokens=skip_special_tokens)
    except Exception as error:
        raise _failure("decode", size, shortened(error)) from error


def lost_bytes(text: str, decoded: str) -> int:
    """Returns how many bytes of a text its tokens do not give back.

    Counted are the characters that the one text has more often than the other, in UTF-8, of what is missing and of what
    was added the larger: the capitals of a tokenizer that lowers them, the white space that it joins or puts in, and
    all that it takes for unknown.

    Args:
        text: The text.
        decoded: The text of its ids, without special tokens.
    """
    if text == decoded:
        return 0
    had, has = Counter(text), Counter(decoded)
    missing, added = (
        sum(len(character.encode()) * count for character, count in difference.items())
        for difference in (had - has, has - had)
    )
    return min(max(missing, added, 1), len(text.encode()))


def _is_linear(record: Any) -> bool:
    """Whether a decoded ``tokenizer.json`` is byte-level BPE without a normalizer, whose regular expression is the
    library's own."""

    def kind(part: str) -> Any:
        value = record.get(part)
        return value.get("type") if isinstance(value, dict) else value

    return (
        isinstance(record, dict)
        and kind("normalizer") is None
        and kind("model") == "BPE"
        and kind("pre_tokenizer") == kind("decoder") == "ByteLevel"
    )


def _no_tokenizer(name: str, reason: object) -> UserError:
    return UserError(
        f"'{shortened(name)}' is not a tokenizer.json ({shortened(reason)}); give a file of the tokenizers library"
    )


def _failure(call: str, size: int, reason: str) -> UserError:
    what = f"a text of {size:,} characters" if call != "decode" else f"{size:,} tokens"
    return UserError(
        f"the tokenizer cannot {'decode' if call == 'decode' else 'encode'} {what}: {reason}; use another tokenizer"
    )


# --- the child process -----------------------------------------------------------------------------------------------

_children: weakref.WeakKeyDictionary[Tokenizer, _Child | None] = weakref.WeakKeyDictionary()


def _child_of(tokenizer: Tokenizer) -> _Child | None:
    """The child process of a tokenizer; None where it works in this process."""
    child = _children.get(tokenizer)
    forked = child is not None and child.owner != os.getpid()  # its lock and its pipes are those of the parent
    if tokenizer not in _children or forked:
        text = tokenizer.to_str()
        child = None if _is_linear(json.loads(text)) else _Child(text)
        _children[tokenizer] = child
    return child


class _Child:
    """A process that encodes and decodes for one tokenizer, begun when it is first asked.

    Args:
        text: of the ``tokenizer.json``; empty: :meth:`load` gives it.
    """

    def __init__(self, text: str = "") -> None:
        self._text = text
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self.owner = os.getpid()

    def load(self, text: str, name: str) -> None:
        """Loads a file.

        Raises:
            UserError: it is not a tokenizer, or loading it exceeds the limits.
        """
        self._begin()
        answer = self._exchange("load", [text], len(text))
        if "error" in answer:
            raise _no_tokenizer(name, answer["error"])
        if "end" in answer:
            raise UserError(f"'{shortened(name)}' cannot be loaded: {answer['end']}; use another tokenizer")

    def ask(self, call: str, arguments: list[Any], size: int) -> Any:
        """The result of a function of the child.

        Args:
            call: ``encode`` or ``decode``.
            arguments: of the function.
            size: characters or tokens.

        Raises:
            UserError: it fails, or exceeds the limits.
        """
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self.load(self._text, "tokenizer.json")
            answer = self._exchange(call, arguments, size)
        if "value" in answer:
            return answer["value"]
        raise _failure(call, size, shortened(answer.get("error") or answer["end"]))

    def close(self) -> None:
        """Ends the process."""
        process, self._process = self._process, None
        if process is not None:
            _end(process, self.owner)

    def _begin(self) -> None:
        self.close()
        self._process = subprocess.Popen(
            [sys.executable, "-c", _CHILD, json.dumps(sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # where a panic prints its stack
        )
        weakref.finalize(self, _end, self._process, self.owner)

    def _exchange(self, call: str, arguments: list[Any], size: int) -> dict[str, Any]:
        """The child's answer: its ``value``, its ``error``, or the ``end`` that it came to."""
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        seconds = CPU_SECONDS + size // CHARACTERS_PER_CPU_SECOND
        memory = MEMORY_BYTES + size * BYTES_PER_CHARACTER
        try:
            process.stdin.write(json.dumps([call, arguments, seconds, memory]).encode() + b"\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = b""
        except BaseException:  # an interrupt, after which the answer to this request must not be that of the next
            self.close()
            raise
        if line.endswith(b"\n"):
            return cast("dict[str, Any]", json.loads(line))
        code = process.wait()
        self.close()
        if code == -signal.SIGXCPU:
            return {"end": f"it takes more than {seconds} seconds of CPU time{_CAUSE}"}
        if code in (-signal.SIGABRT, -signal.SIGKILL, -signal.SIGSEGV):
            return {"end": f"it takes more than {memory >> 20:,} MiB of memory{_CAUSE}"}
        return {"end": f"its process ended with exit code {code}"}


def _end(process: subprocess.Popen[bytes], owner: int) -> None:
    if owner != os.getpid():
        return
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            try:
                pipe.close()
            except BrokenPipeError:
                continue
