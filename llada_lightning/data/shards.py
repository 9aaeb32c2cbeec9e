"""Shards of litdata: token files of equal length, written, read as sequences, and compared with the manifest.

They are compared quickly before training, in full on request, and shard by shard when a process first reads one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from llada_lightning.data import MANIFEST_NAME, TOKENIZER_NAME, TokenizerInfo, tokenizer_fingerprint
from llada_lightning.data.manifest import (
    COPY_AGAIN,
    SHARD_HEADER,
    Manifest,
    Shard,
    Split,
    opened,
    read_manifest,
)
from llada_lightning.support.errors import UserError
from llada_lightning.support.files import file_sha256, local_path

if TYPE_CHECKING:  # imported where they are used: verification needs none of them
    from litdata.streaming.writer import BinaryWriter
    from torch import Tensor

INDEX_NAME = "index.json"
_INDEX_DTYPES = {"uint16": ("no_header_tensor:20",), "int32": ("no_header_tensor:15", "no_header_tensor:16")}
"""How litdata's index names the dtype of the tokens."""

_BLOCK_BYTES = 1 << 24
MOST_SHARD_TOKENS = ((1 << 32) - 64) // 4
"""litdata's offsets are 32-bit numbers of bytes."""


class ShardWriter:
    """Cuts a stream of tokens into the shards of a split, all but the last of one length; memory holds about three."""

    def __init__(self, root: Path, split: str, *, shard_tokens: int, dtype: str) -> None:
        self.shards: list[Shard] = []
        self.tokens = 0
        self._root, self._folder = root, root / split
        self._shard_tokens, self._dtype = shard_tokens, np.dtype(dtype)
        self._pending: list[np.ndarray] = []
        self._pending_tokens = 0
        self._lengths: list[int] = []
        self._writer: BinaryWriter | None = None

    def append(self, tokens: np.ndarray) -> None:
        """Adds tokens to the stream; a UserError where the disk does not take a shard."""
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
        import torch
        from litdata.streaming.item_loader import TokensLoader
        from litdata.streaming.writer import BinaryWriter

        with _disk_errors(self._folder):
            if self._writer is None:
                # For writing the item loader needs no block size: any sequence length can be read later.
                self._writer = BinaryWriter(
                    str(self._folder), chunk_size=self._shard_tokens, item_loader=TokensLoader()
                )
            # One item is one shard: litdata begins a new file where an item would pass chunk_size tokens, and every
            # item but the last has exactly as many. So a file is written when the next item comes.
            path = self._writer.add_item(len(self._lengths), torch.from_numpy(tokens))
            self._lengths.append(len(tokens))
            if path is not None:
                self._record(path)

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
        (self._folder / INDEX_NAME).write_text(json.dumps(index, sort_keys=True), encoding="utf-8")
        worker_index.unlink()


