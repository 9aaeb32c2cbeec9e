"""How every figure looks, and how it is written.

Colours are Okabe and Ito's (2008), told apart by the colour-blind; line styles, fillings and markers carry the same
information, so that a figure is readable in grey.
"""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from llada_lightning.compute.flops import CONVENTION_NAMES, Convention
from llada_lightning.compute.shapes import format_count
from llada_lightning.objectives import get_objective
from llada_lightning.study.fits.least_squares import Estimate
from llada_lightning.study.fits.runs import UNIT_NAMES, Unit, base_objective
from llada_lightning.support.files import written_atomically

LineStyle = Literal["-", "--", "-.", ":"] | tuple[float, tuple[float, ...]]


@dataclass(frozen=True)
class Style:
    """How an objective, or a method, is drawn and named."""

    label: str
    color: str
    line: LineStyle
    marker: str = "o"
    filled: bool = True

    @property
    def face(self) -> str:
        """The marker's filling."""
        return self.color if self.filled else "white"

    def handle(self, label: str = "", *, marker: str = "", face: str = "") -> Line2D:
        """The style in a legend; ``marker`` adds one, filled as the style's are or with ``face``."""
        return Line2D(
            [], [], color=self.color, linestyle=self.line, linewidth=1.8, label=label or self.label,
            marker=marker, markerfacecolor=face or self.face, markersize=5.5,
        )  # fmt: skip


METHODS = {
    "read-off": Style("read off the losses", "#000000", "-", "o"),
    "joint": Style("joint L(N, D)", "#0072B2", (0, (6, 1.5)), "D"),
    "isoflop": Style("IsoFLOP", "#009E73", "--", "s"),
    "parametric": Style("parametric L(N, D)", "#CC79A7", "-.", "^"),
    "envelope": Style("bent envelope", "#E69F00", ":", "v"),
}
"""The methods of fitting."""

CHANCE = Style("guessing", "#8A8A8A", ":")

MARKERS = "osD^vPX*<>phd8"
LINES: tuple[LineStyle, ...] = ("-", "--", "-.", ":")
INK, GREY, GRID = "#222222", "#8A8A8A", "#E4E4E4"
PNG_DPI, NOTEBOOK_DPI = 160, 90
LEGEND_POINTS, LEGEND_WIDTH = 9, 36
"""The size of a legend's letters, and the characters of its lines."""


def objective_styles(names: Iterable[str], yardstick: str | None = None) -> dict[str, Style]:
    """The styles of objectives, as the table of objectives gives them, by the names of ``named_variants``.

    The variants of an objective have shades of its colour, each with another line and another marker. With a named
    yardstick the losses are exact, and the labels say so.
    """
    styles: dict[str, Style] = {}
    for name in names:
        base = base_objective(name)
        own, number = get_objective(base), sum(base_objective(other) == base for other in styles)
        line = LINES[(LINES.index(own.line) + number) % len(LINES)]
        markers = own.marker + MARKERS.replace(own.marker, "")
        marker = markers[number % len(markers)]
        label = own.label if yardstick is None or own.val_kind == "exact" else f"{base} (exact, {yardstick})"
        label += plain(name.removeprefix(base))
        styles[name] = Style(label, _shade(own.colour, _SHADES[number % len(_SHADES)]), line, marker, own.filled)
    return styles


_SHADES = (0.0, -0.5, 0.45, -0.75)
"""Of the variants of an objective: how far its colour is mixed with white, or, where it is negative, with black."""


def _shade(color: str, share: float) -> str:
    end = np.ones(3) if share > 0 else np.zeros(3)
    return to_hex(tuple(end + (np.array(to_rgb(color)) - end) * (1 - abs(share)))).upper()


