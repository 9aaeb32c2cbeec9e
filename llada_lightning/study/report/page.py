"""A report as an HTML page that needs nothing beside itself, and as Markdown with its figures in files."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from rich.table import Table

from llada_lightning.study.report import Report
from llada_lightning.study.report.verdict import number
from llada_lightning.support.printing import visible

_SHORT = 16
"""Characters of a cell that need not be broken."""


@dataclass(frozen=True)
class Grid:
    """A printed table as text: a column without a name belongs to the one on its left."""

    title: str
    header: list[str]
    kinds: list[str]
    """Of each column: `number`, which stands on the right, `long` text, which is broken, or `short` text."""
    rows: list[list[str]]
    caption: list[str]
    """The lines below the table."""

    @classmethod
    def of(cls, table: Table) -> Grid:
        """The text of a table that is printed for people."""
        columns = [(str(column.header).strip(), column.justify, list(column.cells)) for column in table.columns]
        starts = [number for number, (name, _, _) in enumerate(columns) if name or not number]
        spans = [columns[start:end] for start, end in zip(starts, [*starts[1:], len(columns)], strict=True)]
        cells = [
            [" ".join(filter(None, (str(text).strip() for text in parts))) for parts in zip(*span_cells, strict=True)]
            for span_cells in ([cells for _, _, cells in span] for span in spans)
        ]
        return cls(
            title=str(table.title or ""),
            header=[span[0][0] for span in spans],
            kinds=[
                "number" if span[0][1] == "right" else "long" if max(map(len, own), default=0) > _SHORT else "short"
                for span, own in zip(spans, cells, strict=True)
            ],
            rows=[list(row) for row in zip(*cells, strict=True)],
            caption=str(table.caption or "").splitlines(),
        )


def html_page(report: Report) -> str:
    """The report as one HTML page: no script, no font, image or style from elsewhere."""
    environment = _environment(autoescape=True, finalize=_visible)
    return environment.get_template("page.html.jinja").render(report=report)


def markdown_page(report: Report, folder: str) -> str:
    """The report as Markdown (with GitHub's tables), whose figures are ``folder/NAME.svg``.

    Args:
        report: The report.
        folder: The path of the figures' folder, from the file.
    """
    environment = _environment(autoescape=False, finalize=_escaped)
    text = environment.get_template("page.md.jinja").render(report=report, folder=folder)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def _environment(autoescape: bool, finalize: Callable[[Any], Any]) -> Environment:
    environment = Environment(
        loader=PackageLoader("llada_lightning.study.report", "."), autoescape=autoescape, finalize=finalize,
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters |= {"grid": Grid.of, "number": number}
    return environment


def _visible(value: Any) -> Any:
    """A value of a page, without control characters, which HTML forbids."""
    return visible(value) if isinstance(value, str) else value


_SPECIAL = re.compile(r"([\\`*_{}\[\]|~$#!])")
"""Characters that begin something in Markdown wherever they stand. ``#`` and ``!`` do so at some places only."""


def _escaped(value: Any) -> Any:
    """A value as plain text within a line of Markdown; what the template calls safe stays as it is."""
    if not isinstance(value, str) or hasattr(value, "__html__"):
        return value
    text = visible(" ".join(value.split())).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = _SPECIAL.sub(r"\\\1", text)
    return re.sub(r"^(\d+)([.)] )|^([-+=])", _not_a_list, text)


def _not_a_list(found: re.Match[str]) -> str:
    """The beginning of a text that would be a list, or underline the line before it."""
    return f"{found[1]}\\{found[2]}" if found[1] else f"\\{found[3]}"
