"""What the site needs beside MkDocs: the files outside of docs/ that pages link to, and docstrings without roles.

On GitHub a page links to any file of the repository by a relative path. On the site such a file is under
``repository/``: Markdown as a page, an image or another file as it is. A folder is its README, or else plain text.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s:#]+)(#[^)\s]*)?\)")
FENCE = re.compile(r"^ *(```|~~~)")
ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):(?=`)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files outside of docs/ that pages link to, and those that these link to in their turn."""
    root = Path(config.config_file_path).parent
    pages = [Path(file.abs_src_path) for file in files.documentation_pages() if file.abs_src_path]
    known = {Path(file.abs_src_path) for file in files if file.abs_src_path}
    while pages:
        page = pages.pop()
        for target in _targets(page):
            if target not in known and target.is_file() and root in target.parents:
                known.add(target)
                place = f"repository/{target.relative_to(root).as_posix()}"
                files.append(File.generated(config, place, abs_src_path=str(target)))
                if target.suffix == ".md":
                    pages.append(target)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point the links to where the files are on the site, and indent lists as Python-Markdown wants them."""
    if page.file.abs_src_path is None:
        return markdown
    folder = Path(page.file.abs_src_path).parent
    places = {Path(file.abs_src_path): file.src_uri for file in files if file.abs_src_path}

    def moved(match: re.Match[str]) -> str:
        image, text, link, anchor = match.groups(default="")
        place = places.get(_target(folder, link))
        if place is None:
            return text if (folder / link).is_dir() else match[0]
        return f"{image}[{text}]({os.path.relpath(place, os.path.dirname(page.file.src_uri) or '.')}{anchor})"

    parts = (text if is_code else LINK.sub(moved, text) for is_code, text in _parts(_indented(markdown)))
    return "".join(parts)


class WithoutRoles(griffe.Extension):
    """Docstrings name code as :func:`load`, which Markdown shows as `load`."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = ROLE.sub("", obj.docstring.value)


def _target(folder: Path, link: str) -> Path:
    target = Path(os.path.normpath(folder / link))
    return target / "README.md" if target.is_dir() else target


def _targets(page: Path) -> Iterator[Path]:
    """The files that the links of a page lead to."""
    for is_code, text in _parts(page.read_text(encoding="utf-8")):
        for match in () if is_code else LINK.finditer(text):
            yield _target(page.parent, match[3])


def _parts(markdown: str) -> Iterator[tuple[bool, str]]:
    """The text between code blocks, and the code blocks, with whether it is one."""
    part, is_code = "", False
    for line in markdown.splitlines(keepends=True):
        if FENCE.match(line) and not is_code:
            yield False, part
            part, is_code = line, True
        elif FENCE.match(line):
            yield True, part + line
            part, is_code = "", False
        else:
            part += line
    yield is_code, part


def _indented(markdown: str) -> str:
    """What is within an item of a list by two or three spaces, as on GitHub, is within it by four."""
    lines, shift, is_code = [], 0, False
    for line in markdown.splitlines(keepends=True):
        if FENCE.match(line) or not is_code:
            spaces = len(line) - len(line.lstrip(" "))
            shift = 4 * -(-spaces // 3) - spaces if not is_code else shift
            is_code ^= bool(FENCE.match(line))
        lines.append(" " * shift + line if line.strip() else line)
    return "".join(lines)
