"""The manifest: counts, fingerprints, and the checks before training."""

import dataclasses
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pytest

from llada_lightning.data import TokenizerInfo
from llada_lightning.data.manifest import (
    Manifest,
    Shard,
    Split,
    check_sequence_length,
    data_fingerprint,
    loss_note,
    read_manifest,
    read_tokenizer_text,
)
from llada_lightning.data.shards import check_shards
from llada_lightning.support.errors import UserError


def make_manifest() -> Manifest:
    train = Split(3, 25, 100, (Shard("train/chunk-0-0.bin", 20, 52, "aa"), Shard("train/chunk-0-1.bin", 5, 22, "bb")))
    val = Split(1, 8, 30, (Shard("val/chunk-0-0.bin", 8, 28, "cc"),))
    splits = {"train": train, "val": val}
    tokenizer = TokenizerInfo(300, "[EOS]", 0, "[MASK]", 1, "dd")
    fingerprint = data_fingerprint(splits, "dd")
    return Manifest({"digest": "ee"}, {"val_fraction": 0.5}, tokenizer, "uint16", splits, fingerprint)


def write_folder(folder: Path) -> Manifest:
    manifest = make_manifest()
    for name, split in manifest.splits.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "index.json").write_text("{}")
        for shard in split.shards:
            (folder / shard.file).write_bytes(bytes(shard.size))
    (folder / "manifest.json").write_text(manifest.to_json())
    return manifest


def test_counts() -> None:
    train = make_manifest().splits["train"]
    assert [train.items(length) for length in (1, 4, 5, 6, 20, 21)] == [25, 6, 5, 3, 1, 0]
    assert train.bytes_per_token == 4.0


def test_written_and_read_again(tmp_path: Path) -> None:
    manifest = write_folder(tmp_path / "data")
    for folder in (f"{tmp_path}/data", f"{tmp_path}/data/", f"local:{tmp_path}/data", f"file://{tmp_path}/data"):
        assert read_manifest(folder) == manifest
    assert read_manifest(tmp_path / "data") == manifest


def test_a_folder_of_an_older_version_has_no_count_of_lost_bytes(tmp_path: Path) -> None:
    manifest = write_folder(tmp_path / "data")
    record = json.loads(manifest.to_json())
    for split in record["splits"].values():
        assert split.pop("lost_bytes") is None
    del record["checksum"]
    (tmp_path / "data" / "manifest.json").write_text(json.dumps(record))
    assert read_manifest(tmp_path / "data") == manifest
    assert manifest.splits["val"].lost_share == 0


@pytest.mark.parametrize("lost", [-1, 1.5, "1", 10**9])
def test_an_impossible_count_of_lost_bytes_is_a_damage(tmp_path: Path, lost: object) -> None:
    manifest = write_folder(tmp_path / "data")
    splits = {**manifest.splits, "val": replace(manifest.splits["val"], lost_bytes=lost)}  # type: ignore[arg-type]
    (tmp_path / "data" / "manifest.json").write_text(replace(manifest, splits=splits).to_json())
    with pytest.raises(UserError, match="val: lost_bytes"):
        read_manifest(tmp_path / "data")


@pytest.mark.parametrize(("share", "said"), [(0.0, None), (0.001, None), (0.0123, "1.23 %"), (1.0, "100 %")])
def test_a_note_of_lost_text(share: float, said: str | None) -> None:
    note = loss_note(share)
    assert (note is None) if said is None else (note is not None and said in note)


def test_read_from_a_remote_store() -> None:
    with fsspec.open("memory://bucket/data/manifest.json", "w") as file:
        file.write(make_manifest().to_json())
    assert read_manifest("memory://bucket/data") == make_manifest()
    check_shards("memory://bucket/data", make_manifest())
    with pytest.raises(UserError, match=r"holds no manifest\.json"):
        read_manifest("memory://bucket/other")
    with fsspec.open("memory://bucket/data/tokenizer.json", "w") as file:
        file.write("a tokenizer")
    assert read_tokenizer_text("memory://bucket/data") == "a tokenizer"
    with pytest.raises(UserError, match=r"'memory://bucket/other' holds no tokenizer.json"):
        read_tokenizer_text("memory://bucket/other")
    with pytest.raises(UserError, match="nonsense://bucket"):
        read_manifest("nonsense://bucket")


def test_the_fingerprint_sees_tokens_and_tokenizer_alone() -> None:
    splits = make_manifest().splits
    same = data_fingerprint(splits, "dd")
    assert data_fingerprint(dict(reversed(splits.items())), "dd") == same
    renamed = dataclasses.replace(splits["val"], shards=(Shard("val/other.bin", 8, 28, "cc"),))
    assert data_fingerprint({**splits, "val": renamed}, "dd") == same
    changed = dataclasses.replace(splits["val"], shards=(Shard("val/chunk-0-0.bin", 8, 28, "cd"),))
    assert data_fingerprint({**splits, "val": changed}, "dd") != same
    assert data_fingerprint(splits, "de") != same


