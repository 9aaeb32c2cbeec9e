"""Documents and rows of one file: text or JSONL, plain or compressed, read as a stream.

No field of a row is left out in silence. A field that holds nothing (null, an empty text, list or object) counts as
absent. A field that other tools make part of a prompt or of an answer, and that cannot be used here, is refused by its
name. Any other field (``id``, ``source``, ...) is not read, and one note on stderr names these fields and counts their
rows.
"""

from __future__ import annotations

import bz2
import codecs
import contextlib
import gzip
import io
import lzma
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from llada_lightning.support.errors import UserError
from llada_lightning.support.printing import shortened, warn_once
from llada_lightning.support.reading import parse_json

MAX_TEXT_DOCUMENT = 1 << 28  # characters of a document of a text file, which is held in memory as a whole
MAX_JSON_LINE = 1 << 30  # bytes of a line of a JSONL file, which is held in memory as a whole
_READ_CHARS = 1 << 20
_SNIFFED_BYTES = 1 << 13


class BrokenZstdError(Exception):
    """A zstd file that is damaged or cut short."""


READ_ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError, BrokenZstdError)
"""The errors of reading a missing, forbidden, damaged or cut file."""


@dataclass
class Meter:
    """The number of bytes, as stored, that have been read of a corpus of files."""

    finished: int = 0
    current: BinaryIO | None = None

    @property
    def position(self) -> int:
        return self.finished + (self.current.tell() if self.current else 0)


class _ZstdReader(io.RawIOBase):
    """Decompresses zstd frames. Unlike zstandard's own reader it reports a file that ends inside a frame."""

    def __init__(self, raw: BinaryIO) -> None:
        import zstandard

        self._error = zstandard.ZstdError
        self._decompressor = zstandard.ZstdDecompressor()
        self._frame: Any = None
        self._raw = raw
        self._compressed = b""
        self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            self._compressed = self._compressed or self._raw.read(1 << 16)
            if not self._compressed:
                if self._frame is not None:
                    raise BrokenZstdError("the zstd stream ends inside a frame")
                return 0
            self._decompress()
        size = min(len(buffer), len(self._ready))
        buffer[:size], self._ready = self._ready[:size], self._ready[size:]
        return size

    def _decompress(self) -> None:
        self._frame = self._frame or self._decompressor.decompressobj()
        try:
            self._ready = self._frame.decompress(self._compressed)
        except self._error as error:
            raise BrokenZstdError(str(error)) from error
        self._compressed = b""
        if self._frame.eof:
            self._compressed, self._frame = self._frame.unused_data, None


def suffixes_of(path: Path) -> tuple[str, str]:
    """Returns the suffix that tells the kind of a file, and the suffix of its compression or "", in lower case."""
    last = path.suffix.lower()
    if last in _DECOMPRESSED and last:
        return Path(path.stem).suffix.lower(), last
    return last, ""


_DECOMPRESSED: dict[str, Callable[[BinaryIO], Any]] = {
    "": lambda raw: raw,
    ".gz": lambda raw: gzip.GzipFile(fileobj=raw),
    ".xz": lzma.LZMAFile,
    ".bz2": bz2.BZ2File,
    ".zst": lambda raw: io.BufferedReader(_ZstdReader(raw), 1 << 17),
}
"""The decompressed bytes of an opened file, by its suffix."""


@contextlib.contextmanager
def _opened(path: Path, meter: Meter) -> Iterator[BinaryIO]:
    """A file's bytes, decompressed; the meter follows the compressed position."""
    with open(path, "rb") as raw:
        meter.current = raw
        try:
            yield _DECOMPRESSED[suffixes_of(path)[1]](raw)
        finally:
            meter.finished, meter.current = meter.position, None


def is_text(path: Path) -> bool:
    """Returns whether a file begins as UTF-8 text without NUL bytes."""
    with _opened(path, Meter()) as stream:
        head = stream.read(_SNIFFED_BYTES)
    try:
        # An incremental decoder lets the last character be cut by the end of the sample.
        codecs.getincrementaldecoder("utf-8")().decode(head, final=len(head) < _SNIFFED_BYTES)
    except UnicodeDecodeError:
        return False
    return b"\0" not in head


def text_documents(path: Path, meter: Meter, separator: str | None) -> Iterator[str]:
    """Yields the documents of a UTF-8 text file, one without a separator; line ends become ``\\n``.

    Raises:
        UserError: The file is not UTF-8, or a document is longer than ``MAX_TEXT_DOCUMENT``.
    """
    with _opened(path, meter) as stream:
        text = io.TextIOWrapper(stream, encoding="utf-8-sig")
        try:
            yield from _split(text, separator, path) if separator else _whole(text, path)
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: is not UTF-8 text ({error.reason}); convert it, or leave it out") from error
        finally:
            with contextlib.suppress(ValueError):
                text.detach()  # or its end would close the file under the meter


