"""Whatever fails while a corpus is prepared: one line, nothing under the final name, and the next call succeeds."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from llada_lightning.commands.main import main
from llada_lightning.data import prepare as prepare_module
from llada_lightning.data import text_files
from llada_lightning.data.manifest import read_manifest
from llada_lightning.data.prepare import prepare
from llada_lightning.data.shards import verify
from llada_lightning.data.tokenizers import train_tokenizer
from llada_lightning.support.errors import UserError
from llada_lightning.support.files import building

TEXTS = [f"document {n}: " + "the cat sat on the mat. " * (n % 7) for n in range(60)]
SHARD_TOKENS = 16


@pytest.fixture(scope="session")
def small_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer(TEXTS, 300).save(str(path))
    return str(path)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "text"
    folder.mkdir()
    for part in range(4):
        lines = [json.dumps({"text": text}) + "\n" for text in TEXTS[part::4]]
        (folder / f"{part}.jsonl").write_text("".join(lines))
    return folder


def arguments(corpus: Path, out: Path, tokenizer: str) -> list[str]:
    return [
        *("prepare", "--source", str(corpus), "--out", str(out), "--tokenizer", tokenizer),
        *("--val-fraction", "0.3", "--shard-tokens", str(SHARD_TOKENS), "--quiet"),
    ]


def refused(corpus: Path, out: Path, tokenizer: str, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of a call that fails and leaves nothing beside the corpus."""
    before = sorted(out.parent.iterdir())
    capsys.readouterr()
    assert main(arguments(corpus, out, tokenizer)) == 2
    answer = capsys.readouterr()
    assert answer.out == ""
    assert answer.err.count("\n") == 1
    assert sorted(out.parent.iterdir()) == before
    return answer.err


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def expected(corpus: Path, tmp_path: Path, small_tokenizer: str) -> dict[str, bytes]:
    """Every file of an undisturbed preparation."""
    out = tmp_path / "undisturbed"
    assert main(arguments(corpus, out, small_tokenizer)) == 0
    return contents(out)


