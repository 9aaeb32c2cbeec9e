"""The manifest: counts, fingerprints, and the checks before training."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import fsspec
import pytest

from llada_lightning.data.manifest import (
    Manifest,
    Shard,
    Split,
    TokenizerInfo,
    check_sequence_length,
    data_fingerprint,
    read_manifest,
    read_tokenizer_text,
)
from llada_lightning.errors import UserError


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


def test_shards_missing_or_cut_short(tmp_path: Path) -> None:
    manifest = write_folder(tmp_path / "data")
    folder = str(tmp_path / "data")
    check_shards(folder, manifest)
    check_shards(f"local:{folder}", manifest)
    shard = tmp_path / "data" / "train" / "chunk-0-1.bin"
    shard.write_bytes(bytes(20))
    with pytest.raises(UserError, match=r"train/chunk-0-1\.bin has 20 bytes, expected 22; copy the folder again"):
        check_shards(folder, manifest)
    shard.unlink()
    with pytest.raises(UserError, match=r"train/chunk-0-1\.bin is missing"):
        check_shards(folder, manifest)
    (tmp_path / "data" / "val" / "index.json").unlink()
    shard.write_bytes(bytes(22))
    with pytest.raises(UserError, match=r"val/index\.json is missing"):
        check_shards(folder, manifest)


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