@contextlib.contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    """Turns an error of the disk into a UserError that names the folder."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"'{folder}' cannot be written ({reason}); free space, or choose another --out") from error


class ShardReader:
    """The items of one split of a prepared folder: blocks of consecutive tokens within a shard.

    The index and each shard are compared with the manifest when a process first reads them, so every byte that is
    trained on was prepared. Of a remote folder litdata's copy on this machine is compared; one that litdata drops and
    fetches again in the same process is not compared again. An item has ``sequence_length`` tokens (L).
    """

    def __init__(self, folder: str, split: str, manifest: Manifest, sequence_length: int) -> None:
        from litdata import StreamingDataset, TokensLoader  # with clients of object stores: help needs none of it

        self.folder = folder
        self._split, self._dtype = manifest.splits[split], manifest.dtype
        self._ends = list(accumulate(shard.tokens // sequence_length for shard in self._split.shards))
        self._remote = folder.startswith("local:") or "://" in folder
        self._index_name = f"{split}/{INDEX_NAME}"
        self._length = sequence_length
        self._whole: set[int] = set()
        self._positions: dict[tuple[int, int], np.ndarray] = {}
        self._dataset = StreamingDataset(
            f"{folder}/{split}", item_loader=TokensLoader(block_size=sequence_length), shuffle=False
        )

    def __getitem__(self, item: int) -> Tensor:
        """Returns the tokens of an item: (L,) of the stored dtype.

        Raises:
            UserError: The item's shard, or the index, is missing or is not what was prepared.
        """
        shard = bisect_right(self._ends, item)
        if shard in self._whole:
            return self._read(item)
        if not self._remote:
            self._check(shard)
            return self._read(item)
        tokens = self._read(item)  # which fetches the shard
        self._check(shard)
        return tokens

    def last_before(self, item: int, token: int) -> int:
        """Returns the position behind the last occurrence of a token before an item, and 0 where there is none.

        Positions count the tokens of all items from the first one on. A shard is read once, in one piece, because a
        document may be as long as the split.
        """
        number = bisect_right(self._ends, item)
        before = (item - self._first(number)) * self._length
        for earlier in range(number, -1, -1):
            positions = self._positions_in(earlier, token)
            if earlier == number:
                positions = positions[: np.searchsorted(positions, before)]
            if len(positions):
                return self._first(earlier) * self._length + int(positions[-1]) + 1
        return 0

    def _first(self, number: int) -> int:
        """The number of a shard's first item."""
        return self._ends[number - 1] if number else 0

    def _positions_in(self, number: int, token: int) -> np.ndarray:
        """The positions of a token in a shard, as far as its items reach."""
        if (number, token) not in self._positions:
            items = self._ends[number] - self._first(number)
            if items:
                self[self._first(number)]  # which fetches the shard of a remote folder, and compares it
            path = Path(self._dataset.input_dir.path) / Path(self._split.shards[number].file).name
            tokens = np.fromfile(path, self._dtype, items * self._length, offset=SHARD_HEADER) if items else np.empty(0)
            self._positions[number, token] = np.flatnonzero(tokens == token)
        return self._positions[number, token]

    def _read(self, item: int) -> Tensor:
        try:
            return self._dataset[item]
        except KeyError:  # litdata 0.2.76 closes a shard while its thread that fetches ahead opens it again
            return self._dataset[item]

    def _check(self, number: int) -> None:
        """Compares a shard with its checksum, and before the first one the index with the manifest."""
        shard = self._split.shards[number]
        folder = self._dataset.input_dir.path  # where litdata reads: the folder itself, or its copy of a remote one
        if not self._whole:
            try:
                with open(os.path.join(folder, INDEX_NAME), encoding="utf-8") as file:
                    problem = index_problem(file.read(), self._split, self._dtype)
            except (OSError, UnicodeDecodeError) as error:
                problem = f"cannot be read ({error})"
            if problem is not None:
                raise _damaged(self.folder, self._index_name, problem)
        try:
            sha256 = file_sha256(os.path.join(folder, os.path.basename(shard.file)))
        except OSError as error:
            raise _damaged(self.folder, f"shard {shard.file}", f"cannot be read ({error.strerror})") from error
        if sha256 != shard.sha256:
            raise _damaged(self.folder, f"shard {shard.file}", f"has the sha256 {sha256}, expected {shard.sha256}")
        self._whole.add(number)


def _damaged(folder: str, name: str, problem: str) -> UserError:
    return UserError(f"'{folder}': {name} {problem}; {COPY_AGAIN}")


# --- whether the files are those of the manifest ----------------------------------------------------------------------


@dataclass(frozen=True)
class Damage:
    """A file, relative to its folder, and what is wrong with it."""

    file: str
    problem: str


@dataclass(frozen=True)
class Verification:
    """The result of reading all files of a prepared folder, of which some are not as they were written."""

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
            "damaged": [asdict(damage) for damage in self.damaged],
        }


