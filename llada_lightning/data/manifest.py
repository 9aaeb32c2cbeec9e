"""The manifest of a prepared data folder: what the folder holds, how it was made, and whether the parts agree.

A prepared folder is ``manifest.json``, ``tokenizer.json``, and for each of the splits ``train`` and ``val`` litdata's
``index.json`` with its shards. Counts are taken from the manifest, never from litdata, whose lengths are shares of
the data under several processes.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from typing import Any, BinaryIO

from llada_lightning.data import MANIFEST_NAME, TOKENIZER_NAME, TokenizerInfo
from llada_lightning.run import DataFacts, Source
from llada_lightning.support.errors import UserError
from llada_lightning.support.files import json_sha256, local_path

FORMAT = 1  # the version of the layout of the folder
SPLITS = ("train", "val")
TOKEN_BYTES = {"uint16": 2, "int32": 4}  # of a stored token, by dtype
SHARD_HEADER = 12  # bytes before the tokens of a shard: the number of items, which is 1, and two offsets, each uint32

TOLERATED_LOSS = 0.001
"""The largest share of a text's bytes that may be lost in its tokens before bits per byte are left out. They are too
low by about this share, which their third digit does not show."""

COPY_AGAIN = "copy the folder again, or delete it and prepare it again"
_KIND = "llada-prepared-data"


@dataclass(frozen=True)
class Shard:
    """One file of tokens: its path in the folder (with forward slashes), its tokens, bytes and hexadecimal checksum."""

    file: str
    tokens: int
    size: int
    sha256: str


@dataclass(frozen=True)
class Split:
    """The training or the validation documents.

    Args:
        documents: The number of documents.
        tokens: The number of tokens, with one EOS for each document.
        bytes: The number of UTF-8 bytes of the text.
        shards: The shards, in the order of the stream.
        lost_bytes: The number of those bytes that the tokens do not decode to (`encoding.lost_bytes`); None where it
            was not counted, as for the training split and in folders of older versions.
    """

    documents: int
    tokens: int
    bytes: int
    shards: tuple[Shard, ...]
    lost_bytes: int | None = None

    def items(self, sequence_length: int) -> int:
        """Returns the number of blocks of ``sequence_length`` tokens; the last tokens of a shard may fill no block."""
        return sum(shard.tokens // sequence_length for shard in self.shards)

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text for each token; nats/token over (bytes/token · ln 2) is bits/byte."""
        return self.bytes / self.tokens

    @property
    def lost_share(self) -> float:
        """The share of the bytes that the tokens do not decode to, as far as it was counted."""
        return (self.lost_bytes or 0) / self.bytes


@dataclass(frozen=True)
class Manifest:
    """What a prepared folder holds.

    Args:
        source: The identity of the corpus, which does not depend on its path.
        settings: The settings that the corpus was prepared with.
        tokenizer: The vocabulary and the special tokens.
        dtype: The dtype of the stored tokens, "uint16" or "int32".
        splits: The splits "train" and "val".
        fingerprint: The SHA-256 of the shards' checksums and the tokenizer's fingerprint. Equal data and tokenizer give
            equal fingerprints, whatever the folder, the time and the number of cores.
        versions: The versions of the packages that wrote the folder, for the record.
        format: The version of the layout of the folder.
    """

    source: dict[str, Any]
    settings: dict[str, Any]
    tokenizer: TokenizerInfo
    dtype: str
    splits: dict[str, Split]
    fingerprint: str
    versions: dict[str, str] = field(default_factory=dict)
    format: int = FORMAT

    def to_json(self) -> str:
        """Returns the text of ``manifest.json``, which ends with a checksum of the rest."""
        record = {"kind": _KIND, **asdict(self)}
        return json.dumps({**record, "checksum": json_sha256(record)}, indent=1) + "\n"

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> Manifest:
        """Returns the manifest of a decoded ``manifest.json``; KeyError or TypeError where a field is missing."""
        splits = {
            name: Split(**{**split, "shards": tuple(Shard(**shard) for shard in split["shards"])})
            for name, split in record["splits"].items()
        }
        fields = {key: value for key, value in record.items() if key not in ("kind", "checksum")}
        return cls(**{**fields, "splits": splits, "tokenizer": TokenizerInfo(**record["tokenizer"])})


FEW_DOCUMENTS = 20
"""Below this many clusters a standard error has itself an error of a sixth and more."""


def few_documents_note(documents: int) -> str | None:
    """Returns a note for whoever prepares a corpus if its validation split has few documents, else None."""
    if documents >= FEW_DOCUMENTS:
        return None
    count = f"{documents} validation document{'s' * (documents != 1)}"
    return (
        f"note: {count} only, and below {FEW_DOCUMENTS} the standard error of a loss means little; raise "
        "--val-fraction, give more documents, or split long texts with --document-separator"
    )


