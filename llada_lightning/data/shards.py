"""Shards of litdata: one split's documents are written as token files of equal length, and read as sequences."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from bisect import bisect_right
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import accumulate, chain
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from llada_lightning.data.encoding import decode_batch, encode_batch, lost_bytes
from llada_lightning.data.integrity import INDEX_NAME, index_problem
from llada_lightning.data.manifest import COPY_AGAIN, Manifest, Shard, Split, TokenizerInfo
from llada_lightning.data.tokenizers import pieces
from llada_lightning.support.errors import UserError
from llada_lightning.support.files import file_sha256

if TYPE_CHECKING:
    from litdata.streaming.writer import BinaryWriter


class ShardReader:
    """The items of one split of a prepared folder: blocks of consecutive tokens within a shard.

    The index and each shard are compared with the manifest when a process first reads them, so every byte that is
    trained on was prepared. Of a remote folder litdata's copy on this machine is compared; one that litdata drops and
    fetches again in the same process is not compared again.

    Args:
        folder: The prepared folder, as litdata takes it.
        split: The name of the split, "train" or "val".
        manifest: The manifest of the folder.
        sequence_length: The number of tokens of an item (L).
    """

    def __init__(self, folder: str, split: str, manifest: Manifest, sequence_length: int) -> None:
        from litdata import StreamingDataset, TokensLoader  # with clients of object stores: help needs none of it

        self.folder = folder
        self._split, self._dtype = manifest.splits[split], manifest.dtype
        self._ends = list(accumulate(shard.tokens // sequence_length for shard in self._split.shards))
        self._remote = folder.startswith("local:") or "://" in folder
        self._index_name = f"{split}/{INDEX_NAME}"
        self._whole: set[int] = set()
        self._dataset = StreamingDataset(
            f"{folder}/{split}", item_loader=TokensLoader(block_size=sequence_length), shuffle=False
        )

    def __getitem__(self, item: int) -> Tensor:
        """Returns the tokens of an item: (L,) of the stored dtype.

        Raises:
            UserError: the item's shard, or the index, is missing or is not what was prepared.
        """
        shard = bisect_right(self._ends, item)
        if shard in self._whole:
            return self._dataset[item]
        if not self._remote:
            self._check(shard)
            return self._dataset[item]
        tokens = self._dataset[item]  # which fetches the shard
        self._check(shard)
        return tokens

    def _check(self, number: int) -> None:
        """Compares a shard with its checksum, and before the first one the index with the manifest."""
        shard = self._split.shards[number]
        if not self._whole:
            try:
                with open(self._path(INDEX_NAME), encoding="utf-8") as file:
                    problem = index_problem(file.read(), self._split, self._dtype)
            except (OSError, UnicodeDecodeError) as error:
                problem = f"cannot be read ({error})"
            if problem is not None:
                raise self._error(self._index_name, problem)
        try:
            sha256 = file_sha256(self._path(os.path.basename(shard.file)))
        except OSError as error:
            raise self._error(f"shard {shard.file}", f"cannot be read ({error.strerror})") from error
        if sha256 != shard.sha256:
            raise self._error(f"shard {shard.file}", f"has the sha256 {sha256}, expected {shard.sha256}")
        self._whole.add(number)

    def _error(self, name: str, problem: str) -> UserError:
        return UserError(f"'{self.folder}': {name} {problem}; {COPY_AGAIN}")

    def _path(self, name: str) -> str:
        """Where litdata reads a file: in the folder itself, or in its copy of a remote one."""
        return os.path.join(self._dataset.input_dir.path, name)


BATCH_CHARS = 1 << 21
"""Characters encoded at once: enough to keep many cores busy, about 100 MB of memory."""

_MAX_SHARD_BYTES = (1 << 32) - 64
"""litdata's offsets are 32-bit."""


def token_dtype(vocab_size: int) -> str:
    """Returns the narrowest dtype that litdata stores and torch reads for ids below ``vocab_size``."""
    return "uint16" if vocab_size <= 1 << 16 else "int32"


def check_shard_tokens(shard_tokens: int) -> None:
    """Refuses a length that no shard can have.

    Raises:
        UserError: the number of tokens is below 1, or too large for the offsets of litdata.
    """
    most = _MAX_SHARD_BYTES // 4
    if not 1 <= shard_tokens <= most:
        raise UserError(f"shard length {shard_tokens} must be between 1 and {most} tokens; change --shard-tokens")


