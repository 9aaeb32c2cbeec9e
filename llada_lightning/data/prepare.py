"""From a corpus to a folder that a model is trained on: tokenizer, tokens in litdata shards, manifest.

Documents go to ``train`` or ``val`` by a hash of their content, are tokenized, ended by EOS and joined to one stream
for each split (paper, B.1), which is cut into shards of equal length; documents run across shards. The result depends
on the corpus and the settings alone, not on the number of cores.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from llada_lightning.data.corpora import Corpus, open_corpus
from llada_lightning.data.encoding import decode_batch, encode_batch, lost_bytes
from llada_lightning.data.integrity import check_shards
from llada_lightning.data.manifest import (
    MANIFEST_NAME,
    SPLITS,
    TOKENIZER_NAME,
    Manifest,
    Split,
    TokenizerInfo,
    data_fingerprint,
    read_manifest,
)
from llada_lightning.data.prepare_progress import PrepareProgress
from llada_lightning.data.shards import ShardWriter, check_shard_tokens, token_dtype
from llada_lightning.data.tokenizers import load_tokenizer, pieces, tokenizer_info, train_tokenizer
from llada_lightning.support.errors import UserError
from llada_lightning.support.files import building

BATCH_CHARS = 1 << 21
"""Characters encoded at once: enough to keep many cores busy, about 100 MB while they are."""


@dataclass(frozen=True)
class PrepareSettings:
    """What decides a prepared folder's content beside its corpus; the arguments of :func:`prepare`."""

    vocab_size: int = 4096
    tokenizer: str | None = None
    text_field: str = "text"
    val_fraction: float = 0.02
    shard_tokens: int = 1 << 20
    max_documents: int | None = None
    max_bytes: int | None = None
    mask_token: str | None = None
    eos_token: str | None = None
    add_mask_token: bool = False
    document_separator: str | None = None
    tokenizer_bytes: int = 1 << 24

    def __post_init__(self) -> None:
        if not 0 < self.val_fraction < 1:
            raise UserError(f"validation fraction {self.val_fraction} must lie between 0 and 1; change --val-fraction")
        check_shard_tokens(self.shard_tokens)
        for name in ("max_documents", "max_bytes", "tokenizer_bytes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')} {value} is below 1; give at least 1")
        if self.tokenizer is None and (self.mask_token or self.eos_token or self.add_mask_token):
            raise UserError(
                "--mask-token, --eos-token and --add-mask-token belong to a given tokenizer; add --tokenizer, or leave "
                "them out (a trained one has [MASK] and [EOS])"
            )

    def record(self, given: TokenizerInfo | None) -> dict[str, Any]:
        """The settings for the manifest; a given tokenizer is known by its content, not by its place."""
        record = asdict(self)
        if given is not None:
            for name in ("vocab_size", "tokenizer_bytes", "mask_token", "eos_token", "add_mask_token"):
                del record[name]
            record["tokenizer"] = given.fingerprint
        return record


def prepare(
    source: str,
    out: str | os.PathLike[str],
    *,
    vocab_size: int = 4096,
    tokenizer: str | None = None,
    text_field: str = "text",
    val_fraction: float = 0.02,
    shard_tokens: int = 1 << 20,
    max_documents: int | None = None,
    max_bytes: int | None = None,
    mask_token: str | None = None,
    eos_token: str | None = None,
    add_mask_token: bool = False,
    document_separator: str | None = None,
    tokenizer_bytes: int = 1 << 24,
    progress: bool = True,
) -> Manifest:
    """Prepares a corpus for training; does nothing where ``out`` already holds the same.

    Args:
        source: ``python-stdlib``, a file, folder or pattern, or ``hf:NAME`` (see ``corpora``).
        out: the folder to write; it appears when it is complete.
        vocab_size: words of the byte-level BPE that is trained, special tokens included.
        tokenizer: instead: a ``tokenizer.json``, a folder with one, or a name on the Hugging Face hub.
        text_field: the field or column with the text (JSONL, datasets).
        val_fraction: share of the documents, by hash of their text, that goes to ``val``.
        shard_tokens: tokens of a shard; sequences are cut within shards.
        max_documents, max_bytes: reads no further than so many documents, bytes of text.
        mask_token, eos_token: the given tokenizer's special tokens, where they are not found by themselves.
        add_mask_token: adds [MASK] to a given tokenizer that has none.
        document_separator: splits each text (a text file, a line of JSONL, a row of a dataset) into documents.
        tokenizer_bytes: bytes of text from the beginning of the training documents that a tokenizer is trained on.
        progress: report on stderr.

    Returns:
        the manifest that stands in the folder.

    Raises:
        UserError: the source, the tokenizer, the settings or the folder is not right; nothing has been written.
    """
    settings = PrepareSettings(
        vocab_size=vocab_size,
        tokenizer=tokenizer,
        text_field=text_field,
        val_fraction=val_fraction,
        shard_tokens=shard_tokens,
        max_documents=max_documents,
        max_bytes=max_bytes,
        mask_token=mask_token,
        eos_token=eos_token,
        add_mask_token=add_mask_token,
        document_separator=document_separator,
        tokenizer_bytes=tokenizer_bytes,
    )
    folder = Path(os.path.realpath(os.path.expanduser(out)))  # a link's target is written, and on its own disk
    _check_outside(folder, source)
    corpus = open_corpus(source, text_field=text_field, document_separator=document_separator)
    given = None
    if tokenizer is not None:
        given = load_tokenizer(tokenizer, mask_token=mask_token, eos_token=eos_token, add_mask_token=add_mask_token)
    record = settings.record(given[1] if given else None)
    report = PrepareProgress(enabled=progress)
    present = _present(folder, corpus, record)
    if present is not None:
        report.line(f"'{out}' is already prepared with these settings; nothing to do")
        return present
    with building(folder) as partial, report, _tokenizer_threads():
        encoder, info = given or _train(corpus, settings, source, report)
        manifest = _write(corpus, settings, source, partial, encoder, info, record, report)
    report.finish(str(out), skipped=corpus.skipped)
    return manifest


