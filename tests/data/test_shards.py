"""A prepared folder against its manifest: the quick check, the full one, and each shard as it is read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from litdata import StreamingDataset, TokensLoader
from litdata.constants import _TORCH_DTYPES_MAPPING

from helpers.small_corpora import seal
from helpers.tiny_runs import fit, fit_arguments, losses, metrics, weights
from llada_lightning.commands import prepare
from llada_lightning.commands.main import main
from llada_lightning.data import shards
from llada_lightning.data.manifest import read_manifest
from llada_lightning.data.order import EpochOrder
from llada_lightning.data.shards import ShardReader, check_shards, verify
from llada_lightning.support.errors import UserError
from llada_lightning.support.files import file_sha256

pytestmark = pytest.mark.filterwarnings("ignore:The given buffer is not writable")

SHARD = "train/chunk-0-2.bin"


@pytest.fixture
def folder(prepared: Path, tmp_path: Path) -> Path:
    """A prepared folder to damage."""
    return Path(shutil.copytree(prepared, tmp_path / "data"))


def flip(path: Path, place: int = 1000, bit: int = 0) -> None:
    raw = bytearray(path.read_bytes())
    raw[place] ^= 1 << bit
    path.write_bytes(raw)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8])


def edited(path: Path, change: Callable[[dict], None]) -> None:
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


def swap(first: Path, second: Path) -> None:
    contents = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(contents)


def set_dtype(index: dict) -> None:
    index["config"]["data_format"] = ["no_header_tensor:13"]


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "a shard missing": (lambda folder: (folder / SHARD).unlink(), rf"shard {SHARD} is missing \(4108 bytes\)"),
    "a shard cut": (lambda folder: cut(folder / SHARD), rf"shard {SHARD} has 4100 bytes, expected 4108"),
    "no index": (lambda folder: (folder / "val/index.json").unlink(), r"val/index\.json is missing"),
    "an index cut": (lambda folder: cut(folder / "val/index.json"), r"val/index\.json is not an index of litdata"),
    "an index of bytes": (
        lambda folder: (folder / "val/index.json").write_bytes(b"\xff\xfe"),
        r"val/index\.json cannot be read \(UnicodeDecodeError",
    ),
    "an index of another split": (
        lambda folder: shutil.copy(folder / "val/index.json", folder / "train/index.json"),
        r"train/index\.json differs from the manifest",
    ),
    "a shard too few in the index": (
        lambda folder: edited(folder / "train/index.json", lambda index: index["chunks"].pop()),
        r"train/index\.json differs from the manifest \(\d+ shards, expected \d+\)",
    ),
    "shards of the index in another order": (
        lambda folder: edited(folder / "train/index.json", lambda index: index["chunks"].reverse()),
        r"train/index\.json differs from the manifest at shard 0",
    ),
    "another dtype in the index": (
        lambda folder: edited(folder / "train/index.json", set_dtype),
        r"train/index\.json gives .*no_header_tensor:13.* as the format of the tokens, expected plain uint16",
    ),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), r"tokenizer\.json is missing"),
    "a tokenizer cut": (lambda folder: cut(folder / "tokenizer.json"), r"tokenizer\.json is not JSON"),
    "an edited tokenizer": (
        lambda folder: edited(folder / "tokenizer.json", lambda record: record["model"]["merges"].reverse()),
        r"tokenizer\.json has the fingerprint [0-9a-f]{64}, expected [0-9a-f]{64}",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_quick_check_names_the_file_and_the_mend(folder: Path, damage: str) -> None:
    manifest = read_manifest(folder)
    for name in (str(folder), f"local:{folder}"):
        check_shards(name, manifest)
    do, said = DAMAGES[damage]
    do(folder)
    for name in (str(folder), f"local:{folder}"):
        with pytest.raises(UserError, match=rf"^'{folder}': {said}.*; copy the folder again, or") as caught:
            check_shards(name, manifest)
        assert "\n" not in str(caught.value)
    assert verify(folder).damaged  # the full check finds no less


def test_another_layout_of_the_tokenizers_file_is_the_same_tokenizer(folder: Path) -> None:
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()), sort_keys=True))
    check_shards(folder, read_manifest(folder))


def test_litdata_numbers_the_dtypes_as_we_read_them() -> None:
    for dtype, names in shards._INDEX_DTYPES.items():
        assert {str(_TORCH_DTYPES_MAPPING[int(name.split(":")[1])]) for name in names} == {f"torch.{dtype}"}


def test_a_whole_folder_is_verified(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = read_manifest(folder)
    blocks: list[int] = []
    found = verify(folder, blocks.append)
    assert found.damaged == ()
    assert found.files == sum(path.is_file() for path in folder.rglob("*"))
    sizes = [shard.size for split in manifest.splits.values() for shard in split.shards]
    assert sum(blocks) == sum(sizes) - 12 * len(sizes)  # all but the headers
    assert main(["prepare", "--verify", str(folder), "--json"]) == 0
    answer = capsys.readouterr()
    record = json.loads(answer.out)
    assert record["whole"] is True
    assert record["damaged"] == []
    assert record["fingerprint"] == manifest.fingerprint
    assert record["tokens"] == {name: split.tokens for name, split in manifest.splits.items()}
    assert main(["prepare", "--verify", str(folder)]) == 0
    answer = capsys.readouterr()
    assert "whole" in answer.out
    assert f"{manifest.splits['train'].documents}" in answer.out
    assert answer.err == ""


def test_every_damage_is_listed_and_the_first_is_the_error(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flip(folder / SHARD)
    swap(folder / "train/chunk-0-4.bin", folder / "train/chunk-0-3.bin")
    cut(folder / "val/chunk-0-0.bin")
    (folder / "val/chunk-0-1.bin").unlink()
    assert main(["prepare", "--verify", str(folder), "--json"]) == 2
    answer = capsys.readouterr()
    damaged = {damage["file"]: damage["problem"] for damage in json.loads(answer.out)["damaged"]}
    assert list(damaged) == [
        SHARD,
        "train/chunk-0-3.bin",
        "train/chunk-0-4.bin",
        "val/chunk-0-0.bin",
        "val/chunk-0-1.bin",
    ]
    assert f"has the sha256 {file_sha256(folder / SHARD)}, expected " in damaged[SHARD]
    assert damaged["val/chunk-0-0.bin"] == "has 4100 bytes, expected 4108"
    assert damaged["val/chunk-0-1.bin"] == "is missing"
    assert answer.err.startswith(f"error: '{folder}' is damaged: {SHARD} has the sha256")
    assert ", and 4 more files; copy the folder again" in answer.err
    assert answer.err.count("\n") == 1
    assert main(["prepare", "--verify", str(folder)]) == 2
    table = capsys.readouterr().out
    assert all(name in table for name in damaged)


@pytest.mark.parametrize(
    ("word", "said"),
    [("vocab_size", "1 tokens beyond the vocabulary"), ("mask_id", r"1 tokens of \[MASK\], which no text")],
)
def test_tokens_that_no_text_has_are_found_behind_right_checksums(folder: Path, word: str, said: str) -> None:
    manifest = read_manifest(folder)
    raw = bytearray((folder / SHARD).read_bytes())
    place = next(  # not an EOS, whose count is checked too
        i for i in range(100, len(raw), 2) if raw[i] + 256 * raw[i + 1] != manifest.tokenizer.eos_id
    )
    raw[place : place + 2] = np.uint16(getattr(manifest.tokenizer, word)).tobytes()
    (folder / SHARD).write_bytes(raw)
    seal(folder)
    [damage] = verify(folder).damaged
    assert damage.file == SHARD
    with pytest.raises(UserError, match=rf"{SHARD} has {said}"):
        prepare.main(["--verify", str(folder), "--json", "--quiet"])


def test_documents_are_counted(folder: Path) -> None:
    manifest = read_manifest(folder)
    val = manifest.splits["val"]
    one_more = replace(val, documents=val.documents + 1)
    (folder / "manifest.json").write_text(replace(manifest, splits={**manifest.splits, "val": one_more}).to_json())
    [damage] = verify(folder).damaged
    said = f"says {val.documents + 1} documents in 'val', its shards end {val.documents}"
    assert (damage.file, damage.problem) == ("manifest.json", said)


def test_blocks_that_cut_tokens_change_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "_BLOCK_BYTES", 7)
    assert verify(folder).damaged == ()


def test_a_remote_folder_is_verified_by_streaming(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = fsspec.filesystem("memory")
    store.put(str(folder), "/verified/data", recursive=True)
    assert main(["prepare", "--verify", "memory://verified/data"]) == 0
    raw = store.cat(f"/verified/data/{SHARD}")
    store.pipe(f"/verified/data/{SHARD}", raw[:-1] + bytes([raw[-1] ^ 1]))
    store.rm("/verified/data/val/index.json")
    capsys.readouterr()
    assert main(["prepare", "--verify", "memory://verified/data", "--json"]) == 2
    answer = capsys.readouterr()
    assert [damage["file"] for damage in json.loads(answer.out)["damaged"]] == [SHARD, "val/index.json"]
    assert "and 1 more file; " in answer.err


@pytest.mark.parametrize("arguments", [["--verify", "x", "--out", "y"], []])
def test_either_out_or_verify(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prepare", *arguments]) == 2
    assert "out, or verify, and not both" in capsys.readouterr().err


def test_nothing_to_verify(tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cut(folder / "manifest.json")
    for name, said in ((tmp_path / "nowhere", "does not exist"), (folder, r"manifest.json of ")):
        assert main(["prepare", "--verify", str(name), "--json"]) == 2
        answer = capsys.readouterr()
        assert answer.out == ""
        assert said in answer.err
        assert answer.err.count("\n") == 1


# --- each shard when it is first read: no byte is trained on that was not prepared -----------------------------------

L = 32


@pytest.fixture(autouse=True)
def _private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATA_OPTIMIZER_CACHE_FOLDER", str(tmp_path / "cache"))


def reader(folder: Path, prefix: str = "") -> ShardReader:
    return ShardReader(f"{prefix}{folder}", "train", read_manifest(folder), L)


@pytest.mark.parametrize("prefix", ["", "local:"])
def test_the_items_are_litdatas_and_each_shard_is_hashed_once(
    folder: Path, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[str] = []

    def recorded(path: str) -> str:
        hashed.append(Path(path).name)
        return file_sha256(path)

    monkeypatch.setattr(shards, "file_sha256", recorded)
    items, stored = reader(folder, prefix), StreamingDataset(str(folder / "train"), item_loader=TokensLoader(L))
    for _ in range(2):
        assert all(torch.equal(items[i], stored[i]) for i in range(len(stored)))
    stored_shards = read_manifest(folder).splits["train"].shards
    assert hashed == [Path(shard.file).name for shard in stored_shards]


def test_a_shard_that_two_threads_of_litdata_close_at_once_is_read_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local, remote = reader(folder), reader(folder, "local:")
    last = len(StreamingDataset(f"{folder}/train", item_loader=TokensLoader(L))) - 1
    remote[0]
    lost = iter([KeyError(0)])

    def close(self: TokensLoader, chunk_index: int, whole: Callable[..., None] = TokensLoader.close) -> None:
        for error in lost:
            raise error
        whole(self, chunk_index)

    monkeypatch.setattr(TokensLoader, "close", close)
    assert torch.equal(remote[last], local[last])
    assert next(lost, None) is None  # it was lost
    assert torch.equal(remote[0], local[0])


SHARD_DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "flipped": (lambda folder: flip(folder / SHARD), "has the sha256 [0-9a-f]{64}, expected"),
    "exchanged": (
        lambda folder: swap(folder / SHARD, folder / "train/chunk-0-3.bin"),
        "has the sha256 [0-9a-f]{64}, expected",
    ),
    "foreign": (lambda folder: (folder / SHARD).write_bytes(bytes(4108)), "has the sha256"),
    "cut": (lambda folder: (folder / SHARD).write_bytes(bytes(40)), "has the sha256"),
    "missing": (lambda folder: (folder / SHARD).unlink(), "cannot be read .No such file"),
}


@pytest.mark.parametrize("damage", SHARD_DAMAGES)
def test_a_damaged_shard_gives_no_item(folder: Path, damage: str) -> None:
    items, per_shard = reader(folder), 2048 // L
    do, said = SHARD_DAMAGES[damage]
    do(folder)  # after the start's check, which sees sizes alone
    items[per_shard], items[4 * per_shard]  # shards 1 and 4 are whole
    for item in (2 * per_shard, 3 * per_shard - 1):
        with pytest.raises(UserError, match=rf"^'{folder}': shard train/chunk-0-2\.bin {said}.*; copy the folder"):
            items[item]


@pytest.mark.parametrize("damage", ["flipped", "exchanged", "foreign"])
def test_a_remote_folders_copy_is_compared(folder: Path, damage: str) -> None:
    items, per_shard = reader(folder, "local:"), 2048 // L
    SHARD_DAMAGES[damage][0](folder)
    items[per_shard]
    with pytest.raises(UserError, match=r"shard train/chunk-0-2\.bin has the sha256"):
        items[2 * per_shard]


@pytest.mark.parametrize("prefix", ["", "local:"])
def test_an_index_of_another_split_gives_no_item(folder: Path, prefix: str) -> None:
    shutil.copy(folder / "val/index.json", folder / "train/index.json")
    with pytest.raises(UserError, match=r"train/index\.json differs from the manifest"):
        reader(folder, prefix)[0]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_on_damaged_shards_is_one_line_and_no_step(
    folder: Path, tmp_path: Path, workers: int, capfd: pytest.CaptureFixture[str]
) -> None:
    for path in (folder / "train").glob("*.bin"):
        flip(path)
    assert main(fit_arguments("llada", folder, tmp_path / "runs", f"--data.workers={workers}")) == 2
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert errors[0].startswith(f"error: '{folder}': shard train/chunk-0-")
    assert errors[0].endswith("; copy the folder again, or delete it and prepare it again")
    run = tmp_path / "runs/test/run"
    assert not (run / "metrics.csv").exists() or metrics(run) == []
    assert not list((run / "checkpoints").glob("*"))


def test_a_run_goes_on_when_the_shard_is_repaired_as_if_nothing_had_been(
    prepared: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ("--data.window_shards=1", "--trainer.max_steps=24")  # so that damage is met after some steps
    whole = fit("arm", prepared, tmp_path / "whole", *settings)
    shards = sorted((folder / "train").glob("*.bin"))
    bad = next(path for path in shards if is_met_between(prepared, path, 6, 24))
    flip(bad)
    arguments = fit_arguments("arm", folder, tmp_path / "runs", *settings)
    assert main(arguments) == 2
    assert f"shard train/{bad.name} has the sha256" in capsys.readouterr().err
    run = tmp_path / "runs/test/run"
    assert losses(run) == losses(whole)[: len(losses(run))]
    assert 0 < len(losses(run)) < 24
    shutil.copy(prepared / "train" / bad.name, bad)
    assert main(arguments) == 0
    assert losses(run) == losses(whole)
    assert all(torch.equal(weights(run)[name], value) for name, value in weights(whole).items())


def is_met_between(folder: Path, shard: Path, first: int, last: int) -> bool:
    """Whether the run above reads a shard for the first time in these steps (of 8 sequences)."""
    shards = read_manifest(folder).splits["train"].shards
    order = EpochOrder([own.tokens // L for own in shards], seed=0, window_shards=1)
    number = next(i for i, own in enumerate(shards) if own.file.endswith(f"/{shard.name}"))
    start = sum(own.tokens // L for own in shards[:number])
    items = range(start, start + shards[number].tokens // L)
    met = [n for n in range(8 * last) if order.item(n) in items]
    return bool(met) and met[0] >= 8 * first