def test_a_disk_that_is_full_at_any_file(
    corpus: Path, tmp_path: Path, small_tokenizer: str, expected: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    """A limit on the size of files stands for the disk: each file that is larger than all before it fails in turn."""
    sizes = {name: len(content) for name, content in expected.items()}
    assert (
        sizes["train/chunk-0-0.bin"] < sizes["train/index.json"] < sizes["tokenizer.json"] < sizes["manifest.json"]
    ), "each has its turn"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    out, said = tmp_path / "out", []
    for name in ("train/chunk-0-0.bin", "train/index.json", "tokenizer.json", "manifest.json"):
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (sizes[name] - 1, hard))
            said.append(refused(corpus, out, small_tokenizer, capsys))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert all("cannot be written (File too large); free space, or choose another --out" in line for line in said)
    assert main(arguments(corpus, out, small_tokenizer)) == 0
    assert contents(out) == expected


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("support.files.tempfile", "mkdtemp"),
        ("support.files.fcntl", "flock"),
        ("support.files.Path", "rename"),
        ("data.shards.Path", "write_text"),
    ],
)
def test_a_place_that_refuses(
    corpus: Path,
    tmp_path: Path,
    small_tokenizer: str,
    module: str,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(f"llada_lightning.{module}.{name}", refuse)
    line = refused(corpus, tmp_path / "out", small_tokenizer, capsys)
    assert "(Read-only file system)" in line
    assert "choose a" in line


def test_a_parent_where_nothing_can_be_made(
    corpus: Path, small_tokenizer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(corpus, Path("/proc/llada-out"), small_tokenizer)) == 2
    assert "output '/proc/llada-out' cannot be written (" in capsys.readouterr().err
    assert main(arguments(corpus, Path("/proc/deep/llada-out"), small_tokenizer)) == 2
    assert "output '/proc/deep/llada-out' cannot be written (" in capsys.readouterr().err


KILLED = """
import os, signal, sys
from llada_lightning.commands.main import main
from llada_lightning.support import files
from llada_lightning.data.shards import ShardWriter

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

moment, *arguments = sys.argv[1:]
if moment == "rename":
    files._take_name = die
else:
    record = ShardWriter._record
    ShardWriter._record = lambda self, path: die() if len(self.shards) == int(moment) else record(self, path)
main(arguments)
"""


@pytest.mark.parametrize("moment", ["20", "rename"])
def test_a_killed_preparation_is_done_again_bit_for_bit(
    corpus: Path, tmp_path: Path, small_tokenizer: str, expected: dict[str, bytes], moment: str
) -> None:
    out = tmp_path / "below" / "out"
    command = [sys.executable, "-c", KILLED, moment, *arguments(corpus, out, small_tokenizer)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run(command, env=environment).returncode == -signal.SIGKILL
    [leftover] = out.parent.iterdir()
    assert leftover.name.startswith(".out.partial-")
    assert len(list(leftover.rglob("*.bin"))) > 20
    assert main(arguments(corpus, out, small_tokenizer)) == 0
    assert contents(out) == expected
    assert list(out.parent.iterdir()) == [out]
    assert verify(out).damaged == ()


def at_document(monkeypatch: pytest.MonkeyPatch, number: int, do: Callable[[], Any]) -> None:
    """Does something when so many documents have been read."""
    count = 0
    in_validation = prepare_module.in_validation

    def counted(raw: bytes, val_fraction: float) -> bool:
        nonlocal count
        count += 1
        if count == number:
            do()
        return in_validation(raw, val_fraction)

    monkeypatch.setattr(prepare_module, "in_validation", counted)


def appended(path: Path) -> None:
    with path.open("a") as file:
        file.write(json.dumps({"text": "a late line"}) + "\n")


SOURCE_FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "grows": (lambda text: appended(text / "3.jsonl"), "changed while it was being read; run again"),
    "is edited behind the reader": (
        lambda text: (text / "0.jsonl").write_text((text / "0.jsonl").read_text().replace("cat", "dog")),
        "changed while it was being read; run again",
    ),
    "gets a file": (lambda text: shutil.copy(text / "0.jsonl", text / "0b.jsonl"), "changed while it was being read"),
    "loses a file": (lambda text: (text / "3.jsonl").unlink(), "changed while it was being read"),
    "goes away": (shutil.rmtree, "cannot be read (No such file or directory); repair or remove the f"),
}


@pytest.mark.parametrize("fault", SOURCE_FAULTS)
def test_a_source_that_changes_while_it_is_read(
    corpus: Path,
    tmp_path: Path,
    small_tokenizer: str,
    fault: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    do, said = SOURCE_FAULTS[fault]
    out = tmp_path / "below" / "out"
    out.parent.mkdir()
    at_document(monkeypatch, 20, lambda: do(corpus))
    assert said in refused(corpus, out, small_tokenizer, capsys)


class FailingStream:
    """A file of which the disk gives the first line and no more."""

    def __init__(self, raw: BinaryIO) -> None:
        self._raw = raw
        self.read = raw.read

    def readline(self, size: int = -1) -> bytes:
        if self._raw.tell():
            raise OSError(5, "Input/output error")
        return self._raw.readline(size)


def test_a_disk_error_in_the_middle_of_a_source(
    corpus: Path,
    tmp_path: Path,
    small_tokenizer: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(text_files._DECOMPRESSED, "", FailingStream)
    line = refused(corpus, tmp_path / "out", small_tokenizer, capsys)
    assert f"error: {corpus}/0.jsonl: cannot be read ([Errno 5] Input/output error); repair or remove the file" in line


@pytest.mark.parametrize("number", [20, 60])
def test_the_folder_is_removed_while_it_is_written(
    corpus: Path,
    tmp_path: Path,
    small_tokenizer: str,
    number: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "below" / "out"
    out.parent.mkdir()
    monkeypatch.setattr("llada_lightning.data.encoding.BATCH_CHARS", 1)  # so that shards are written from the beginning

    def remove() -> None:
        [partial] = out.parent.iterdir()
        shutil.rmtree(partial)

    at_document(monkeypatch, number, remove)
    line = refused(corpus, out, small_tokenizer, capsys)
    assert "removed or cut while they were being written" in line or "cannot be written (No such file" in line


def test_the_folder_is_removed_before_it_takes_its_name(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match="its folder was removed while it was being prepared; run again"),
        building(tmp_path / "out") as partial,
    ):
        partial.rmdir()
    assert list(tmp_path.iterdir()) == []


def test_a_shard_that_was_cut_before_the_folder_is_complete(
    corpus: Path, tmp_path: Path, small_tokenizer: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    fingerprint = prepare_module.data_fingerprint

    def cut(*given: Any) -> str:
        [shard] = tmp_path.glob(".out.partial-*/train/chunk-0-1.bin")
        os.truncate(shard, 5)
        return fingerprint(*given)

    monkeypatch.setattr(prepare_module, "data_fingerprint", cut)
    line = refused(corpus, tmp_path / "out", small_tokenizer, capsys)
    assert "shard train/chunk-0-1.bin has 5 bytes" in line


def test_a_damaged_folder_is_not_taken_for_done(corpus: Path, tmp_path: Path, small_tokenizer: str) -> None:
    settings = {"tokenizer": small_tokenizer, "val_fraction": 0.3, "progress": False}
    out = tmp_path / "out"
    prepare(str(corpus), out, **settings)
    shutil.copy(out / "val/index.json", out / "train/index.json")
    with pytest.raises(UserError, match=r"train/index\.json differs from the manifest"):
        prepare(str(corpus), out, **settings)
    assert read_manifest(out).splits["train"].tokens > 0