def loss_note(share: float, consequence: str = "bits per byte are left out, as they would be too low") -> str | None:
    """Returns a note for the user if more than a tolerated share of a text's bytes is lost in its tokens, else None."""
    if share <= TOLERATED_LOSS:
        return None
    return f"note: {100 * share:.3g} % of the text's bytes do not come back from its tokens; {consequence}"


def bits_per_byte(nats_per_token: float, bytes_per_token: float, lost_share: float) -> float | None:
    """Returns the bits per byte of a loss on a text; None where too large a share of it is lost in its tokens."""
    if lost_share > TOLERATED_LOSS:
        return None
    return nats_per_token / bytes_per_token / math.log(2)


def data_fingerprint(splits: Mapping[str, Split], tokenizer_fingerprint: str) -> str:
    """Returns the SHA-256 of the checksums of all shards (splits sorted by name) and the tokenizer's fingerprint."""
    lines = [f"tokenizer {tokenizer_fingerprint}"]
    lines += [f"{name} {shard.tokens} {shard.sha256}" for name in sorted(splits) for shard in splits[name].shards]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def opened(folder: str | os.PathLike[str], name: str) -> AbstractContextManager[BinaryIO]:
    """Returns a file of a local or remote folder, opened for reading bytes."""
    path = local_path(folder)
    if path is not None:
        return open(os.path.join(path, name), "rb")
    import fsspec

    file: AbstractContextManager[BinaryIO] = fsspec.open(f"{os.fspath(folder).rstrip('/')}/{name}", "rb")
    return file


def read_manifest(folder: str | os.PathLike[str]) -> Manifest:
    """Returns the manifest of a prepared folder.

    Args:
        folder: The path of the folder, litdata's ``local:`` path, or a URL that fsspec opens (``s3://``, ``gs://``, …).

    Raises:
        UserError: The folder is missing or cannot be reached, is not a prepared one, or has another format.
    """
    return _decode(_read(folder, MANIFEST_NAME), os.fspath(folder))


def read_tokenizer_text(folder: str | os.PathLike[str]) -> str:
    """Returns the text of a prepared folder's ``tokenizer.json``; arguments and errors as :func:`read_manifest`."""
    return _read(folder, TOKENIZER_NAME)


def _read(folder: str | os.PathLike[str], name: str) -> str:
    path, place = local_path(folder), os.fspath(folder)
    try:
        with opened(folder, name) as file:
            return file.read().decode()
    except (FileNotFoundError, NotADirectoryError) as error:
        if path is None:
            message = f"'{place}' holds no {name}; upload a folder written by llada prepare"
        elif os.path.exists(path):
            message = _foreign(path)
        else:
            message = f"data folder '{path}' does not exist; run: llada prepare --source SOURCE --out {path}"
        raise UserError(message) from error
    except ImportError as error:
        raise UserError(f"'{place}' cannot be opened: {error}") from error
    except Exception as error:  # each store has its own errors for access, names and networks
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        check = "address, access and network" if path is None else "folder"
        raise UserError(f"'{place}/{name}' cannot be read ({reason}); check the {check}") from error


def _foreign(folder: str) -> str:
    return f"'{folder}' is not a prepared data folder; run: llada prepare --source SOURCE --out {folder}"


def _decode(text: str, folder: str) -> Manifest:
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _damaged(folder, "not JSON") from error
    if not isinstance(record, dict) or record.get("kind") != _KIND:
        raise UserError(_foreign(folder))
    if record.get("format") != FORMAT:
        raise UserError(
            f"'{folder}' has format {record.get('format')}, this version reads format {FORMAT}; prepare it again, or "
            "use the version of llada-lightning that wrote it"
        )
    checksum = record.pop("checksum", None)  # which the first folders lack
    if checksum is not None and checksum != json_sha256(record):
        raise _damaged(folder, "its checksum is that of another text")
    try:
        manifest = Manifest.from_dict(record)
        contradiction = next(_contradictions(manifest), None)
    except (KeyError, TypeError, AttributeError) as error:
        raise _damaged(folder, f"{type(error).__name__}: {error}") from error
    if contradiction is not None:
        raise _damaged(folder, contradiction)
    return manifest


def _damaged(folder: str, what: str) -> UserError:
    return UserError(f"{MANIFEST_NAME} of '{folder}' is damaged ({what}); {COPY_AGAIN}")