def _whole(text: io.TextIOWrapper, path: Path) -> Iterator[str]:
    document = text.read(MAX_TEXT_DOCUMENT + 1)
    if len(document) > MAX_TEXT_DOCUMENT:
        raise UserError(
            f"{path}: is one document of more than {MAX_TEXT_DOCUMENT} characters; "
            "give --document-separator to split it"
        )
    yield document


def _split(text: io.TextIOWrapper, separator: str, path: Path) -> Iterator[str]:
    rest = ""
    while block := text.read(_READ_CHARS):
        # Only the new part is searched, plus as much of the old as can hold the separator's beginning.
        searched = max(0, len(rest) - len(separator) + 1)
        rest += block
        begin = 0
        while (end := rest.find(separator, max(begin, searched))) >= 0:
            yield rest[begin:end]
            begin = end + len(separator)
        rest = rest[begin:]
        if len(rest) > MAX_TEXT_DOCUMENT:
            raise UserError(
                f"{path}: has more than {MAX_TEXT_DOCUMENT} characters without the separator {separator!r}; give "
                "another --document-separator"
            )
    yield rest


def split_text(text: str, separator: str | None) -> list[str]:
    """Returns the documents of a text; without a separator the text is one document."""
    return text.split(separator) if separator else [text]


def json_documents(path: Path, meter: Meter, text_field: str) -> Iterator[str]:
    """Yields the named field of the JSON object of each line; empty lines are skipped.

    Raises:
        UserError: A line is not a JSON object, or lacks the field, or the field holds something other than text.
    """
    for where, record in json_records(path, meter):
        if not isinstance(record, dict):
            raise UserError(f"{where}: holds {type(record).__name__}, not a JSON object; write one object a line")
        if text_field not in record:
            keys = ", ".join(record) or "nothing"
            raise UserError(f"{where}: no field '{text_field}'; the line has: {keys}; name it with --text-field")
        text = record[text_field]
        if not isinstance(text, str):
            holds = f"field '{text_field}' holds {type(text).__name__}, not text"
            raise UserError(f"{where}: {holds}; name another with --text-field")
        yield without_surrogates(text)


def json_records(path: Path, meter: Meter) -> Iterator[tuple[str, Any]]:
    """Yields the place of each line (`FILE:LINE`) and its JSON value; empty lines are skipped.

    Raises:
        UserError: A line is not JSON, gives a key twice, or has more than ``MAX_JSON_LINE`` bytes.
    """
    with _opened(path, meter) as stream:
        for number, line in enumerate(iter(lambda: stream.readline(MAX_JSON_LINE + 1), b""), 1):
            if len(line) > MAX_JSON_LINE:
                raise UserError(f"{path}:{number}: has more than {MAX_JSON_LINE} bytes; write one object a line")
            if not line.strip():
                continue
            where = f"{path}:{number}"
            yield where, parse_json(line, where, number)


def without_surrogates(text: str) -> str:
    """Returns a text with U+FFFD for lone surrogates, which JSON can write (``\\ud800``) and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


REFUSED = frozenset({
    "context", "contexts", "passage", "document", "documents", "tools", "functions", "tool_calls", "function_call",
    "tool_call_id", "reasoning", "reasoning_content", "thinking", "image", "images", "video", "videos", "audio",
    "audios", "chosen", "rejected", "loss_mask", "train_detail", "training_detail", "chat_template_kwargs",
})  # fmt: skip
"""The fields that other tools make part of a prompt or an answer, or of what is learned, and that are not used here."""

REFUSED_BESIDE_PROMPTS = REFUSED | {
    "system", "system_prompt", "instruction", "input", "history", "messages", "conversations", "weight",
}  # fmt: skip
"""The same for files with prompts instead of dialogues."""


class UnreadFields(Counter[str]):
    """The number of rows that have a field which is not read, by the name of the field."""

    def add_row(
        self, row: Mapping[str, Any], known: Collection[str], where: str, refused: Collection[str] = REFUSED
    ) -> None:
        """Counts the fields of a row that hold something and are not known; a UserError for one that is refused."""
        others = [name for name in present_fields(row) if name not in known]
        for name in others:
            if name in refused:
                raise UserError(
                    f"{where}: has '{name}', which is not understood here; put it into the text, or remove it"
                )
        self.update(f"'{shortened(name, 60)}'" for name in others)

    def note(self, source: str) -> None:
        """Prints the names of the fields on stderr."""
        if self:
            counted = [f"{name} ({rows} row{'s' * (rows > 1)})" for name, rows in self.most_common()]
            warn_once(f"note: {shortened(source)}: not read: {some(counted)}")


def present_fields(row: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of a row that hold something."""
    return {name: value for name, value in row.items() if value is not None and value not in ("", [], {})}


def some(names: Iterable[str]) -> str:
    """Returns a list of names as text, cut after the first twelve."""
    listed = list(names)
    more = f" and {len(listed) - 12} more" if len(listed) > 12 else ""
    return ", ".join(listed[:12]) + more
