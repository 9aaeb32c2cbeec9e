"""Compares the files of a prepared folder with its manifest: quickly before training, in full on request.

The quick check reads no shard: ``ShardReader`` compares a shard's bytes with their checksum when it first reads it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, BinaryIO

import numpy as np

from llada_lightning.data.manifest import (
    COPY_AGAIN,
    MANIFEST_NAME,
    SHARD_HEADER,
    TOKENIZER_NAME,
    Manifest,
    Shard,
    Split,
    TokenizerInfo,
    local_path,
    read_manifest,
    tokenizer_fingerprint,
)
from llada_lightning.support.errors import UserError

INDEX_NAME = "index.json"
_BLOCK_BYTES = 1 << 24
_INDEX_DTYPES = {"uint16": ("no_header_tensor:20",), "int32": ("no_header_tensor:15", "no_header_tensor:16")}
"""How litdata's index names the dtype of the tokens."""


@dataclass(frozen=True)
class Damage:
    """A file, relative to its folder, and what is wrong with it."""

    file: str
    problem: str


@dataclass(frozen=True)
class Verification:
    """The result of reading all of a prepared folder.

    Args:
        manifest: The manifest of the folder.
        files: The number of files that belong to the folder.
        damaged: The files that are not as they were written, in the order of the manifest.
    """

    manifest: Manifest
    files: int
    damaged: tuple[Damage, ...]

    def as_dict(self) -> dict[str, Any]:
        """The same in plain values, as ``llada prepare --verify DIR --json`` prints them."""
        splits = self.manifest.splits
        return {
            "whole": not self.damaged,
            "fingerprint": self.manifest.fingerprint,
            "files": self.files,
            "bytes": sum(shard.size for split in splits.values() for shard in split.shards),
            "documents": {name: split.documents for name, split in splits.items()},
            "tokens": {name: split.tokens for name, split in splits.items()},
            "damaged": [{"file": damage.file, "problem": damage.problem} for damage in self.damaged],
        }


def check_shards(folder: str | os.PathLike[str], manifest: Manifest) -> None:
    """Checks that every file of a local folder has its full size, and that index and tokenizer fit the manifest.

    litdata would wait for a missing shard as for a download, and read past the end of a short one. A remote folder is
    not checked here; its shards are compared with the manifest when they are read.

    Args:
        folder: The path of the folder, or its URL.
        manifest: The manifest of the folder.

    Raises:
        UserError: a file is missing, has another size, or is of another folder.
    """
    root = local_path(folder)
    if root is None:
        return
    damage = next(_quick_damages(root, manifest), None)
    if damage is not None:
        raise UserError(f"'{root}': {damage.file} {damage.problem}; {COPY_AGAIN}")


def _quick_damages(root: str, manifest: Manifest) -> Iterator[Damage]:
    yield from _tokenizer_damages(root, manifest)
    for name, split in manifest.splits.items():
        yield from _index_damages(root, name, split, manifest.dtype)
        for shard in split.shards:
            try:
                size = os.stat(os.path.join(root, shard.file)).st_size
            except OSError:
                yield Damage(f"shard {shard.file}", f"is missing ({shard.size} bytes)")
            else:
                if size != shard.size:
                    yield Damage(f"shard {shard.file}", f"has {size} bytes, expected {shard.size}")


def tokenizer_problem(text: str, info: TokenizerInfo) -> str | None:
    """Returns what is wrong with the text of a ``tokenizer.json``; None where it is the one of the manifest."""
    try:
        fingerprint = tokenizer_fingerprint(text, info.eos_id, info.mask_id)
    except (ValueError, RecursionError):
        return "is not JSON"
    if fingerprint != info.fingerprint:
        return f"has the fingerprint {fingerprint}, expected {info.fingerprint}"
    return None