def _contradictions(manifest: Manifest) -> Iterator[str]:
    """Yields what cannot be true of any prepared folder."""
    ids, splits = manifest.tokenizer, manifest.splits
    if sorted(splits) != sorted(SPLITS):
        yield f"splits {', '.join(splits) or 'none'}, expected {' and '.join(SPLITS)}"
    if manifest.dtype not in TOKEN_BYTES:
        yield f"dtype {manifest.dtype!r}, expected {' or '.join(TOKEN_BYTES)}"
    if not isinstance(manifest.settings, dict) or not isinstance(manifest.source["digest"], str):
        yield "the source's digest or the settings are missing"
    most = 1 << (16 if manifest.dtype == "uint16" else 31)
    if not (_is_whole(ids.vocab_size, 1) and ids.vocab_size <= most):
        yield f"vocab_size {ids.vocab_size!r} as {manifest.dtype}"
    for name, token_id in (("eos_id", ids.eos_id), ("mask_id", ids.mask_id)):
        if token_id is None or not (_is_whole(token_id, 0) and token_id < ids.vocab_size):
            yield f"{name} {token_id!r} of {ids.vocab_size} tokens"
    if ids.eos_id == ids.mask_id:
        yield f"eos_id and mask_id are both {ids.eos_id}"
    for name, split in splits.items():
        yield from _split_contradictions(name, split, TOKEN_BYTES[manifest.dtype])
    fingerprint = data_fingerprint(splits, ids.fingerprint)
    if fingerprint != manifest.fingerprint:
        yield f"fingerprint {manifest.fingerprint}, the checksums of its shards and tokenizer give {fingerprint}"


def _split_contradictions(name: str, split: Split, token_bytes: int) -> Iterator[str]:
    for key in ("documents", "tokens", "bytes"):
        if not _is_whole(getattr(split, key), 1):
            yield f"{name}: {key} {getattr(split, key)!r}"
    if split.lost_bytes is not None and not (_is_whole(split.lost_bytes, 0) and split.lost_bytes <= split.bytes):
        yield f"{name}: lost_bytes {split.lost_bytes!r} of {split.bytes} bytes"
    for shard in split.shards:
        if not shard.file.startswith(f"{name}/") or "/" in shard.file.removeprefix(f"{name}/"):
            yield f"shard {shard.file!r} lies outside of '{name}'"
        if not _is_whole(shard.tokens, 1) or shard.size != SHARD_HEADER + shard.tokens * token_bytes:
            yield f"shard {shard.file}: {shard.tokens!r} tokens in {shard.size!r} bytes"
    tokens = sum(shard.tokens for shard in split.shards)
    if not split.documents <= split.tokens == tokens:
        yield f"{name}: {split.tokens} tokens in {split.documents} documents, its shards hold {tokens}"


def _is_whole(value: Any, least: int) -> bool:
    return type(value) is int and value >= least


def check_sequence_length(manifest: Manifest, sequence_length: int, splits: Sequence[str] = SPLITS) -> None:
    """Checks that every one of the splits holds at least one block of ``sequence_length`` tokens within a shard.

    litdata would give an empty dataset, without an error.

    Raises:
        UserError: The length is below 1, or every shard of a split is shorter.
    """
    if sequence_length < 1:
        raise UserError(f"sequence length {sequence_length} is below 1; give at least 1")
    for name in splits:
        split = manifest.splits[name]
        longest = max((shard.tokens for shard in split.shards), default=0)
        if longest < sequence_length:
            blocks = ", ".join(f"{key} {value.items(sequence_length)}" for key, value in manifest.splits.items())
            raise UserError(
                f"sequence length {sequence_length} is longer than every shard of '{name}' (the longest has {longest} "
                f"tokens), blocks: {blocks}; shorten it, or prepare with more text or larger --shard-tokens"
            )


def read_data_facts(path: str | dict[str, float], sequence_length: int) -> DataFacts:
    """Returns the vocabulary and the training sequences of a prepared folder, or of a weighted mixture of folders.

    Raises:
        UserError: A folder is not a prepared one, its shards are too short, or the tokenizers differ.
    """
    weights = {path: 1.0} if isinstance(path, str) else path
    manifests = {folder: read_manifest(folder) for folder in weights}
    for manifest in manifests.values():
        check_sequence_length(manifest, sequence_length)
    if len({manifest.tokenizer.fingerprint for manifest in manifests.values()}) > 1:
        raise UserError(f"data: {', '.join(weights)} have different tokenizers; prepare all with --tokenizer of one")
    sources = tuple(
        Source(weights[folder], manifest.splits["train"].items(sequence_length))
        for folder, manifest in manifests.items()
    )
    tokenizer = next(iter(manifests.values())).tokenizer
    return DataFacts(tokenizer.vocab_size, sources, tokenizer.fingerprint)
