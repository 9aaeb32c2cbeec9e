"""Text to token ids and back: the one place where text is given to the tokenizers library.

A ``tokenizer.json`` of a stranger may hold a regular expression that backtracks for ever, or replacements that turn one
character into a million. The library can be neither interrupted nor limited, and fails with a panic. So only a
tokenizer whose every part is known to need time and memory in proportion to the text, byte-level BPE without a
normalizer, works in this process. Any other one works in a child process with limits of CPU time and memory. Loading
such a file is tried in a child process first.

The limits grow with the text, so that no honest tokenizer reaches them.
"""

from __future__ import annotations

import json
import weakref
from collections import Counter
from collections.abc import Sequence
from typing import Any, cast

from tokenizers import Tokenizer

from llada_lightning.support.errors import UserError, panics_as_exceptions
from llada_lightning.support.limited_process import CallError, LimitedProcess, ProcessEndedError
from llada_lightning.support.printing import shortened
from llada_lightning.support.reading import parse_json

CPU_SECONDS = 20
"""CPU time of one call of the child process, of all threads; loading a vocabulary of 250,000 tokens takes 2."""

CHARACTERS_PER_CPU_SECOND = 50_000
"""Further CPU time by the length of the text; the slowest common tokenizers encode ten times as many."""

MEMORY_BYTES = 4 << 30
"""Memory of the child process; a vocabulary of 250,000 tokens takes half a GiB."""

BYTES_PER_CHARACTER = 1 << 10
"""Further memory by the length of the text; the library holds about 100 bytes for each token."""

_CAUSE = ", by a regular expression or a replacement without bound"


def load(text: str, name: str) -> Tokenizer:
    """Returns the tokenizer of the text of a ``tokenizer.json``.

    Args:
        text: The text of the file.
        name: The name of the file, for messages.

    Raises:
        UserError: the text is not a tokenizer, or loading it exceeds the limits.
    """
    record = parse_json(text, f"'{shortened(name)}'")
    if not _is_linear(record):
        process = _TokenizerProcess(text)
        try:
            process.call("decode", [[], True], *_limits(0))
        except CallError as error:
            raise _not_a_tokenizer(name, error) from error
        except ProcessEndedError as error:
            reason = _reason(error, len(text))
            raise UserError(f"'{shortened(name)}' cannot be loaded: {reason}; use another tokenizer") from error
        finally:
            process.close()
    try:
        with panics_as_exceptions():
            return Tokenizer.from_str(text)
    except Exception as error:  # the library raises bare Exceptions
        raise _not_a_tokenizer(name, error) from error


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
    process = _process_of(tokenizer)
    if process is not None:
        arguments = [list(texts), special, tokenizer.encode_special_tokens]
        return cast("list[list[int]]", process.ask("encode", arguments, size))
    try:
        with panics_as_exceptions():
            return _ids(tokenizer, list(texts), special)
    except Exception as error:  # the library raises bare Exceptions
        raise _failure("encode", size, shortened(error)) from error


def _ids(tokenizer: Tokenizer, texts: list[str], special: bool) -> list[list[int]]:
    if len(texts) == 1:  # without the threads of a batch
        return [tokenizer.encode(texts[0], add_special_tokens=special).ids]
    return [encoding.ids for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=special)]