class StudyFigure(Figure):
    """A figure that a notebook shows by itself, whatever backend it has, and small."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        _save_png(self, buffer, NOTEBOOK_DPI)
        return buffer.getvalue()


def new_figure(width: float, height: float) -> StudyFigure:
    """An empty figure; sizes in inches."""
    return StudyFigure(figsize=(width, height), dpi=PNG_DPI, layout="constrained")


def write_figure(figure: Figure, folder: Path | str, name: str) -> Path:
    """Writes ``name.png`` and ``name.svg`` atomically; the same figure gives the same bytes.

    Returns:
        The PNG's path.
    """
    png, svg = Path(folder) / f"{name}.png", Path(folder) / f"{name}.svg"
    with written_atomically(png) as temporary:
        _save_png(figure, temporary, PNG_DPI)
    with written_atomically(svg) as temporary:
        temporary.write_text(svg_text(figure), encoding="utf-8")
    return png


def svg_text(figure: Figure) -> str:
    """A figure as SVG, its letters as paths; the same figure gives the same text."""
    buffer = io.StringIO()
    # Without a salt the identities in an SVG are random; without a date its bytes are the same tomorrow.
    with matplotlib.rc_context({"svg.hashsalt": "llada-lightning", "svg.fonttype": "path"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def _save_png(figure: Figure, target: Path | io.BytesIO, dpi: int) -> None:
    """A palette of 256 colours is plenty for lines and bands, and a third of the size."""
    from PIL import Image  # matplotlib needs Pillow itself

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    Image.open(buffer).convert("RGB").quantize(256).save(target, format="PNG", optimize=True)


# --- axes ------------------------------------------------------------------------------------------------------------


def dress(axes: Axes) -> None:
    """Grid behind, two spines, quiet ticks."""
    axes.grid(True, which="major", color=GRID, linewidth=0.7, zorder=0)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(GREY)
    axes.tick_params(which="both", color=GREY, labelcolor=INK)


def flops_label(convention: Convention, whose: str = "training FLOPs") -> str:
    """The label of an axis of FLOPs."""
    return f"{whose} ({CONVENTION_NAMES[convention]})"


def loss_label(unit: Unit, yardstick: str | None) -> str:
    """The label of an axis of losses, with the name of their yardstick where they are no validation losses."""
    what = "validation loss" if yardstick is None else f"exact loss by {yardstick}"
    return f"{what} ({UNIT_NAMES[unit]})"


def flops_axis(axes: Axes) -> None:
    """A logarithmic x axis of FLOPs; ``flops_label`` names it."""
    axes.set_xscale("log")
    label_powers(axes.xaxis, axes.get_xlim())


def label_powers(axis: Axis, limits: tuple[float, float]) -> None:
    """Powers of ten, with 3, or 2 and 5, in between where there is room."""
    _label_logarithmic(axis, limits, power_of_ten, 15)


def label_counts(axis: Axis, limits: tuple[float, float]) -> None:
    """Parameters or tokens: 100m, 1b, with 2 and 5 (or 3) in between where there is room."""
    _label_logarithmic(axis, limits, format_count, 10**1.5)


def _label_logarithmic(axis: Axis, limits: tuple[float, float], text: Callable[[float], str], narrow: float) -> None:
    """Labels at 1, 2 and 5 times powers of ten if the limits span less than ``narrow``, else at 1 and 3, or at 1.

    Limits that hold fewer than two of these have more, or a few round numbers. From eleven powers of ten on, some of
    them have none.
    """
    low, high = limits
    subs: tuple[float, ...] = (1.0, 2.0, 5.0) if high / low < narrow else (1.0, 3.0) if high / low < 10**2.5 else (1.0,)

    def held() -> int:
        return int(np.sum([low <= digit * 10.0**power <= high for power in range(-12, 41) for digit in subs]))

    if held() < 2:
        subs = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
    if held() < 2:  # where LogLocator takes as many as it likes, which then overlap
        axis.set_major_locator(MaxNLocator(nbins=4, steps=[1, 2, 5, 10]))
    else:
        axis.set_major_locator(LogLocator(10, subs=subs, numticks=20 if high / low < 1e11 else 5))
    axis.set_major_formatter(FuncFormatter(lambda value, _: text(value)))
    axis.set_minor_locator(LogLocator(10, subs="all", numticks=100))
    axis.set_minor_formatter(NullFormatter())


def power_of_ten(value: float) -> str:
    """1e19 as 10^19, 3e19 as 3×10^19, 2.5e12 as 2.5×10^12, for matplotlib's mathtext."""
    digits, exponent = f"{value:.1e}".split("e")  # rounds before it splits: 9.99e11 is 10^12
    mantissa, power = f"{float(digits):g}", int(exponent)
    return f"$10^{{{power}}}$" if mantissa == "1" else f"${mantissa}\\times10^{{{power}}}$"


