"""Corpora: the sources of documents. Everything streams; memory holds one document, never the corpus.

A source is one argument of the command line:

- ``python-stdlib``: the running interpreter's own library, a corpus that every machine has;
- a text file, a JSONL file (``.jsonl``, ``.ndjson``, ``.json`` with one object a line), or a folder of such files, read
  recursively in sorted order; each plain or compressed (``.gz``, ``.xz``, ``.bz2``, ``.zst``);
- a pattern (``books/*.txt``) of such files;
- ``igsm:COUNT[@SEED]``: generated mathematics problems with their solutions, the same for the same seed;
- ``facts:COUNT[@SEED]``: invented facts, each stated in one order only, the same for the same seed;
- ``hf:NAME[:CONFIG][@SPLIT]``: a dataset of the Hugging Face hub, or ``hf:FOLDER[@SPLIT]``: one on this machine.

Sources that make their own documents are rows of :data:`SOURCES`; `docs/extending.md` adds one.
"""

from __future__ import annotations

import glob
import hashlib
import os
import platform
import sysconfig
import tokenize
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from llada_lightning.data.generated import FactsSource, GeneratedSource, IgsmSource
from llada_lightning.data.text_files import (
    READ_ERRORS,
    Meter,
    is_text,
    json_documents,
    split_text,
    suffixes_of,
    text_documents,
)
from llada_lightning.support.errors import UserError, panics_as_exceptions
from llada_lightning.support.files import expanded
from llada_lightning.support.printing import shortened

PYTHON_STDLIB = "python-stdlib"
HUB_PREFIX = "hf:"
_SAMPLED_BYTES = 1 << 16
_FOREIGN_FOLDERS = frozenset({"site-packages", "dist-packages", "__pycache__"})
_TABLE_SUFFIXES = frozenset({".parquet", ".arrow"})

FileLister = Callable[[], Iterator[tuple[str, Path]]]
"""Yields (relative path, path) of each file, sorted. It is called for every pass, so that no list is held."""


class UnreadableError(Exception):
    """A file that this kind of corpus leaves out."""


class Corpus(ABC):
    """A stream of documents that can be read more than once.

    Attributes:
        identity: The facts that distinguish this corpus from others, whatever its path; ``digest`` is their hash.
        total_bytes: The number of bytes of the source as stored, where it is known in advance.
        skipped: The number of files of the last pass without readable text.
    """

    identity: dict[str, Any]
    total_bytes: int | None = None
    skipped: int = 0

    @abstractmethod
    def documents(self) -> Iterator[str]:
        """Yields each document that holds more than white space, in the order of the source."""

    @property
    def position(self) -> int:
        """The number of bytes of the source, as stored, that the current pass has read."""
        return 0

    def present_identity(self) -> dict[str, Any]:
        """Returns the identity of the source as it is now, which differs if it has changed since it was opened."""
        return self.identity


class FileCorpus(Corpus):
    """Documents from listed files, each read by a function; files that are not text may be left out (of folders)."""

    def __init__(
        self,
        list_files: FileLister,
        read: Callable[[Path, Meter], Iterator[str]],
        *,
        skip_binary: bool,
        facts: dict[str, Any],
    ) -> None:
        self._list_files, self._read, self._skip_binary, self._facts = list_files, read, skip_binary, facts
        self._meter = Meter()
        self.identity = self.present_identity()
        self.total_bytes = self.identity["bytes"]

    def present_identity(self) -> dict[str, Any]:
        return {**self._facts, **file_identity(self._list_files, self._facts)}

    @property
    def position(self) -> int:
        return self._meter.position

    def documents(self) -> Iterator[str]:
        self._meter = Meter()
        self.skipped = 0
        for _, path in self._list_files():
            try:
                if self._skip_binary and not is_text(path):
                    self.skipped += 1
                    continue
                yield from (text for text in self._read(path, self._meter) if not text.isspace() and text)
            except UnreadableError:
                self.skipped += 1
            except READ_ERRORS as error:
                raise UserError(f"{path}: cannot be read ({error}); repair or remove the file") from error


