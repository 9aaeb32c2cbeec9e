"""A report as an HTML page that needs nothing beside itself, and as Markdown with its figures in files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jinja2 import Environment
from rich.table import Table

from llada_lightning.study.report import Report
from llada_lightning.study.report.verdict import number
from llada_lightning.support.markdown import markdown_environment, template_environment, tidied
from llada_lightning.support.printing import visible

_PACKAGE = "llada_lightning.study.report"
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
    environment = template_environment(_PACKAGE, autoescape=True, finalize=_visible)
    return _with_filters(environment).get_template("page.html.jinja").render(report=report)


def markdown_page(report: Report, folder: str) -> str:
    """The report as Markdown (with GitHub's tables), whose figures are ``folder/NAME.svg``.

    Args:
        report: The report.
        folder: The path of the figures' folder, from the file.
    """
    template = _with_filters(markdown_environment(_PACKAGE)).get_template("page.md.jinja")
    return tidied(template.render(report=report, folder=folder))


def _with_filters(environment: Environment) -> Environment:
    environment.filters |= {"grid": Grid.of, "number": number}
    return environment


def _visible(value: Any) -> Any:
    """A value of a page, without control characters, which HTML forbids."""
    return visible(value) if isinstance(value, str) else value
