"""Text to token ids and back: the one place where text is given to the tokenizers library.

A ``tokenizer.json`` of a stranger may hold a regular expression that backtracks for ever, or replacements that turn one
character into a million. The library can be neither interrupted nor limited, and fails with a panic. So only a
tokenizer whose every part is known to need time and memory in proportion to the text, byte-level BPE without a
normalizer, works in this process. Any other one works in a child process with limits of CPU time and memory. Loading
such a file is tried in a child process first.
"""

from __future__ import annotations

import json
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from itertools import chain
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from llada_lightning.support.errors import UserError, panics_as_exceptions
from llada_lightning.support.limited_process import CallError, LimitedProcess, ProcessEndedError
from llada_lightning.support.printing import shortened
from llada_lightning.support.reading import parse_json

if TYPE_CHECKING:
    import numpy as np

# The limits of one call of the child process. They grow with the text, so that no honest tokenizer reaches them.
CPU_SECONDS = 20  # of all threads; loading a vocabulary of 250,000 tokens takes 2
CHARACTERS_PER_CPU_SECOND = 50_000  # further time; the slowest common tokenizers encode ten times as many
MEMORY_BYTES = 4 << 30  # a vocabulary of 250,000 tokens takes half a GiB
BYTES_PER_CHARACTER = 1 << 10  # further memory; the library holds about 100 bytes for each token
BATCH_CHARS = 1 << 21  # characters encoded at once: enough to keep many cores busy, about 100 MB of memory


def load(text: str, name: str) -> Tokenizer:
    """Returns the tokenizer of the text of a ``tokenizer.json``; messages have the name of the file.

    Raises:
        UserError: The text is not a tokenizer, or loading it exceeds the limits.
    """
    record = parse_json(text, f"'{shortened(name)}'")
    if not _is_linear(record):
        process = _TokenizerProcess(text)
        try:
            process.call("run", ["decode", False, [[], True]], *_limits(0))
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
    """Returns the ids of a text; with the special tokens of the tokenizer's post-processor where ``special``.

    Raises:
        UserError: The tokenizer cannot encode the text, or exceeds the limits.
    """
    return encode_batch(tokenizer, [text], special=special)[0]


def encode_batch(tokenizer: Tokenizer, texts: Sequence[str], *, special: bool = False) -> list[list[int]]:
    """Returns the ids of each text, encoded on several cores; see :func:`encode`."""
    ids: list[list[int]] = _run(tokenizer, "encode", [list(texts), special], sum(map(len, texts)))
    return ids


