"""The picture of a sampling process: the text, each token darker the later it appeared (paper, Tables 3, 13, 14)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llada_lightning.generation.pictures.dialogue import Dialogue
from llada_lightning.generation.pictures.picture_html import html_page
from llada_lightning.support.errors import UserError
from llada_lightning.support.files import expanded, require_replaceable, written_atomically

PICTURE_ENDINGS = (".html", ".png", ".svg")


def check_picture_path(path: str) -> Path:
    """The path of a picture that can be written, found out before the work begins.

    Raises:
        UserError: its ending is none of a picture's, or its folder does not exist.
    """
    target = expanded(path)
    if target.suffix.lower() not in PICTURE_ENDINGS:
        raise UserError(f"picture '{path}': its ending is none of {', '.join(PICTURE_ENDINGS)}; give one of them")
    if target.is_dir() or not target.parent.is_dir():
        what = "it is a folder" if target.is_dir() else f"there is no folder '{target.parent}'"
        raise UserError(f"picture '{path}': {what}; give a file in a folder that exists")
    require_replaceable(target)
    return target


def write_picture(path: Path, dialogues: Sequence[Dialogue]) -> str:
    """Draws dialogues one below the other and writes them in the format of the file's ending.

    Returns:
        What the reader should know of it, one line; empty where nothing is amiss.

    Raises:
        UserError: it is too long for a PNG, or the file cannot be written.
    """
    note = ""
    try:
        with written_atomically(path) as temporary:
            if path.suffix.lower() == ".html":
                temporary.write_text(html_page(dialogues), encoding="utf-8")
            else:
                from llada_lightning.generation.pictures.picture_figure import (
                    save_figure,  # matplotlib takes a second to import
                )

                note = save_figure(dialogues, temporary)
    except OSError as error:
        raise UserError(f"picture '{path}' cannot be written ({error.strerror}); choose another file") from error
    return note
