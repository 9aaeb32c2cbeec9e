"""Every byte that matters is checked, in files and in shards."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st

from llada_lightning.checkpoints.run_folder import META, damage, require_whole, whole_checkpoint
from llada_lightning.checkpoints.stored_model import open_checkpoint
from llada_lightning.support.errors import UserError

CONTENT = {"state_dict": {"a": torch.arange(40.0), "b": torch.ones(3, 5)}, "global_step": 7, "name": "run"}


def write_file(path: Path) -> Path:
    torch.save(CONTENT, path)
    return path


def write_shards(path: Path) -> Path:
    dcp.save({"state_dict": dict(CONTENT["state_dict"])}, checkpoint_id=path, no_dist=True)  # type: ignore[call-overload]
    torch.save({"global_step": 7}, path / META)
    return path


KINDS = pytest.mark.parametrize("write", [write_file, write_shards])


@KINDS
def test_a_whole_one_is_whole(write: Callable[[Path], Path], tmp_path: Path) -> None:
    assert damage(write(tmp_path / "step=00000007.ckpt")) is None
    require_whole(tmp_path / "step=00000007.ckpt")


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_flipped_bit_is_found_or_changes_nothing(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = write_file(tmp_path_factory.mktemp("flipped") / "x.ckpt")
    content = bytearray(path.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    if damage(path) is not None:
        return
    try:
        read = torch.load(path, weights_only=True)
    except Exception:
        return  # the reader finds it
    assert read["global_step"] == 7 and read["name"] == "run"
    assert all(torch.equal(read["state_dict"][key], value) for key, value in CONTENT["state_dict"].items())  # type: ignore[attr-defined]


def test_torch_reads_flipped_weights_without_a_word(tmp_path: Path) -> None:
    """Why all of this is needed; once torch checks by itself, it is not."""
    path = write_file(tmp_path / "x.ckpt")
    content = path.read_bytes()
    at = content.index(torch.tensor(39.0).numpy().tobytes())
    path.write_bytes(content[:at] + b"\0\0\0\0" + content[at + 4 :])
    assert torch.load(path, weights_only=True)["state_dict"]["a"][-1] == 0
    assert damage(path) == "'x/data/0' in x.ckpt fails its checksum"


@settings(max_examples=60, deadline=None)
@given(share=st.floats(0, 1, exclude_max=True))
def test_a_file_that_is_cut_short_is_found(share: float, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = write_file(tmp_path_factory.mktemp("cut") / "x.ckpt")
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    assert damage(path) is not None


@pytest.mark.parametrize("fault", ["flipped", "cut", "missing", "no index", "no meta", "empty"])
def test_shards_that_are_damaged_are_found(fault: str, tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "x.ckpt")
    [shard] = folder.glob("*.distcp")
    content = bytearray(shard.read_bytes())
    if fault == "flipped":
        at = content.index(torch.tensor(39.0).numpy().tobytes())
        content[at] ^= 4
        shard.write_bytes(content)
    elif fault in ("cut", "empty"):
        shard.write_bytes(content[: len(content) // 2 if fault == "cut" else 0])
    else:
        {"missing": shard, "no index": folder / ".metadata", "no meta": folder / META}[fault].unlink()
    assert damage(folder) is not None
    with pytest.raises(UserError, match=r"x.ckpt' is damaged \(.+\) or of another program; take another one"):
        require_whole(folder)


def test_random_bytes_raise_nothing_but_the_verdict(tmp_path: Path) -> None:
    draw = random.Random(0)
    for length in (0, 1, 22, 1000, 70_000):
        path = tmp_path / f"{length}.ckpt"
        path.write_bytes(draw.randbytes(length))
        assert damage(path) is not None


def test_the_last_whole_one_is_found_and_the_others_are_named(tmp_path: Path) -> None:
    for step in (5, 10, 15, 20):
        write_file(tmp_path / f"step={step:08d}.ckpt")
    for step in (15, 20):
        path = tmp_path / f"step={step:08d}.ckpt"
        path.write_bytes(path.read_bytes()[:-1])
    found, damaged = whole_checkpoint(tmp_path)
    assert found == tmp_path / "step=00000010.ckpt"
    assert {path.name for path in damaged} == {"step=00000015.ckpt", "step=00000020.ckpt"}
    assert whole_checkpoint(tmp_path / "none") == (None, {})
    with pytest.raises(UserError, match=r"take '.+step=00000010.ckpt', which is whole"):
        require_whole(tmp_path / "step=00000020.ckpt")
    with pytest.raises(UserError, match=r"step=00000020.ckpt' is not .+; give '.+step=00000010.ckpt', which is whole"):
        open_checkpoint(tmp_path)


def test_a_file_that_changes_is_read_again(tmp_path: Path) -> None:
    path = write_file(tmp_path / "x.ckpt")
    assert damage(path) is None
    path.write_bytes(path.read_bytes()[:-1])
    assert damage(path) is not None


def test_one_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        require_whole(tmp_path / "x.ckpt")