def in_validation(raw: bytes, val_fraction: float) -> bool:
    """Whether a document goes to ``val``: by its content, so that all copies of a text are in one split.

    Args:
        raw: the document's text in UTF-8.
        val_fraction: expected share of distinct documents.
    """
    number = int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "big")
    return number / 2**64 < val_fraction


def _check_outside(out: Path, source: str) -> None:
    root = Path(os.path.realpath(os.path.expanduser(source)))
    if root.is_dir() and out.is_relative_to(root):
        raise UserError(
            f"output '{out}' lies in the source '{source}' and would become part of it; choose another --out"
        )


def _present(out: Path, corpus: Corpus, record: dict[str, Any]) -> Manifest | None:
    """The manifest of an ``out`` that holds what was asked for; None where there is nothing yet."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    try:
        manifest = read_manifest(out)
    except UserError as error:
        raise UserError(f"output '{out}' is there and is not a prepared data folder; choose another --out") from error
    if manifest.source["digest"] != corpus.identity["digest"]:
        raise UserError(
            f"output '{out}' was prepared from another (or changed) source; choose another --out, or delete it"
        )
    if manifest.settings != record:
        keys = sorted(set(record) | set(manifest.settings))
        other = [
            f"{key} {manifest.settings.get(key)!r}, now {record.get(key)!r}"
            for key in keys
            if manifest.settings.get(key) != record.get(key)
        ]
        raise UserError(
            f"output '{out}' was prepared with other settings ({'; '.join(other)}); choose another --out, or delete it"
        )
    check_shards(out, manifest)
    return manifest


@contextlib.contextmanager
def _tokenizer_threads() -> Iterator[None]:
    """Lets the encoder use all cores, unless the user said otherwise; undone after, for processes forked later."""
    if "TOKENIZERS_PARALLELISM" in os.environ:
        yield
        return
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    try:
        yield
    finally:
        os.environ.pop("TOKENIZERS_PARALLELISM", None)


def _limited(corpus: Corpus, settings: PrepareSettings) -> Iterator[tuple[str, bytes]]:
    """Documents as (text, UTF-8 bytes), up to the limits."""
    total = 0
    for number, text in enumerate(corpus.documents(), 1):
        raw = text.encode()
        total += len(raw)
        if settings.max_documents is not None and number > settings.max_documents:
            return
        if settings.max_bytes is not None and total > settings.max_bytes:
            return
        yield text, raw


def _train(
    corpus: Corpus, settings: PrepareSettings, source: str, report: PrepareProgress
) -> tuple[Tokenizer, TokenizerInfo]:
    """Trains a tokenizer on the beginning of the training documents: validation text has no part in it."""
    seen = {"train": 0, "val": 0}

    def sample() -> Iterator[str]:
        size = 0
        for text, raw in _limited(corpus, settings):
            if in_validation(raw, settings.val_fraction):
                seen["val"] += 1
                continue
            seen["train"] += 1
            yield text[: settings.tokenizer_bytes - size]
            size += len(raw)
            if size >= settings.tokenizer_bytes:
                return

    report.phase("training the tokenizer")
    tokenizer = train_tokenizer(sample(), settings.vocab_size)
    if not seen["train"]:
        _check_splits(seen, settings, source, corpus)
    return tokenizer, tokenizer_info(tokenizer)


def _check_splits(documents: dict[str, int], settings: PrepareSettings, source: str, corpus: Corpus) -> None:
    total = sum(documents.values())
    if not total:
        skipped = f" ({corpus.skipped} files are not text and were skipped)" if corpus.skipped else ""
        limits = ", or raise --max-bytes" if settings.max_bytes is not None else ""
        raise UserError(
            f"source '{source}' is empty: no document with text in it{skipped}; give one that has some{limits}"
        )
    for name in SPLITS:
        if not documents[name]:
            direction = "raise" if name == "val" else "lower"
            raise UserError(
                f"source '{source}' has {total} documents, none of them in '{name}' with a validation fraction of "
                f"{settings.val_fraction}; {direction} --val-fraction, give more documents, or split text files with "
                "--document-separator"
            )


class _SplitEncoder:
    """Encodes one split's documents in batches and appends them to its shards.

    A batch is encoded on a thread of its own, outside Python's lock, while the next one is read.

    Args:
        writer: of the split's shards.
        tokenizer: encodes.
        info: of the tokenizer.
        pool: of the one thread.
        decodes: whether to decode all that was encoded, and count the bytes that do not come back.
    """

    def __init__(
        self, writer: ShardWriter, tokenizer: Tokenizer, info: TokenizerInfo, pool: ThreadPoolExecutor, decodes: bool
    ) -> None:
        self.documents = 0
        self.bytes = 0
        self._lost_bytes = 0 if decodes else None
        self._writer, self._tokenizer, self._info, self._pool = writer, tokenizer, info, pool
        self._pieces: list[str] = []
        self._last: list[bool] = []
        self._chars = 0
        self._running: Future[np.ndarray] | None = None

    @property
    def tokens(self) -> int:
        return self._writer.tokens

    def add(self, text: str, raw: bytes) -> None:
        """Takes a document."""
        self.documents += 1
        self.bytes += len(raw)
        for piece in pieces(text):
            if self._chars >= BATCH_CHARS:
                self._flush()
            self._pieces.append(piece)
            self._last.append(False)
            self._chars += len(piece)
        self._last[-1] = True

    def close(self) -> Split:
        """Writes what is left; the split with all its shards."""
        self._flush()
        self._collect()
        shards = self._writer.close()
        return Split(self.documents, self._writer.tokens, self.bytes, shards, self._lost_bytes)

    def _flush(self) -> None:
        self._collect()
        if self._pieces:
            self._running = self._pool.submit(self._encode, self._pieces, self._last)
        self._pieces, self._last, self._chars = [], [], 0

    def _collect(self) -> None:
        if self._running is not None:
            self._writer.append(self._running.result())
            self._running = None

    def _encode(self, batch: list[str], last: list[bool]) -> np.ndarray:
        ids_of_pieces = encode_batch(self._tokenizer, batch)
        if self._lost_bytes is not None:
            self._lost_bytes += sum(map(lost_bytes, batch, decode_batch(self._tokenizer, ids_of_pieces)))
        end: tuple[list[int], list[int]] = ([], [self._info.eos_id])
        ids = chain.from_iterable(chain(ids, end[is_last]) for ids, is_last in zip(ids_of_pieces, last, strict=True))
        tokens = np.fromiter(ids, dtype=token_dtype(self._info.vocab_size))
        if self._info.mask_id is not None and (tokens == self._info.mask_id).any():
            raise UserError(
                f"the tokenizer encodes some text to its special token '{self._info.mask_token}', which only masking "
                "may write; use a tokenizer that has it as an added token, or another --mask-token"
            )
        return tokens


def _write(
    corpus: Corpus,
    settings: PrepareSettings,
    source: str,
    folder: Path,
    tokenizer: Tokenizer,
    info: TokenizerInfo,
    record: dict[str, Any],
    report: PrepareProgress,
) -> Manifest:
    """Writes tokenizer, shards and manifest into the (temporary) folder."""
    dtype = token_dtype(info.vocab_size)
    report.phase("tokenizing", total_bytes=corpus.total_bytes, max_bytes=settings.max_bytes)
    with ThreadPoolExecutor(max_workers=1) as pool:
        encoders = {
            name: _SplitEncoder(
                ShardWriter(folder, name, shard_tokens=settings.shard_tokens, dtype=dtype),
                tokenizer,
                info,
                pool,
                decodes=name == "val",  # whose loss is given in bits per byte
            )
            for name in SPLITS
        }
        for text, raw in _limited(corpus, settings):
            encoders["val" if in_validation(raw, settings.val_fraction) else "train"].add(text, raw)
            report.update(encoders.values(), corpus.position)
        _check_splits({name: encoder.documents for name, encoder in encoders.items()}, settings, source, corpus)
        splits = {name: encoder.close() for name, encoder in encoders.items()}
    report.update(splits.values(), corpus.position, force=True)
    if corpus.present_identity() != corpus.identity:
        raise UserError(f"source '{source}' changed while it was being read; run again when it rests")
    manifest = Manifest(
        source=corpus.identity,
        settings=record,
        tokenizer=info,
        dtype=dtype,
        splits=splits,
        fingerprint=data_fingerprint(splits, info.fingerprint),
        versions={name: version(name) for name in ("litdata", "tokenizers")},
    )
    try:
        (folder / TOKENIZER_NAME).write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
        (folder / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")
    except OSError as error:
        message = f"'{folder}' cannot be written ({error.strerror}); free space, or choose another --out"
        raise UserError(message) from error
    try:
        check_shards(folder, manifest)
    except UserError as error:
        raise UserError(f"files were removed or cut while they were being written: {error}") from error
    return manifest
