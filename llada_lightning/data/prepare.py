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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from llada_lightning.data import MANIFEST_NAME, TOKENIZER_NAME, TokenizerInfo
from llada_lightning.data.corpora import Corpus, open_corpus
from llada_lightning.data.display import PrepareProgress
from llada_lightning.data.encoding import DocumentEncoder
from llada_lightning.data.manifest import (
    SPLITS,
    Manifest,
    Split,
    data_fingerprint,
    read_manifest,
)
from llada_lightning.data.shards import MOST_SHARD_TOKENS, ShardWriter, check_shards
from llada_lightning.data.tokenizers import (
    load_tokenizer,
    tokenizer_info,
    train_tokenizer,
)
from llada_lightning.support.errors import UserError
from llada_lightning.support.files import building


@dataclass(frozen=True)
class PrepareSettings:
    """What decides the content of a prepared folder besides its corpus.

    Args:
        vocab_size: The size of the byte-level BPE vocabulary that is trained, special tokens included.
        tokenizer: The tokenizer that is used instead of a trained one: a ``tokenizer.json``, a folder with one, or a
            name on the Hugging Face hub.
        text_field: The field (JSONL) or column (datasets) that holds the text.
        val_fraction: The share of the documents, by the hash of their text, that goes to ``val``.
        shard_tokens: The number of tokens of a shard; sequences are cut within shards.
        max_documents: The largest number of documents that is read; None: no limit.
        max_bytes: The largest number of bytes of text that is read; None: no limit.
        mask_token: The name of the given tokenizer's mask token; None: found by its configuration or common names.
        eos_token: The name of the given tokenizer's end-of-text token, found in the same way.
        add_mask_token: Whether [MASK] is added to a given tokenizer that has none.
        document_separator: The text that separates the documents of a text file, a line of JSONL or a row of a dataset;
            None: each is one document.
        tokenizer_bytes: The number of bytes, from the beginning of the training documents, that a tokenizer is trained
            on.

    Raises:
        UserError: A setting is out of range, or two do not fit together.
    """

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
        if not 1 <= self.shard_tokens <= MOST_SHARD_TOKENS:
            limits = f"must be between 1 and {MOST_SHARD_TOKENS} tokens; change --shard-tokens"
            raise UserError(f"shard length {self.shard_tokens} {limits}")
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
        """Returns the settings for the manifest; a given tokenizer is known by its content, not by its place."""
        record = asdict(self)
        if given is not None:
            for name in ("vocab_size", "tokenizer_bytes", "mask_token", "eos_token", "add_mask_token"):
                del record[name]
            record["tokenizer"] = given.fingerprint
        return record


def prepare(source: str, out: str | os.PathLike[str], *, progress: bool = True, **settings: Any) -> Manifest:
    """Prepares a corpus for training; does nothing where ``out`` already holds the same.

    Args:
        source: The corpus: ``python-stdlib``, a file, folder or pattern, or ``hf:NAME`` (see ``corpora``).
        out: The folder that is written; it appears when it is complete.
        progress: Whether progress is shown on stderr.
        settings: The fields of :class:`PrepareSettings`.

    Raises:
        UserError: The source, the tokenizer, a setting or the folder is not right; nothing has been written.
    """
    chosen = PrepareSettings(**settings)
    folder = Path(os.path.realpath(os.path.expanduser(out)))  # a link's target is written, and on its own disk
    root = Path(os.path.realpath(os.path.expanduser(source)))
    if root.is_dir() and folder.is_relative_to(root):
        raise UserError(
            f"output '{folder}' lies in the source '{source}' and would become part of it; choose another --out"
        )
    corpus = open_corpus(source, text_field=chosen.text_field, document_separator=chosen.document_separator)
    given = None
    if chosen.tokenizer is not None:
        given = load_tokenizer(
            chosen.tokenizer,
            mask_token=chosen.mask_token,
            eos_token=chosen.eos_token,
            add_mask_token=chosen.add_mask_token,
        )
    record = chosen.record(given[1] if given else None)
    report = PrepareProgress(enabled=progress)
    present = _present(folder, corpus, record)
    if present is not None:
        report.line(f"'{out}' is already prepared with these settings; nothing to do")
        return present
    with building(folder) as partial, report, _tokenizer_threads():
        tokenizer, info = given or _train(corpus, chosen, source, report)
        manifest = _write(corpus, chosen, source, partial, tokenizer, info, record, report)
    report.finish(str(out), skipped=corpus.skipped)
    return manifest


