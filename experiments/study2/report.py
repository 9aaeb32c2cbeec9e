"""The report of the second study, from its tables: `python experiments/study2/report.py [FOLDER --out REPORT.md]`.

The words are in `study2.md.jinja`, the numbers in `measured.py`. FOLDER holds what `make study2-cpu` collects; a part
whose table is not there yet is left out.
"""

from __future__ import annotations

import argparse
import os
from functools import partial
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from llada_lightning.compute.rules import significant
from llada_lightning.compute.shapes import format_count, get_shape
from llada_lightning.study.fits import Estimate, Multiplier
from llada_lightning.study.fits.runs import is_budget
from llada_lightning.study.plots.style import write_figure
from llada_lightning.study.tables.style import flops_text
from llada_lightning.support.files import written_atomically
from llada_lightning.support.printing import listed
from measured import FULL_NAMES, NAMES, POLICIES, Study
from outcomes import outcomes, told
from picture import picture

HERE = Path(__file__).parent
SMALLEST_P = 0.001
"""A smaller p-value is not told from zero by the draws."""


def at_the_largest_budget(study: Study) -> dict[str, Multiplier]:
    """The multipliers in total FLOPs, read off, of the objectives that have the study's largest budget."""
    largest = max(own[-1].objective_flops for own in study.total.values())
    return {name: own[-1] for name, own in study.total.items() if is_budget([own[-1].objective_flops, largest])}


def answer(study: Study) -> str:
    """What the objectives need at their largest budget, which all but `uniform` share, in total FLOPs."""
    factors = []
    for name, own in (last := at_the_largest_budget(study)).items():
        value, low, high = (f"{significant(number, 2):g}" for number in (own.multiplier, own.low, own.high))
        factors.append(f"**about {value} times** for `{name}` ({low} to {high})")
    flops = next(iter(last.values())).objective_flops
    return (
        f"At a budget of {flops_text(flops, '.1g')} FLOPs a denoiser needs many times `arm`'s FLOPs for the same loss: "
        f"{listed(factors)}."
    )


def write(out: Path, study: Study, figures: Path) -> None:
    """Write the report of a study, and its figure into a folder."""
    environment = Environment(
        loader=FileSystemLoader(HERE), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True,
    )  # fmt: skip
    forms = {"gap": "+.3f", "signed": "+.2f", "estimate": ".3g"}
    environment.filters |= {name: partial(cell_text, form=form) for name, form in forms.items()}
    environment.filters |= {"flops": count_of_flops, "span": span_text, "sequences": sequences}
    environment.filters |= {"count": format_count, "shape": short_shape, "named": named, "names": names}
    last = at_the_largest_budget(study)
    text = environment.get_template("study2.md.jinja").render(
        study=study, answer=answer(study), outcomes=list(outcomes(study)), policies=POLICIES, joint=joint_text,
        largest=next(iter(last.values())).objective_flops, computed={name: study.computed(name) for name in last},
        folder=os.path.relpath(figures, out.parent), design=os.path.relpath(HERE / "README.md", out.parent),
    )  # fmt: skip
    multipliers = {FULL_NAMES[name]: own for name, own in study.total.items()}
    write_figure(picture(study.fits, NAMES, multipliers, "total"), figures, "study2")
    with written_atomically(out) as temporary:
        temporary.write_text(text)


def names(objectives: list[str]) -> str:
    """The names of some objectives."""
    return listed([f"`{name}`" for name in objectives])


def named(values: dict[str, float], form: str) -> str:
    """Values of objectives, each with the name of its objective."""
    return listed([f"{value:{form}} (`{name}`)".replace("%", " %") for name, value in values.items()])


def joint_text(study: Study, name: str) -> str:
    """The multiplier by the joint law at the largest budget, and the p-value of the tests of that law."""
    found, p = study.joint(name), study.fits.joint[FULL_NAMES[name]].rejection
    return f"{cell_text(found, '.3g')}, {'p < 0.001' if p < SMALLEST_P else f'p {p:.2g}'}" if found else "–"


def cell_text(estimate: Estimate | None, form: str) -> str:
    """A value with its 95 % interval in brackets; a dash where there is none."""
    return "–" if estimate is None else told(estimate, form)


def count_of_flops(value: float | None) -> str:
    """FLOPs, such as 3.2e11; a dash where there are none."""
    return "–" if value is None else flops_text(value, ".3g")


def short_shape(name: str) -> str:
    """Blocks x width."""
    return get_shape(name).depth_by_width


def sequences(estimate: Estimate) -> str:
    """Tokens of a batch as sequences."""
    length = 64
    return cell_text(Estimate(estimate.value / length, estimate.low / length, estimate.high / length), ".2g")


def span_text(ends: tuple[float, float] | None) -> str:
    """The ends of a range."""
    return "–" if ends is None else f"{ends[0]:.3g} to {ends[1]:.3g}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the report of the second study.")
    parser.add_argument("folder", type=Path, nargs="?", default=HERE / "cpu", help="folder of the tables")
    parser.add_argument("--out", type=Path, default=HERE.parents[1] / "docs" / "study2.md", help="file of the report")
    options = parser.parse_args()
    write(options.out, Study(options.folder), options.folder)


if __name__ == "__main__":
    main()
