"""No byte is trained on that was not prepared: shards are compared with their checksums when they are first read."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from litdata import StreamingDataset, TokensLoader

from helpers.tiny_runs import fit, fit_arguments, losses, metrics, weights
from llada_lightning.commands.main import main
from llada_lightning.data import shards as shard_reader
from llada_lightning.data.manifest import read_manifest
from llada_lightning.data.order import EpochOrder
from llada_lightning.data.shards import ShardReader
from llada_lightning.support.errors import UserError
from llada_lightning.support.files import file_sha256

pytestmark = pytest.mark.filterwarnings("ignore:The given buffer is not writable")

L = 32


@pytest.fixture(autouse=True)
def _private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATA_OPTIMIZER_CACHE_FOLDER", str(tmp_path / "cache"))


@pytest.fixture
def folder(prepared: Path, tmp_path: Path) -> Path:
    """A prepared folder to damage."""
    return Path(shutil.copytree(prepared, tmp_path / "data"))


def reader(folder: Path, prefix: str = "") -> ShardReader:
    return ShardReader(f"{prefix}{folder}", "train", read_manifest(folder), L)


def flip(path: Path, place: int = 1000) -> None:
    raw = bytearray(path.read_bytes())
    raw[place] ^= 1
    path.write_bytes(raw)


def exchange(folder: Path) -> None:
    """Exchanges two shards of equal size."""
    first, second = folder / "train/chunk-0-2.bin", folder / "train/chunk-0-3.bin"
    contents = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(contents)


@pytest.mark.parametrize("prefix", ["", "local:"])
def test_the_items_are_litdatas_and_each_shard_is_hashed_once(
    folder: Path, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[str] = []

    def recorded(path: str) -> str:
        hashed.append(Path(path).name)
        return file_sha256(path)

    monkeypatch.setattr(shard_reader, "file_sha256", recorded)
    items, stored = reader(folder, prefix), StreamingDataset(str(folder / "train"), item_loader=TokensLoader(L))
    for _ in range(2):
        assert all(torch.equal(items[i], stored[i]) for i in range(len(stored)))
    shards = read_manifest(folder).splits["train"].shards
    assert hashed == [Path(shard.file).name for shard in shards]


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "flipped": (lambda folder: flip(folder / "train/chunk-0-2.bin"), "has the sha256 [0-9a-f]{64}, expected"),
    "exchanged": (exchange, "has the sha256 [0-9a-f]{64}, expected"),
    "foreign": (lambda folder: (folder / "train/chunk-0-2.bin").write_bytes(bytes(4108)), "has the sha256"),
    "cut": (lambda folder: (folder / "train/chunk-0-2.bin").write_bytes(bytes(40)), "has the sha256"),
    "missing": (lambda folder: (folder / "train/chunk-0-2.bin").unlink(), "cannot be read .No such file"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_shard_gives_no_item(folder: Path, damage: str) -> None:
    items, per_shard = reader(folder), 2048 // L
    do, said = DAMAGES[damage]
    do(folder)  # after the start's check, which sees sizes alone
    items[per_shard], items[4 * per_shard]  # shards 1 and 4 are whole
    for item in (2 * per_shard, 3 * per_shard - 1):
        with pytest.raises(UserError, match=rf"^'{folder}': shard train/chunk-0-2\.bin {said}.*; copy the folder"):
            items[item]


@pytest.mark.parametrize("damage", ["flipped", "exchanged", "foreign"])
def test_a_remote_folders_copy_is_compared(folder: Path, damage: str) -> None:
    items, per_shard = reader(folder, "local:"), 2048 // L
    DAMAGES[damage][0](folder)
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


def test_a_run_goes_on_when_the_shard_is_mended_as_if_nothing_had_been(
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