def encode_with_offsets(tokenizer: Tokenizer, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Returns the ids of a text, and where the characters of each begin and end; see :func:`encode`."""
    ids, offsets = _run(tokenizer, "offsets", [text], len(text))
    return ids, [(begin, end) for begin, end in offsets]


def decode(tokenizer: Tokenizer, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
    """Returns the text of ids; those that the tokenizer does not have are left out.

    Raises:
        UserError: The tokenizer cannot decode the ids, or exceeds the limits.
    """
    return decode_batch(tokenizer, [ids], skip_special_tokens=skip_special_tokens)[0]


def decode_batch(tokenizer: Tokenizer, ids: Sequence[Sequence[int]], *, skip_special_tokens: bool = True) -> list[str]:
    """Returns the text of each sequence of ids; see :func:`decode`."""
    texts: list[str] = _run(tokenizer, "decode", [list(map(list, ids)), skip_special_tokens], sum(map(len, ids)))
    return texts


def _run(tokenizer: Tokenizer, name: str, arguments: list[Any], size: int) -> Any:
    """The result of a function of ``_FUNCTIONS``, of so many characters or tokens, in the process that may run it."""
    process = _process_of(tokenizer)
    # The library raises bare Exceptions. A child process that cannot be started is no fault of the tokenizer.
    failures: tuple[type[Exception], ...] = (Exception,) if process is None else (CallError, ProcessEndedError)
    try:
        if process is not None:
            return process.call("run", [name, tokenizer.encode_special_tokens, arguments], *_limits(size))
        with panics_as_exceptions():
            return _FUNCTIONS[name](tokenizer, *arguments)
    except failures as error:
        what = f"decode {size:,} tokens" if name == "decode" else f"encode a text of {size:,} characters"
        raise UserError(f"the tokenizer cannot {what}: {_reason(error, size)}; use another tokenizer") from error


def _encode(tokenizer: Tokenizer, texts: list[str], special: bool) -> list[list[int]]:
    if len(texts) == 1:  # without the threads of a batch
        return [tokenizer.encode(texts[0], add_special_tokens=special).ids]
    return [encoding.ids for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=special)]


def _offsets(tokenizer: Tokenizer, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    encoding = tokenizer.encode(text, add_special_tokens=False)
    return encoding.ids, encoding.offsets


def _decode(tokenizer: Tokenizer, ids: list[list[int]], skip_special_tokens: bool) -> list[str]:
    return tokenizer.decode_batch(ids, skip_special_tokens=skip_special_tokens)


_FUNCTIONS: dict[str, Callable[..., Any]] = {"encode": _encode, "offsets": _offsets, "decode": _decode}


def pieces(text: str, size: int = 1 << 16) -> Iterator[str]:
    """Cuts a long text into pieces of at most ``size`` characters that join to it again.

    The encoder holds about 100 bytes for each token of a text, and gives a text to one core; a document of a gigabyte
    would fill the memory. Where possible a cut is before a single space between two words: there pre-tokenizers like
    that of GPT-2, ours among them, cut anyway, so the tokens are those of the whole text. Elsewhere (no such space in
    65,536 characters, or another kind of tokenizer) the words at a cut may be tokenized differently than in the whole
    text, but always in the same way, and they decode to the same text.
    """
    begin = 0
    while len(text) - begin > size:
        end = _cut(text, begin, begin + size)
        yield text[begin:end]
        begin = end
    yield text[begin:] if begin else text


def _cut(text: str, begin: int, end: int) -> int:
    """The last good place to cut in (begin, end]."""
    space = text.rfind(" ", begin + 1, end)
    while space > begin:
        if not text[space - 1].isspace() and not text[space + 1].isspace():
            return space
        space = text.rfind(" ", begin + 1, space)
    newline = text.rfind("\n", begin + 1, end)
    return newline if newline > begin else end


class DocumentEncoder:
    """Encodes documents in batches to one stream of tokens, in which EOS ends each.

    A batch is encoded on another thread, outside Python's lock, while the next one is read.

    Args:
        tokenizer: The tokenizer.
        eos_id: The id of EOS.
        dtype: The dtype of the tokens.
        pool: The pool with that thread.
        append: The function that is called with the tokens of each batch, in order.
        decodes: Whether all tokens are decoded to count the bytes that do not come back.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        eos_id: int,
        dtype: str,
        pool: Executor,
        append: Callable[[np.ndarray], object],
        decodes: bool,
    ) -> None:
        self.documents = self.tokens = self.bytes = 0
        self.lost_bytes = 0 if decodes else None
        self._tokenizer, self._eos_id, self._dtype, self._pool, self._append = tokenizer, eos_id, dtype, pool, append
        self._batch: list[tuple[str, list[int]]] = []  # a piece of text, and the tokens behind it
        self._chars = 0
        self._running: Future[np.ndarray] | None = None

    def add(self, text: str, raw: bytes) -> None:
        """Adds a document: its text, and the same in UTF-8."""
        self.documents += 1
        self.bytes += len(raw)
        for piece in pieces(text):
            if self._chars >= BATCH_CHARS:
                self._flush()
            self._batch.append((piece, []))
            self._chars += len(piece)
        self._batch[-1][1].append(self._eos_id)

    def close(self) -> None:
        """Encodes what is left."""
        self._flush()
        self._flush()

    def _flush(self) -> None:
        """Takes the tokens of the last batch, and begins the next one."""
        if self._running is not None:
            tokens = self._running.result()
            self.tokens += len(tokens)
            self._append(tokens)
        self._running = self._pool.submit(self._encode, self._batch) if self._batch else None
        self._batch, self._chars = [], 0

    def _encode(self, batch: list[tuple[str, list[int]]]) -> np.ndarray:
        import numpy as np  # not in the child process: its threads reserve memory, which is limited there

        texts = [text for text, _ in batch]
        ids = encode_batch(self._tokenizer, texts)
        if self.lost_bytes is not None:
            self.lost_bytes += sum(map(lost_bytes, texts, decode_batch(self._tokenizer, ids)))
        whole = chain.from_iterable(chain(own, end) for own, (_, end) in zip(ids, batch, strict=True))
        return np.fromiter(whole, dtype=self._dtype)


def lost_bytes(text: str, decoded: str) -> int:
    """Returns how many bytes of a text its tokens do not give back.

    The count is the larger of two sums of UTF-8 bytes: of the characters that the text has more often than the decoded
    one, and of those that the decoded one has more often. So it includes capitals that a tokenizer lowers, white space
    that it joins or inserts, and unknown characters.
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


# --- the child process -----------------------------------------------------------------------------------------------

_processes: weakref.WeakKeyDictionary[Tokenizer, _TokenizerProcess | None] = weakref.WeakKeyDictionary()


def _process_of(tokenizer: Tokenizer) -> _TokenizerProcess | None:
    """The child process of a tokenizer; None: it works in this process."""
    if tokenizer not in _processes:
        text = tokenizer.to_str()
        _processes[tokenizer] = None if _is_linear(json.loads(text)) else _TokenizerProcess(text)
    return _processes[tokenizer]


class _TokenizerProcess(LimitedProcess):
    """A process that encodes and decodes for the tokenizer of one ``tokenizer.json``."""

    def __init__(self, text: str) -> None:
        super().__init__(__name__)
        self._text = text

    def prepare(self) -> None:
        self.exchange("load", [self._text], *_limits(len(self._text)))


def _limits(size: int) -> tuple[int, int]:
    """The seconds of CPU time and the bytes of memory for a number of characters or tokens."""
    return CPU_SECONDS + size // CHARACTERS_PER_CPU_SECOND, MEMORY_BYTES + size * BYTES_PER_CHARACTER


def _reason(error: Exception, size: int) -> str:
    seconds, memory = _limits(size)
    cause = ", by a regular expression or a replacement without bound"
    if isinstance(error, ProcessEndedError) and error.over_time:
        return f"it takes more than {seconds} seconds of CPU time{cause}"
    if isinstance(error, ProcessEndedError) and error.over_memory:
        return f"it takes more than {memory >> 20:,} MiB of memory{cause}"
    return shortened(error)


class _Served:
    """The tokenizer of a child process; only used there."""

    tokenizer: Tokenizer


def _load(text: str) -> None:
    _Served.tokenizer = Tokenizer.from_str(text)


def _run_served(name: str, encode_special_tokens: bool, arguments: list[Any]) -> Any:
    _Served.tokenizer.encode_special_tokens = encode_special_tokens
    return _FUNCTIONS[name](_Served.tokenizer, *arguments)


CALLS = {"load": _load, "run": _run_served}
"""The functions of a child process."""
