"""The figures of a report: each with its caption, a text that says what it shows, and its SVG within a page."""

from __future__ import annotations

import re
from dataclasses import dataclass

import pandas as pd

from llada_lightning.compute.flops import CONVENTION_NAMES, Convention
from llada_lightning.study.fits import UNIT_NAMES, StudyFits
from llada_lightning.study.plots import study_figures
from llada_lightning.study.plots.style import svg_text
from llada_lightning.study.tables.style import flops_text


@dataclass(frozen=True)
class Drawing:
    """A figure of a report."""

    name: str
    """The name of the figure, and of its file without the suffix."""
    caption: str
    text: str
    """What is to be seen, for those who do not see it."""
    svg: str
    """The content of its file."""

    @property
    def view_box(self) -> str:
        """The size of the figure, as an SVG writes it."""
        found = re.search(r'viewBox="([-\d. ]+)"', self.svg)
        assert found is not None
        return found[1]

    @property
    def shapes(self) -> str:
        """What is between the tags of the SVG, to stand in an HTML page beside other figures.

        Comments, which repeat names, are left out, and identities begin with the name of the figure: a page has each
        once.
        """
        inner = self.svg[self.svg.index("<svg") :].partition(">")[2].rpartition("</svg>")[0]
        inner = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>|<style.*?</style>", "", inner, flags=re.DOTALL)
        inner = re.sub(r"\s*\n\s*", "\n", inner)
        return re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{self.name}-", inner)


_FEW = 4
"""Of more objectives than this a text tells the ends of all."""


def drawings(table: pd.DataFrame, fits: StudyFits, convention: Convention) -> list[Drawing]:
    """The figures that ``llada curves`` draws of the same table."""
    captions = _captions(fits, convention)
    figures = study_figures(table, fits, convention)
    return [Drawing(name, *captions[name], svg_text(figure)) for name, figure in figures.items()]


def _captions(fits: StudyFits, convention: Convention) -> dict[str, tuple[str, str]]:
    """The caption and the text of each figure that a study may have."""
    counted, unit = CONVENTION_NAMES[convention], UNIT_NAMES[fits.unit]
    what = "Validation loss" if fits.yardstick is None else f"Exact loss by {fits.yardstick}"
    return {
        "scaling": (
            f"{what} against training FLOPs ({counted}).",
            "Both axes are logarithmic. Each point is a finished run, with its standard error, and is filled where it "
            "is the best of its budget. A line is the power law of the best losses of an objective, or joins them. "
            "The best loss of a budget is the mean over the runs of its best shape, such as seeds, so it may be above "
            f"that of the best run. These go, in {unit}, for {_ends(fits, convention)}.",
        ),
        "isoflop": (
            f"{what} against non-embedding parameters at equal FLOPs ({counted}).",
            "A panel for each objective. Each point is a run, and a parabola joins the runs of a budget; its lowest "
            "point is the optimal size. The table of optima holds the numbers.",
        ),
        "optimum": (
            f"Optimal parameters, tokens and tokens per parameter against the budget ({counted}).",
            "Points are the lowest points of the parabolas, with 95 % intervals. Lines are power laws through them, "
            "and dotted lines with bands the law L(N, D). The table of optima and the table of laws hold the numbers.",
        ),
        "multiplier": (
            "Compute multiplier at equal loss, with 95 % intervals, by method.",
            f"A panel for each way of counting FLOPs. The x axis is the budget of {fits.reference}, the y axis the "
            "FLOPs of the other objective over it. The tables of multipliers hold the numbers.",
        ),
        "parametric": (
            "Measured loss against that of the law L(N, D), in per cent.",
            "A panel for each objective. Points about the line at zero are told well by the law.",
        ),
        "tasks": (
            f"Scores of tasks against training FLOPs ({counted}).",
            "A panel for each task. A line joins the budgets of one objective and size.",
        ),
    }  # fmt: skip


def _ends(fits: StudyFits, convention: Convention) -> str:
    """The first and the last of the best losses of each objective."""
    ends = {name: (fit.points[0], fit.points[-1]) for name, fit in fits.envelopes(convention).items()}
    if len(ends) > _FEW:
        losses = [point.loss for pair in ends.values() for point in pair]
        return f"{len(ends)} objectives and variants, between {min(losses):.3f} and {max(losses):.3f}"
    return "; ".join(
        f"{name} from {first.loss:.3f} at {flops_text(first.flops)} FLOPs "
        f"to {last.loss:.3f} at {flops_text(last.flops)}"
        if last is not first
        else f"{name} to {first.loss:.3f} at {flops_text(first.flops)} FLOPs, its one budget"
        for name, (first, last) in ends.items()
    )