class DatasetCorpus(Corpus):
    """Documents from a Hugging Face dataset, streamed: ``NAME[:CONFIG][@SPLIT]`` or ``FOLDER[@SPLIT]``.

    The default split is ``train``. Without a separator each row is one document.
    """

    def __init__(self, spec: str, text_field: str, separator: str | None = None) -> None:
        self._spec, self._text_field, self._separator = spec, text_field, separator
        where, _, split = spec.rpartition("@") if "@" in spec else (spec, "", "")
        self._split = split or "train"
        self._path = expanded(where)
        name, _, config = where.partition(":")
        if self._path.exists():
            self.identity = self._identity_of_files()
            self._load_args: dict[str, Any] = _local_dataset(self._path)
        else:
            # The hub's revision is left out: a rerun that does nothing should need no network.
            facts: dict[str, Any] = {"kind": "dataset", "name": name, "config": config or None, "split": self._split}
            self.identity = {**facts, "digest": digest_of(facts)}
            self._load_args = {"path": name, "name": config or None}

    def _identity_of_files(self) -> dict[str, Any]:
        """A dataset on this machine is known by its files, like every other corpus of files."""
        facts: dict[str, Any] = {"kind": "dataset", "split": self._split}
        return {**facts, **file_identity(lambda: list_path(self._path), facts)}

    def present_identity(self) -> dict[str, Any]:
        return self._identity_of_files() if "files" in self.identity else self.identity

    def documents(self) -> Iterator[str]:
        for row in self.rows():
            for text in split_text(self._text_of(row), self._separator):
                if text and not text.isspace():
                    yield text

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yields the rows of the dataset; a UserError where it cannot be read."""
        try:
            import datasets
        except ImportError as error:
            fix = "install it with: pip install 'llada-lightning[hf]'"
            raise UserError(f"source '{HUB_PREFIX}{self._spec}' needs the package 'datasets'; {fix}") from error
        try:
            with panics_as_exceptions():
                yield from datasets.load_dataset(**self._load_args, split=self._split, streaming=True)
        except Exception as error:  # the library's own mistakes, the hub's, the network's, those of remote Parquet
            raise UserError(
                f"source '{HUB_PREFIX}{self._spec}' cannot be read ({type(error).__name__}: {shortened(error)}); "
                "check the name, configuration, split and network, or give a local folder"
            ) from error

    def _text_of(self, row: dict[str, Any]) -> str:
        name = self._text_field
        if name not in row:
            has = f"no column '{name}'; it has: {', '.join(row)}; name it with --text-field"
            raise UserError(f"source '{HUB_PREFIX}{self._spec}': {has}")
        text = "" if row[name] is None else row[name]
        if not isinstance(text, str):
            holds = f"column '{name}' holds {type(text).__name__}, not text; name another with --text-field"
            raise UserError(f"source '{HUB_PREFIX}{self._spec}': {holds}")
        return text


class GeneratedCorpus(Corpus):
    """Documents that a program makes.

    Args:
        facts: The facts that distinguish these documents from others: the kind of source, its arguments, the version of
            the program.
        generate: The function that yields the documents from the first one on, the same in every call.
    """

    def __init__(self, facts: dict[str, Any], generate: Callable[[], Iterator[str]]) -> None:
        self._generate = generate
        self.identity = {**facts, "digest": digest_of(facts)}

    def documents(self) -> Iterator[str]:
        return self._generate()


def _local_dataset(path: Path) -> dict[str, Any]:
    """The arguments of ``load_dataset`` for a folder, or for one file by its suffix."""
    if path.is_dir():
        return {"path": str(path)}
    builder = {".parquet": "parquet", ".arrow": "arrow", ".csv": "csv", ".txt": "text"}.get(path.suffix, "json")
    return {"path": builder, "data_files": str(path)}


def digest_of(facts: dict[str, Any]) -> str:
    """Returns the SHA-256 of facts in sorted order."""
    return hashlib.sha256(repr(sorted(facts.items())).encode()).hexdigest()


def file_identity(list_files: FileLister, facts: dict[str, Any]) -> dict[str, Any]:
    """Returns the number, the bytes and the digest of files: of their relative names, their sizes and their ends.

    Neither the place nor the time of modification counts, so a copy on another machine is the same corpus. Only the
    first and the last 64 KiB of a file are read, which keeps a rerun over a large corpus quick. A change in the middle
    of a file above 128 KiB that keeps its size is not seen. The digest begins with that of the given facts.
    """
    digest = hashlib.sha256(digest_of(facts).encode())
    count = total = 0
    for name, path in list_files():
        try:
            size = path.stat().st_size
            with open(path, "rb") as file:
                head = file.read(_SAMPLED_BYTES)
                file.seek(max(len(head), size - _SAMPLED_BYTES))
                tail = file.read()
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}); repair or remove the file") from error
        digest.update(f"{name}\0{size}\0".encode("utf-8", "surrogateescape"))
        digest.update(hashlib.sha256(head + tail).digest())
        count += 1
        total += size
    return {"files": count, "bytes": total, "digest": digest.hexdigest()}


def list_folder(
    folder: Path, prefix: str = "", keep: Callable[[str], bool] = lambda _: True
) -> Iterator[tuple[str, Path]]:
    """Yields the files under a folder, sorted by relative path, without hidden names and links to folders.

    The names of one folder are held at a time, not those of the whole tree. ``keep`` decides by its name whether a file
    or a folder (with ``/`` behind it) is listed.
    """
    try:
        with os.scandir(folder) as entries:
            # With a slash behind the folders, the order by name is the order of the relative paths.
            named = sorted((entry.name + "/" * entry.is_dir(follow_symlinks=False), entry.path) for entry in entries)
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror}); repair or remove the folder") from error
    for name, path in named:
        if name.startswith(".") or not keep(name):
            continue
        if name.endswith("/"):
            yield from list_folder(Path(path), prefix + name, keep)
        elif os.path.isfile(path):
            yield prefix + name, Path(path)


def list_path(path: Path) -> Iterator[tuple[str, Path]]:
    """Yields the files of a folder, or the file itself; a UserError for a pipe, a device or a socket."""
    if path.is_dir():
        yield from list_folder(path)
    elif path.exists() and not path.is_file():
        # A corpus is read several times, to its end: a pipe gives it once, and a device may have no end.
        raise UserError(f"'{path}' is a pipe or a device, not a file; write its text to a file, and give that one")
    else:
        yield path.name, path


def _python_documents(path: Path, meter: Meter) -> Iterator[str]:
    """Yields the text of a Python file, decoded by its own coding line, as the interpreter would."""
    try:
        with tokenize.open(path) as file:
            text = file.read()
    except (SyntaxError, UnicodeDecodeError, LookupError) as error:
        raise UnreadableError(str(path)) from error  # the library's tests hold files that are broken on purpose
    meter.finished += path.stat().st_size
    yield text


def _stdlib_corpus(source: str) -> FileCorpus:
    if source != PYTHON_STDLIB:
        raise UserError(f"source '{source}' is not known; write {PYTHON_STDLIB} alone")
    root = Path(sysconfig.get_paths()["stdlib"])

    def wanted(name: str) -> bool:
        return name.endswith(".py") or (name.endswith("/") and name[:-1] not in _FOREIGN_FOLDERS)

    # Beside the version the files count: some distributions leave out the library's tests.
    facts = {"kind": PYTHON_STDLIB, "python": f"{platform.python_implementation()} {platform.python_version()}"}
    return FileCorpus(lambda: list_folder(root, keep=wanted), _python_documents, skip_binary=False, facts=facts)


def _generated_corpus(made: GeneratedSource) -> GeneratedCorpus:
    facts = {"kind": made.kind, "count": made.count, "seed": made.seed, "version": made.version}
    return GeneratedCorpus(facts, made.documents)


SOURCES: dict[str, Callable[[str], Corpus]] = {
    PYTHON_STDLIB: _stdlib_corpus,
    IgsmSource.kind: lambda source: _generated_corpus(IgsmSource.of(source)),
    FactsSource.kind: lambda source: _generated_corpus(FactsSource.of(source)),
}
"""The sources that make their own documents: the part of the argument before the first colon -> a function of the whole
argument that opens the corpus. Files and datasets are none of them: they have fields and separators."""


def register(prefix: str, opener: Callable[[str], Corpus]) -> None:
    """Add a source to the table.

    Args:
        prefix: The part of the argument before the first colon.
        opener: A function of the whole argument, such as ``squares:100``, that opens the corpus. It raises
            :class:`UserError` where the argument is written in another way.

    Raises:
        UserError: Another source has this prefix.
    """
    if prefix == HUB_PREFIX.removesuffix(":") or SOURCES.get(prefix, opener) is not opener:
        raise UserError(f"source: the prefix '{prefix}' has a source already; choose another prefix")
    SOURCES[prefix] = opener


def open_corpus(source: str, *, text_field: str = "text", document_separator: str | None = None) -> Corpus:
    """Returns the corpus of a source.

    Args:
        source: The name of the source, as the beginning of this module lists them.
        text_field: The field (JSONL) or column (dataset) that holds the text.
        document_separator: The text between the documents of a text file, of a line of JSONL or of a row of a dataset;
            None: each is one document.

    Raises:
        UserError: The source is not known or cannot be listed, or its documents cannot be split by a separator.
    """
    if document_separator == "":
        raise UserError("document separator '' is empty; give at least one character, or leave it out")
    opener = SOURCES.get(source.partition(":")[0])
    if opener is not None:
        if document_separator is not None:
            raise UserError(f"--document-separator does nothing with the source '{source}'; leave it out")
        return opener(source)
    if source.startswith(HUB_PREFIX):
        return DatasetCorpus(source[len(HUB_PREFIX) :], text_field, document_separator)
    path = expanded(source)
    if path.suffix in _TABLE_SUFFIXES:
        raise UserError(f"source '{source}': tables are read as datasets; write '{HUB_PREFIX}{source}'")
    facts = {"kind": "files"}

    def reader(path: Path, meter: Meter) -> Iterator[str]:
        if suffixes_of(path)[0] in (".jsonl", ".ndjson", ".json"):
            texts = json_documents(path, meter, text_field)
            return (document for text in texts for document in split_text(text, document_separator))
        return text_documents(path, meter, document_separator)

    if path.exists():
        return FileCorpus(lambda: list_path(path), reader, skip_binary=path.is_dir(), facts=facts)
    matches = sorted(name for name in glob.glob(str(path), recursive=True) if os.path.isfile(name))
    if not matches:
        raise UserError(
            f"source '{source}' is not known: no such file, folder or pattern; give {PYTHON_STDLIB}, a text or .jsonl "
            f"file, a folder of them, or {HUB_PREFIX}NAME"
        )
    base = os.path.commonpath([os.path.dirname(match) or "." for match in matches])
    named = [(os.path.relpath(match, base), Path(match)) for match in matches]
    return FileCorpus(lambda: iter(named), reader, skip_binary=False, facts=facts)


def documents(source: str, *, text_field: str = "text", document_separator: str | None = None) -> Iterator[str]:
    """Yields the documents of a source; arguments and errors as :func:`open_corpus`."""
    return open_corpus(source, text_field=text_field, document_separator=document_separator).documents()
