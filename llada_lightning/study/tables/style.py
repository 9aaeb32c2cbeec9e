"""How every table is made, and how numbers are written in it."""

from __future__ import annotations

import math
import re

from rich.box import SIMPLE_HEAD
from rich.table import Table

from llada_lightning.compute.shapes import format_count
from llada_lightning.study.fits import Estimate


def titled(title: str, *columns: str, left: int = 1) -> Table:
    """An empty table for 80 columns; a column without a name belongs to the one on its left."""
    printed = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 0), show_edge=False, pad_edge=False)
    for number, name in enumerate(columns):
        printed.add_column(name, justify="left" if number < left else "right", overflow="fold", no_wrap=number > 0)
    return printed


def captioned(printed: Table, caption: str) -> Table:
    """The table with a caption below it, if there is one."""
    if caption:
        printed.caption, printed.caption_justify = caption, "left"
    return printed


def short_shape(shape: str) -> str:
    """Of a shape without a name, depth and width: `2x32`."""
    return re.sub(r"^L(\d+)-d(\d+)-.*", r"\1x\2", shape)


def known(value: float, form: str) -> str:
    """A number in a format; nothing where it is not known."""
    return format(value, form) if math.isfinite(value) else ""


def flops_text(value: float, form: str = ".1e") -> str:
    """FLOPs as 3.1e12."""
    return format(value, form).replace("e+", "e")


def with_short_powers(text: str) -> str:
    """A text whose FLOPs are written as in tables: 3.1e12, not 3.1e+12."""
    return re.sub(r"(?<=\d)e\+(?=\d)", "e", text)


def count_text(value: float) -> str:
    """Parameters or tokens, or the end of an interval of them: 12.5m, ∞."""
    if math.isnan(value):
        return "?"
    return "∞" if math.isinf(value) else format_count(value) if value >= 1 else "0"


def end_text(value: float, form: str) -> str:
    """The end of an interval, which may be open (∞) or not known (?)."""
    if abs(value) >= 1e4 and math.isfinite(value):
        return f"{value:.0e}".replace("e+", "e")
    return "?" if math.isnan(value) else "∞" if math.isinf(value) else format(value, form)


def factor_text(value: float) -> str:
    """A multiplier with the digits that its interval leaves sense to: two below 100."""
    return end_text(value, ".3g" if value >= 99.5 else ".2g")


def interval_short(estimate: Estimate) -> str:
    """An interval where there is little room: 42–115."""
    return f"{end_text(estimate.low, '.3g')}–{end_text(estimate.high, '.3g')}"


def interval_text(estimate: Estimate, form: str) -> str:
    """An interval in words: 42 to 115."""
    return f"{end_text(estimate.low, form)} to {end_text(estimate.high, form)}"
