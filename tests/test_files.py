"""Files that appear whole: what a rename may replace, and what it leaves alone."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from llada_lightning.errors import UserError
from llada_lightning.files import written_atomically


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
