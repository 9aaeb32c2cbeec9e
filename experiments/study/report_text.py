"""Numbers and tables of the report as text."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from llada_lightning.compute.shapes import get_shape
from llada_lightning.study.fits import Estimate, Multiplier


def grid(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def markdown(table: Table) -> str:
    """A table that `llada curves` prints, as Markdown, its title above and its caption below."""
    columns = [[Text.from_markup(str(cell)).plain.strip() for cell in column.cells] for column in table.columns]
    head = [str(column.header).strip() for column in table.columns]
    body = grid(head, [list(row) for row in zip(*columns, strict=True)])
    marks = [line.replace("*", "\\*", 1) for line in str(table.caption or "").splitlines()]  # "* " begins a list
    return "\n\n".join([f"{table.title}:", body, *marks])


def short_shape(name: str) -> str:
    return get_shape(name).depth_by_width


def flops(value: float) -> str:
    return f"{value:.2e}".replace("e+", "e")


def plus_minus(value: float, error: float) -> str:
    return f"{value:.3f} ± {error:.3f}"


def interval(estimate: Estimate | Multiplier, form: str = ".3g") -> str:
    value = estimate.multiplier if isinstance(estimate, Multiplier) else estimate.value
    return f"{value:{form}} ({estimate.low:{form}} to {estimate.high:{form}})".replace("inf", "∞")