def encode_with_offsets(tokenizer: Tokenizer, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Returns the ids of a text, and where the characters of each begin and end; see :func:`encode`."""
    process = _process_of(tokenizer)
    if process is not None:
        ids, offsets = process.ask("offsets", [text, tokenizer.encode_special_tokens], len(text))
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
        ids: The ids. Those that the tokenizer does not have are left out.
        skip_special_tokens: Whether special tokens are left out.

    Raises:
        UserError: the tokenizer cannot decode the ids, or exceeds the limits.
    """
    return decode_batch(tokenizer, [ids], skip_special_tokens=skip_special_tokens)[0]


def decode_batch(tokenizer: Tokenizer, ids: Sequence[Sequence[int]], *, skip_special_tokens: bool = True) -> list[str]:
    """Returns the text of each sequence of ids; see :func:`decode`."""
    size = sum(map(len, ids))
    process = _process_of(tokenizer)
    if process is not None:
        return cast("list[str]", process.ask("decode", [list(map(list, ids)), skip_special_tokens], size))
    try:
        with panics_as_exceptions():
            return tokenizer.decode_batch(list(map(list, ids)), skip_special_tokens=skip_special_tokens)
    except Exception as error:
        raise _failure("decode", size, shortened(error)) from error


def lost_bytes(text: str, decoded: str) -> int:
    """Returns how many bytes of a text its tokens do not give back.

    The count is the larger of two sums of UTF-8 bytes: of the characters that the text has more often than the decoded
    one, and of those that the decoded one has more often. So it includes capitals that a tokenizer lowers, white space
    that it joins or inserts, and unknown characters.

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


def _not_a_tokenizer(name: str, reason: object) -> UserError:
    return UserError(
        f"'{shortened(name)}' is not a tokenizer.json ({shortened(reason)}); give a file of the tokenizers library"
    )


def _failure(call: str, size: int, reason: str) -> UserError:
    what = f"a text of {size:,} characters" if call != "decode" else f"{size:,} tokens"
    return UserError(
        f"the tokenizer cannot {'decode' if call == 'decode' else 'encode'} {what}: {reason}; use another tokenizer"
    )


# --- the child process -----------------------------------------------------------------------------------------------

_processes: weakref.WeakKeyDictionary[Tokenizer, _TokenizerProcess | None] = weakref.WeakKeyDictionary()


def _process_of(tokenizer: Tokenizer) -> _TokenizerProcess | None:
    """The child process of a tokenizer; None: it works in this process."""
    if tokenizer not in _processes:
        text = tokenizer.to_str()
        _processes[tokenizer] = None if _is_linear(json.loads(text)) else _TokenizerProcess(text)
    return _processes[tokenizer]


class _TokenizerProcess(LimitedProcess):
    """A process that encodes and decodes for one tokenizer.

    Args:
        text: The text of the ``tokenizer.json``.
    """

    def __init__(self, text: str) -> None:
        super().__init__(__name__)
        self._text = text

    def prepare(self) -> None:
        self.exchange("load", [self._text], *_limits(len(self._text)))

    def ask(self, name: str, arguments: list[Any], size: int) -> Any:
        """Returns the result of a function of ``CALLS``.

        Args:
            name: The name of the function.
            arguments: The arguments of the function.
            size: The number of characters or tokens.

        Raises:
            UserError: the tokenizer fails, or exceeds the limits.
        """
        try:
            return self.call(name, arguments, *_limits(size))
        except (CallError, ProcessEndedError) as error:
            raise _failure(name, size, _reason(error, size)) from error


def _limits(size: int) -> tuple[int, int]:
    """The seconds of CPU time and the bytes of memory for a number of characters or tokens."""
    return CPU_SECONDS + size // CHARACTERS_PER_CPU_SECOND, MEMORY_BYTES + size * BYTES_PER_CHARACTER


def _reason(error: CallError | ProcessEndedError, size: int) -> str:
    seconds, memory = _limits(size)
    if isinstance(error, ProcessEndedError) and error.over_time:
        return f"it takes more than {seconds} seconds of CPU time{_CAUSE}"
    if isinstance(error, ProcessEndedError) and error.over_memory:
        return f"it takes more than {memory >> 20:,} MiB of memory{_CAUSE}"
    return shortened(error)


class _Served:
    """The tokenizer of a child process; only used there."""

    tokenizer: Tokenizer


def _load(text: str) -> None:
    _Served.tokenizer = Tokenizer.from_str(text)


def _encode(texts: list[str], special: bool, spelled: bool) -> list[list[int]]:
    _Served.tokenizer.encode_special_tokens = spelled
    return _ids(_Served.tokenizer, texts, special)


def _offsets(text: str, spelled: bool) -> tuple[list[int], list[tuple[int, int]]]:
    _Served.tokenizer.encode_special_tokens = spelled
    encoding = _Served.tokenizer.encode(text, add_special_tokens=False)
    return encoding.ids, encoding.offsets


def _decode(ids: list[list[int]], skip: bool) -> list[str]:
    return _Served.tokenizer.decode_batch(ids, skip_special_tokens=skip)


CALLS = {"load": _load, "encode": _encode, "offsets": _offsets, "decode": _decode}
"""The functions of a child process."""