def hold_limits(axes: Axes, values: npt.ArrayLike, factor: float) -> None:
    """Keeps a logarithmic y axis within a factor of the values: an interval that is nearly open may leave the panel."""
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, np.min(values) / factor), min(high, np.max(values) * factor))


def label_plain(axis: Axis, bins: int = 7) -> None:
    """Plain round numbers, for a quantity that rarely spans a power of ten."""
    axis.set_major_locator(MaxNLocator(nbins=bins, steps=[1, 2, 2.5, 5, 10]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


# --- points and legends ----------------------------------------------------------------------------------------------


def markers_of(sizes: Iterable[Any]) -> dict[Any, str]:
    """A marker for each of some sizes or names, in the order given."""
    return {size: MARKERS[number % len(MARKERS)] for number, size in enumerate(dict.fromkeys(sizes))}


def interval_bars(value: npt.ArrayLike, low: npt.ArrayLike, high: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Lengths of error bars from the ends of intervals; 0 where an end is unknown or beyond all bounds."""
    middle = np.asarray(value, float)
    bars = np.stack([middle - np.asarray(low, float), np.asarray(high, float) - middle])
    return np.where(np.isfinite(bars), bars, 0.0).clip(min=0)


def shades(color: str, count: int) -> list[Any]:
    """A colour from light to full, for budgets from the least to the most expensive."""
    full = np.array(to_rgb(color))
    return [tuple(1 + (full - 1) * share) for share in np.linspace(0.45, 1, count)] if count > 1 else [color]


def exponent_text(symbol: str, estimate: Estimate, sign: int = 1) -> str:
    """``loss ∝ C^-0.052 [-0.060, -0.045]`` for a legend, in two lines."""
    ends = sorted((sign * estimate.low, sign * estimate.high))
    return f"  {symbol} ∝ C$^{{{sign * estimate.value:.3f}}}$\n  [{ends[0]:.3f}, {ends[1]:.3f}]"


def note(text: str) -> Line2D:
    """A line of text in a legend."""
    return Line2D([], [], linestyle="", label=text)


def marker_handle(marker: str, label: str, *, filled: bool = True) -> Line2D:
    """A marker in a legend, in grey: it is that of all objectives."""
    face = GREY if filled else "white"
    return Line2D([], [], linestyle="", marker=marker, color=GREY, markerfacecolor=face, markersize=5.5, label=label)


def plain(name: str) -> str:
    """A name within the text of a figure, where a dollar begins no mathematics."""
    return name.replace("$", r"\$")


def broken(text: str, width: int = LEGEND_WIDTH, indent: str = "") -> str:
    """A text whose lines are broken at a number of characters, as names of variants need; mathematics is not."""
    wrapper = textwrap.TextWrapper(width, subsequent_indent=indent, break_on_hyphens=False)
    wrapper.wordsep_simple_re = re.compile(r"(\s+|(?<=[,;]))")  # between the settings of a variant, too
    parts = [[line] if re.search(r"(?<!\\)\$", line) else wrapper.wrap(line) or [line] for line in text.split("\n")]
    return "\n".join(part for own in parts for part in own)


def side_legend(figure: Figure, groups: Sequence[Sequence[Artist]]) -> Legend:
    """One legend on the right of all panels, its groups set apart; empty groups are left out.

    Long names are broken, and the figure is made as high as the legend.
    """
    handles: list[Artist] = []
    for group in groups:
        handles += [note(" "), *group] if handles and group else group
    for handle in handles:
        handle.set_label(broken(str(handle.get_label()), indent="    "))
    if isinstance(figure, StudyFigure):
        lines = sum(str(handle.get_label()).count("\n") + 1 for handle in handles)
        needed = (lines * 1.25 + len(handles) * 0.5 + 1) * LEGEND_POINTS / 72
        figure.set_figheight(max(figure.get_figheight(), needed))
    return figure.legend(
        handles=handles, loc="outside right upper", frameon=False, fontsize=LEGEND_POINTS, labelcolor=INK,
        handlelength=2.6,
    )  # fmt: skip