class ShardWriter:
    """Cuts a stream of tokens into shards; memory holds about three of them.

    Args:
        root: The prepared folder (or its temporary name).
        split: The name of the split, which is the folder below it.
        shard_tokens: The number of tokens of each shard but the last.
        dtype: The dtype of the tokens, "uint16" or "int32".
    """

    def __init__(self, root: Path, split: str, *, shard_tokens: int, dtype: str) -> None:
        self.shards: list[Shard] = []
        self.tokens = 0
        self._root = root
        self._folder = root / split
        self._shard_tokens = shard_tokens
        self._dtype = np.dtype(dtype)
        self._pending: list[np.ndarray] = []
        self._pending_tokens = 0
        self._lengths: list[int] = []
        self._writer: BinaryWriter | None = None

    def append(self, tokens: np.ndarray) -> None:
        """Adds tokens to the stream.

        Raises:
            UserError: the disk does not take a shard.
        """
        self._pending.append(tokens.astype(self._dtype, copy=False))
        self._pending_tokens += len(tokens)
        self.tokens += len(tokens)
        if self._pending_tokens < self._shard_tokens:
            return
        stream = np.concatenate(self._pending)
        whole = len(stream) - len(stream) % self._shard_tokens
        for begin in range(0, whole, self._shard_tokens):
            self._write(stream[begin : begin + self._shard_tokens])
        # A copy, so that the rest of a large batch does not keep the batch alive.
        self._pending, self._pending_tokens = [stream[whole:].copy()], len(stream) - whole

    def close(self) -> tuple[Shard, ...]:
        """Writes the last, shorter shard and the index of litdata; returns the shards in order."""
        if self._pending_tokens:
            self._write(np.concatenate(self._pending))
        if self._writer is not None:
            with _disk_errors(self._folder):
                for path in self._writer.done():
                    self._record(path)
                self._write_index(self._writer.rank)
        return tuple(self.shards)

    def _write(self, tokens: np.ndarray) -> None:
        with _disk_errors(self._folder):
            if self._writer is None:
                self._writer = self._open()
            # One item is one shard: litdata begins a new file where an item would pass chunk_size tokens, and every
            # item but the last has exactly as many. So a file is written when the next item comes.
            path = self._writer.add_item(len(self._lengths), torch.from_numpy(tokens))
            self._lengths.append(len(tokens))
            if path is not None:
                self._record(path)

    def _open(self) -> BinaryWriter:
        from litdata.streaming.item_loader import TokensLoader
        from litdata.streaming.writer import BinaryWriter

        # For writing the item loader needs no block size: any sequence length can be read later.
        return BinaryWriter(str(self._folder), chunk_size=self._shard_tokens, item_loader=TokensLoader())

    def _record(self, path: str) -> None:
        name = Path(path).relative_to(self._root).as_posix()
        tokens = self._lengths[len(self.shards)]
        self.shards.append(Shard(name, tokens, os.path.getsize(path), file_sha256(path)))

    def _write_index(self, rank: int) -> None:
        """Turns litdata's index of one writer into that of the split.

        litdata's own merging stamps the time, by which readers know whether their cached copies are stale. A checksum
        serves as well, and equal data gives equal files.
        """
        worker_index = self._folder / f"{rank}.index.json"
        index = json.loads(worker_index.read_text(encoding="utf-8"))
        index["updated_at"] = hashlib.sha256("".join(shard.sha256 for shard in self.shards).encode()).hexdigest()[:32]
        (self._folder / "index.json").write_text(json.dumps(index, sort_keys=True), encoding="utf-8")
        worker_index.unlink()


@contextlib.contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    """Turns an error of the disk into a UserError that names the folder."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"'{folder}' cannot be written ({reason}); free space, or choose another --out") from error


class SplitEncoder:
    """Encodes the documents of one split in batches and appends them to its shards.

    A batch is encoded on another thread, outside Python's lock, while the next one is read.

    Args:
        writer: The writer of the split's shards.
        tokenizer: The tokenizer.
        info: The special tokens of the tokenizer.
        pool: The pool with that thread.
        decodes: Whether all tokens are decoded to count the bytes that do not come back.
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
        """Adds a document.

        Args:
            text: The text of the document.
            raw: The same text in UTF-8.
        """
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
        """Writes what is left, and returns the split with all its shards."""
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