def test_missing_foreign_damaged_and_of_another_format(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere' does not exist; run: llada prepare"):
        read_manifest(tmp_path / "nowhere")
    with pytest.raises(UserError, match="is not a prepared data folder; run: llada prepare"):
        read_manifest(tmp_path)
    path = tmp_path / "manifest.json"
    path.write_text('{"name": "a web app"}')
    with pytest.raises(UserError, match="is not a prepared data folder"):
        read_manifest(tmp_path)
    with pytest.raises(UserError, match="is not a prepared data folder"):
        read_manifest(path)
    record = json.loads(make_manifest().to_json())
    path.write_text(json.dumps({**record, "format": 99}))
    with pytest.raises(UserError, match="has format 99, this version reads format 1"):
        read_manifest(tmp_path)
    del record["tokenizer"]["mask_id"]
    for text in (json.dumps(record), make_manifest().to_json()[:-20], json.dumps({**record, "splits": []})):
        path.write_text(text)
        with pytest.raises(UserError, match="is damaged"):
            read_manifest(tmp_path)


def test_an_edited_manifest_is_refused(tmp_path: Path) -> None:
    text = make_manifest().to_json()
    (tmp_path / "manifest.json").write_text(text.replace('"bytes": 100', '"bytes": 101'))
    with pytest.raises(UserError, match=r"is damaged \(its checksum is that of another text\); copy the folder again"):
        read_manifest(tmp_path)
    record = json.loads(text)
    assert record.pop("checksum")
    (tmp_path / "manifest.json").write_text(json.dumps(record))  # as the first versions wrote it
    assert read_manifest(tmp_path) == make_manifest()


def changed(*keys: Any, value: Any) -> str:
    """The text of a manifest without a checksum, one of its values changed."""
    record = json.loads(make_manifest().to_json())
    del record["checksum"]
    inner = record
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    return json.dumps(record)


SHARD = ("splits", "train", "shards", 0)


@pytest.mark.parametrize(
    ("keys", "value", "said"),
    [
        (("splits",), {}, "splits none, expected train and val"),
        (("dtype",), "float32", "dtype 'float32', expected uint16 or int32"),
        (("dtype",), ["uint16"], "unhashable"),
        (("dtype",), "int32", "20 tokens in 52 bytes"),
        (("source",), {}, "KeyError: 'digest'"),
        (("settings",), None, "settings are missing"),
        (("tokenizer", "vocab_size"), 1 << 17, "vocab_size 131072 as uint16"),
        (("tokenizer", "vocab_size"), -300, "vocab_size -300"),
        (("tokenizer", "vocab_size"), "300", "vocab_size '300'"),
        (("tokenizer", "mask_id"), 300, "mask_id 300 of 300 tokens"),
        (("tokenizer", "mask_id"), 0, "eos_id and mask_id are both 0"),
        (("tokenizer", "eos_id"), -1, "eos_id -1"),
        (("splits", "val", "bytes"), 0, "val: bytes 0"),
        (("splits", "val", "documents"), 1e300, r"val: documents 1e\+300"),
        (("splits", "val", "documents"), 9, "8 tokens in 9 documents"),
        (("splits", "train", "tokens"), 1 << 60, "its shards hold 25"),
        (("splits", "train", "shards"), [], "25 tokens in 3 documents, its shards hold 0"),
        ((*SHARD, "tokens"), -20, "-20 tokens in 52 bytes"),
        ((*SHARD, "size"), 50, "20 tokens in 50 bytes"),
        ((*SHARD, "file"), "train/../../secret", "lies outside of 'train'"),
        ((*SHARD, "file"), "/etc/passwd", "lies outside of 'train'"),
        ((*SHARD, "file"), 7, "AttributeError"),
        ((*SHARD, "sha256"), "ab", "fingerprint [0-9a-f]{64}, the checksums of its shards and tokenizer give"),
        (("tokenizer", "fingerprint"), "of another tokenizer", "the checksums of its shards and tokenizer give"),
        (("fingerprint",), "of another folder", "fingerprint of another folder, the checksums"),
    ],
)
def test_what_cannot_be_true_is_refused(tmp_path: Path, keys: tuple[Any, ...], value: Any, said: str) -> None:
    (tmp_path / "manifest.json").write_text(changed(*keys, value=value))
    with pytest.raises(UserError, match=rf"^manifest\.json of '.*' is damaged \(.*{said}.*\); ") as caught:
        read_manifest(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_sequence_longer_than_every_shard() -> None:
    manifest = make_manifest()
    check_sequence_length(manifest, 8)
    with pytest.raises(UserError, match=r"length 9 .* of 'val' .*8 tokens.*train 2, val 0"):
        check_sequence_length(manifest, 9)
    with pytest.raises(UserError, match=r"length 21 .* of 'train'"):
        check_sequence_length(manifest, 21)
    with pytest.raises(UserError, match="below 1"):
        check_sequence_length(manifest, 0)


def test_reading_a_manifest_imports_neither_torch_nor_litdata() -> None:
    code = "import sys, llada_lightning.data.manifest; print({'torch', 'litdata', 'lightning'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"