def check_shards(folder: str | os.PathLike[str], manifest: Manifest) -> None:
    """Checks that every file of a local folder has its full size, and that index and tokenizer fit the manifest.

    litdata would wait for a missing shard as for a download, and read past the end of a short one. A remote folder is
    not checked here; its shards are compared with the manifest when they are read.

    Raises:
        UserError: A file is missing, has another size, or is of another folder.
    """
    root = local_path(folder)
    if root is None:
        return

    def of_shard(shard: Shard) -> str | None:
        try:
            size = os.stat(os.path.join(root, shard.file)).st_size
        except OSError:
            return f"is missing ({shard.size} bytes)"
        return None if size == shard.size else f"has {size} bytes, expected {shard.size}"

    damage = next(_damages(root, manifest, of_shard), None)
    if damage is not None:
        raise _damaged(root, f"shard {damage.file}" if damage.file.endswith(".bin") else damage.file, damage.problem)


def verify(folder: str | os.PathLike[str], read: Callable[[int], Any] = lambda _: None) -> Verification:
    """Reads all of a prepared folder and compares it with its manifest.

    The checksum and the range of the tokens of each shard are compared, the number of documents of each split (EOS ends
    a document), the indices, the tokenizer, and the manifest itself. A remote folder is streamed through memory.
    ``read`` is called with the number of bytes of each block of a shard.

    Raises:
        UserError: The manifest is missing, damaged or contradicts itself, so that there is nothing to compare with.
    """
    manifest = read_manifest(folder)
    ends: dict[str, int] = {}

    def of_shard(shard: Shard) -> str | None:
        try:
            with opened(folder, shard.file) as file:
                problem, ends[shard.file] = _content(file, shard, manifest, read)
        except Exception as error:  # a store's own errors
            return _unreadable(error)
        return problem

    damaged = list(_damages(folder, manifest, of_shard))
    broken = {damage.file for damage in damaged}
    for name, split in manifest.splits.items():
        files = {shard.file for shard in split.shards}
        if not files & broken and (found := sum(ends[file] for file in files)) != split.documents:
            damaged.append(
                Damage(MANIFEST_NAME, f"says {split.documents} documents in '{name}', its shards end {found}")
            )
    count = 2 + sum(1 + len(split.shards) for split in manifest.splits.values())
    return Verification(manifest, count, tuple(damaged))


def _damages(
    folder: str | os.PathLike[str], manifest: Manifest, of_shard: Callable[[Shard], str | None]
) -> Iterator[Damage]:
    """Yields the damages of the tokenizer, the indices, and the shards by the given look at one."""
    yield from _text_damage(folder, TOKENIZER_NAME, partial(_tokenizer_problem, info=manifest.tokenizer))
    for name, split in manifest.splits.items():
        index = partial(index_problem, split=split, dtype=manifest.dtype)
        yield from _text_damage(folder, f"{name}/{INDEX_NAME}", index)
        for shard in split.shards:
            problem = of_shard(shard)
            if problem is not None:
                yield Damage(shard.file, problem)


def _text_damage(
    folder: str | os.PathLike[str], name: str, problem_of: Callable[[str], str | None]
) -> Iterator[Damage]:
    try:
        with opened(folder, name) as file:
            text = file.read().decode()
    except Exception as error:  # a store's own errors; UnicodeDecodeError
        problem: str | None = _unreadable(error)
    else:
        problem = problem_of(text)
    if problem is not None:
        yield Damage(name, problem)


def _unreadable(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "is missing"
    return f"cannot be read ({type(error).__name__}: {' '.join(str(error).split())})"


def _tokenizer_problem(text: str, info: TokenizerInfo) -> str | None:
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


def _content(file: BinaryIO, shard: Shard, manifest: Manifest, read: Callable[[int], Any]) -> tuple[str | None, int]:
    """What is wrong with a shard, which is read in blocks, and the number of documents that end in it."""
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
    if size != shard.size:
        return f"has {size} bytes, expected {shard.size}", ends
    if digest.hexdigest() != shard.sha256:
        return f"has the sha256 {digest.hexdigest()}, expected {shard.sha256}", ends
    if foreign:
        return f"has {foreign} tokens beyond the vocabulary of {ids.vocab_size}", ends
    if masks:
        return f"has {masks} tokens of {ids.mask_token}, which no text is encoded to", ends
    return None, ends
