"""Reads the sequences of one split, from shards whose bytes are those that were prepared."""

from __future__ import annotations

import os
from bisect import bisect_right
from itertools import accumulate

from litdata import StreamingDataset, TokensLoader
from torch import Tensor

from llada_lightning.data.integrity import INDEX_NAME, index_problem
from llada_lightning.data.manifest import COPY_AGAIN, Manifest
from llada_lightning.errors import UserError
from llada_lightning.files import file_sha256


class ShardReader:
    """The items of one split of a prepared folder: blocks of consecutive tokens within a shard.

    The index and each shard are compared with the manifest when a process first reads them, so no byte is trained on
    that was not prepared. Of a remote folder litdata's copy on this machine is compared; one that litdata drops and
    fetches again in the same process is not compared again.

    Args:
        folder: the prepared folder, as litdata takes it.
        split: "train" or "val".
        manifest: of the folder.
        sequence_length: L, tokens of an item.
    """

    def __init__(self, folder: str, split: str, manifest: Manifest, sequence_length: int) -> None:
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
        """(L,) of the stored dtype.

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