def in_validation(raw: bytes, val_fraction: float) -> bool:
    """Returns whether a document (in UTF-8) goes to ``val``: by its content, so that copies of a text are together."""
    number = int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "big")
    return number / 2**64 < val_fraction


def _present(out: Path, corpus: Corpus, record: dict[str, Any]) -> Manifest | None:
    """The manifest of an ``out`` that holds what is asked for already; None where there is nothing yet."""
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
        was, now = manifest.settings, record
        keys = [key for key in sorted({**was, **now}) if was.get(key) != now.get(key)]
        other = f"({'; '.join(f'{key} {was.get(key)!r}, now {now.get(key)!r}' for key in keys)})"
        raise UserError(f"output '{out}' was prepared with other settings {other}; choose another --out, or delete it")
    check_shards(out, manifest)
    return manifest


@contextlib.contextmanager
def _tokenizer_threads() -> Iterator[None]:
    """Lets the encoder use all cores, unless the user said otherwise; undone after, for processes forked later."""
    with contextlib.ExitStack() as stack:
        if "TOKENIZERS_PARALLELISM" not in os.environ:
            os.environ["TOKENIZERS_PARALLELISM"] = "true"
            stack.callback(os.environ.pop, "TOKENIZERS_PARALLELISM", None)
        yield


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
    """Trains a tokenizer on the beginning of the training documents: validation text is not used."""
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
            separate = r"divide the text by --document-separator, such as '\n\n', or give more documents"
            if total == 1:  # no fraction divides it
                found, fix = f"has 1 document, which is not in '{name}', and both splits need one", separate
            else:
                found = f"has {total} documents, none of them in '{name}' with a validation fraction of"
                found, fix = f"{found} {settings.val_fraction}", f"{direction} --val-fraction, or {separate}"
            raise UserError(f"source '{source}' {found}; {fix}")


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
    dtype = "uint16" if info.vocab_size <= 1 << 16 else "int32"
    writers = {name: ShardWriter(folder, name, shard_tokens=settings.shard_tokens, dtype=dtype) for name in SPLITS}

    def append(name: str, tokens: np.ndarray) -> None:
        if info.mask_id is not None and (tokens == info.mask_id).any():
            raise UserError(
                f"the tokenizer encodes some text to its special token '{info.mask_token}', which only masking "
                "may write; use a tokenizer that has it as an added token, or another --mask-token"
            )
        writers[name].append(tokens)

    report.phase("tokenizing", total_bytes=corpus.total_bytes, max_bytes=settings.max_bytes)
    with ThreadPoolExecutor(max_workers=1) as pool:
        encoders = {  # the loss of val is given in bits per byte, so its lost bytes are counted
            name: DocumentEncoder(tokenizer, info.eos_id, dtype, pool, partial(append, name), decodes=name == "val")
            for name in SPLITS
        }
        for text, raw in _limited(corpus, settings):
            encoders["val" if in_validation(raw, settings.val_fraction) else "train"].add(text, raw)
            report.update(encoders.values(), corpus.position)
        _check_splits({name: encoder.documents for name, encoder in encoders.items()}, settings, source, corpus)
        for encoder in encoders.values():
            encoder.close()
    report.update(encoders.values(), corpus.position, force=True)
    splits = {
        name: Split(encoder.documents, encoder.tokens, encoder.bytes, writers[name].close(), encoder.lost_bytes)
        for name, encoder in encoders.items()
    }
    if corpus.present_identity() != corpus.identity:
        raise UserError(f"source '{source}' changed while it was being read; run again when it no longer changes")
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
