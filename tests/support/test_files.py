"""Files that appear whole: what a rename may replace, and what it leaves alone."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from llada_lightning.commands.main import main
from llada_lightning.support.errors import UserError
from llada_lightning.support.files import expanded, is_there, written_atomically

WRITER = """
import sys
from pathlib import Path
from llada_lightning.support.files import written_atomically
with written_atomically(Path(sys.argv[1])) as temporary:
    temporary.write_text("by the other process")
    print(temporary.name, flush=True)
    sys.stdin.read()
"""


def test_a_link_stays_and_the_file_behind_it_is_replaced(tmp_path: Path) -> None:
    target, link = tmp_path / "elsewhere" / "data", tmp_path / "link.html"
    target.parent.mkdir()
    link.symlink_to(target)
    for text in ("new", "newer"):  # at first the link leads to nothing
        with written_atomically(link) as temporary:
            assert temporary.parent == target.parent and temporary.suffix == ".html"
            temporary.write_text(text)
        assert link.is_symlink() and target.read_text() == text
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("kind", ["pipe", "link to a pipe", "link to itself", "folder", "device"])
def test_what_is_no_regular_file_is_refused_and_stays(tmp_path: Path, kind: str) -> None:
    node = tmp_path / "node"
    if kind == "folder":
        node.mkdir()
    elif kind == "device":
        node = Path(os.devnull)
    elif kind == "link to itself":
        node.symlink_to(node)
    else:
        os.mkfifo(node)
    path = node
    if kind == "link to a pipe":
        path = tmp_path / "link"
        path.symlink_to(node)
    before = node.lstat()
    with pytest.raises(UserError, match="is no regular file") as raised, written_atomically(path):
        raise AssertionError("nothing is written")
    assert "\n" not in str(raised.value)
    assert (node.lstat().st_mode, node.lstat().st_ino) == (before.st_mode, before.st_ino)


def begun_by_another_process(path: Path) -> tuple[subprocess.Popen[str], Path]:
    """A process that is writing the file until its standard input ends, and its temporary file."""
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdin=pipe, stdout=pipe, text=True)
    assert process.stdout is not None
    return process, path.parent / process.stdout.readline().strip()


def test_what_a_killed_writer_left_is_removed_and_what_a_live_one_writes_is_not(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    killed, leftover = begun_by_another_process(path)
    live, written = begun_by_another_process(path)
    assert leftover.exists() and written.exists()  # of two at once, neither disturbs the other
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    others = [tmp_path / name for name in (f".results.{'a' * 31}.csv", f".result.{'a' * 32}.csv", ".results.mine.csv")]
    for other in others:
        other.touch()
    with written_atomically(path) as temporary:
        temporary.write_text("by this one")
        assert not leftover.exists() and written.exists()
    assert path.read_text() == "by this one"
    live.communicate("")
    assert live.returncode == 0
    assert path.read_text() == "by the other process"
    assert sorted(tmp_path.iterdir()) == sorted([path, *others])


def test_what_an_older_version_left_is_removed(tmp_path: Path) -> None:
    """Its temporary files had the same names, and no locks."""
    (tmp_path / f".fits.{'0123456789abcdef' * 2}.json").write_text("[")
    with written_atomically(tmp_path / "fits.json") as temporary:
        temporary.write_text("[]")
    assert [path.name for path in tmp_path.iterdir()] == ["fits.json"]


def test_on_a_file_system_without_locks_nothing_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("no locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    leftover = tmp_path / f".a.{'0' * 32}.csv"
    leftover.touch()
    with written_atomically(tmp_path / "a.csv") as temporary:
        temporary.write_text("whole")
    assert (tmp_path / "a.csv").read_text() == "whole" and leftover.exists()


def test_a_file_has_the_permissions_that_the_umask_leaves(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    with written_atomically(tmp_path / "atomic") as temporary:
        temporary.write_text("")
    assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("name", ["n" * 251 + ".csv", "é" * 125 + ".csv", "a." + "s" * 253])
def test_a_name_as_long_as_the_system_allows_is_written(tmp_path: Path, name: str) -> None:
    with written_atomically(tmp_path / name) as temporary:
        temporary.write_text("whole")
    assert (tmp_path / name).read_text() == "whole"


@pytest.mark.parametrize("name", ["n" * 256, "a\0b", "folder" * 50 + "/file"])
def test_a_name_that_no_file_can_have_is_one_line(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="cannot name a file") as raised, written_atomically(tmp_path / name):
        raise AssertionError("nothing is written")
    assert len(str(raised.value).splitlines()) == 1 and "\0" not in str(raised.value)
    with pytest.raises(UserError, match="cannot be read"):
        is_there(tmp_path / name)


def test_a_link_that_leads_nowhere_is_there(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("nowhere")
    assert is_there(tmp_path / "link")
    assert not is_there(tmp_path / "nowhere") and not is_there(tmp_path / "nowhere/below")


def test_the_home_of_a_user_who_does_not_exist_is_not_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert expanded("~/runs") == Path("/home/me/runs")
    assert expanded("runs/~") == Path("runs/~")
    monkeypatch.setattr("pwd.getpwnam", lambda name: {}[name])
    assert expanded("~nobody-here/runs") == Path("~nobody-here/runs")


@pytest.mark.parametrize(
    "words",
    [
        ("generate", "~nobody-here/run", "--prompt", "a"),
        ("convert", "~nobody-here/run", "out"),
        ("prepare", "--source", "~nobody-here/text.txt", "--out", "out"),
    ],
)
def test_a_path_below_it_is_missing(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(list(words)) == 2
    line = capsys.readouterr().err
    assert "~nobody-here" in line and line.count("\n") == 1