def index_problem(text: str, split: Split, dtype: str) -> str | None:
    """Returns what is wrong with the text of an ``index.json`` of litdata; None where it lists the split's shards."""
    expected = [
        {"filename": os.path.basename(shard.file), "chunk_bytes": shard.size, "dim": shard.tokens, "chunk_size": 1}
        for shard in split.shards
    ]
    try:
        index = json.loads(text)
        chunks, config = index["chunks"], index["config"]
        found = [{key: chunk[key] for key in expected[0]} for chunk in chunks]
        stored = (config["data_format"], config["compression"], config["encryption"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return "is not an index of litdata"
    if found != expected:
        other = next((i for i, pair in enumerate(zip(found, expected, strict=False)) if pair[0] != pair[1]), None)
        where = f"at shard {other}" if other is not None else f"({len(found)} shards, expected {len(expected)})"
        return f"differs from the manifest {where}"
    if stored not in [([name], None, None) for name in _INDEX_DTYPES[dtype]]:
        return f"gives {', '.join(map(str, stored))} as the format of the tokens, expected plain {dtype}"
    return None


def _tokenizer_damages(folder: str, manifest: Manifest) -> Iterator[Damage]:
    return _text_damages(folder, TOKENIZER_NAME, partial(tokenizer_problem, info=manifest.tokenizer))


def _index_damages(folder: str, name: str, split: Split, dtype: str) -> Iterator[Damage]:
    return _text_damages(folder, f"{name}/{INDEX_NAME}", partial(index_problem, split=split, dtype=dtype))


def _text_damages(folder: str, name: str, problem_of: Callable[[str], str | None]) -> Iterator[Damage]:
    try:
        with _opened(folder, name) as file:
            text = file.read().decode()
    except Exception as error:  # a store's own errors; UnicodeDecodeError
        yield Damage(name, _unreadable(error))
        return
    problem = problem_of(text)
    if problem is not None:
        yield Damage(name, problem)


def _opened(folder: str, name: str) -> AbstractContextManager[BinaryIO]:
    """A file of a local or remote folder."""
    root = local_path(folder)
    if root is not None:
        return open(os.path.join(root, name), "rb")
    import fsspec

    opened: AbstractContextManager[BinaryIO] = fsspec.open(f"{folder.rstrip('/')}/{name}", "rb")
    return opened


def _unreadable(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "is missing"
    return f"cannot be read ({type(error).__name__}: {' '.join(str(error).split())})"


def verify(folder: str | os.PathLike[str], read: Callable[[int], Any] = lambda _: None) -> Verification:
    """Reads all of a prepared folder and compares it with its manifest.

    The checksum and the range of the tokens of each shard are compared, the number of documents of each split (EOS ends
    a document), the indices, the tokenizer, and the manifest itself.

    Args:
        folder: The path of the folder, or a URL that fsspec opens, which is streamed through memory.
        read: The function that is called with the number of bytes of each block of a shard that has been read.

    Raises:
        UserError: the manifest is missing, damaged or contradicts itself, so that there is nothing to compare with.
    """
    manifest = read_manifest(folder)
    files = 2 + sum(1 + len(split.shards) for split in manifest.splits.values())
    return Verification(manifest, files, tuple(_damages(os.fspath(folder), manifest, read)))


def _damages(folder: str, manifest: Manifest, read: Callable[[int], Any]) -> Iterator[Damage]:
    yield from _tokenizer_damages(folder, manifest)
    for name, split in manifest.splits.items():
        yield from _index_damages(folder, name, split, manifest.dtype)
        documents, whole = 0, True
        for shard in split.shards:
            try:
                with _opened(folder, shard.file) as file:
                    contents = _contents(file, manifest, read)
                problem = contents.problem(shard, manifest.tokenizer)
            except Exception as error:  # a store's own errors
                problem = _unreadable(error)
            else:
                documents += contents.ends
            if problem is not None:
                whole = False
                yield Damage(shard.file, problem)
        if whole and documents != split.documents:
            yield Damage(MANIFEST_NAME, f"says {split.documents} documents in '{name}', its shards end {documents}")


@dataclass(frozen=True)
class _Contents:
    """The size and checksum of a shard, and the number of its tokens beyond the vocabulary, of [MASK] and of EOS."""

    size: int
    sha256: str
    foreign: int
    masks: int
    ends: int

    def problem(self, shard: Shard, ids: TokenizerInfo) -> str | None:
        if self.size != shard.size:
            return f"has {self.size} bytes, expected {shard.size}"
        if self.sha256 != shard.sha256:
            return f"has the sha256 {self.sha256}, expected {shard.sha256}"
        if self.foreign:
            return f"has {self.foreign} tokens beyond the vocabulary of {ids.vocab_size}"
        if self.masks:
            return f"has {self.masks} tokens of {ids.mask_token}, which no text is encoded to"
        return None


def _contents(file: BinaryIO, manifest: Manifest, read: Callable[[int], Any]) -> _Contents:
    """Reads a shard in blocks."""
    ids, dtype = manifest.tokenizer, np.dtype(manifest.dtype)
    rest = file.read(SHARD_HEADER)
    digest, size = hashlib.sha256(rest), len(rest)
    foreign = masks = ends = 0
    rest = b""
    while block := file.read(_BLOCK_BYTES):
        digest.update(block)
        size += len(block)
        whole = rest + block if rest else block
        tokens = np.frombuffer(whole, dtype, count=len(whole) // dtype.itemsize)
        rest = whole[tokens.nbytes :]
        foreign += int(((tokens < 0) | (tokens >= ids.vocab_size)).sum())
        masks += 0 if ids.mask_id is None else int((tokens == ids.mask_id).sum())
        ends += int((tokens == ids.eos_id).sum())
        read(len(block))
    return _Contents(size, digest.hexdigest(), foreign, masks, ends)
