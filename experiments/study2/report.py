"""The report of the second study, from its tables: `python experiments/study2/report.py [FOLDER --out REPORT.md]`.

The words are in `study2.md.jinja`, and every number with an interval comes from here. FOLDER holds what
`make study2-cpu` collects; a part whose table is not there yet is left out.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from scipy import stats

from llada_lightning.compute.flops import Convention
from llada_lightning.compute.shapes import format_count
from llada_lightning.study.fits import (
    BUDGET_TOLERANCE,
    Estimate,
    Headline,
    Multiplier,
    StudyFits,
    fit_table,
    named_variants,
    usable_runs,
)
from llada_lightning.study.fits.contrast import Contrast, estimate_text
from llada_lightning.study.fits.rules import ObjectiveRules, fit_rules
from llada_lightning.study.forecast import Forecast, Scored, read_forecast, score
from llada_lightning.study.plots.style import write_figure
from llada_lightning.study.results import covariance_path, read_covariance, read_results
from llada_lightning.study.tables.style import flops_text
from llada_lightning.study.yardstick import with_yardstick, yardstick_names
from llada_lightning.support.files import written_atomically
from llada_lightning.support.printing import listed
from outcomes import Few, few, outcomes
from picture import picture

HERE = Path(__file__).parent
NAMES = {
    "arm": "arm",
    "llada": "llada",
    "llada [density=range(low=0.05,high=0.6);loss_weight=ce]": "easy",
    "block [block_length=4]": "block 4",
    "block": "block 16",
    "uniform": "uniform",
}
"""The names of the report by those of the fits."""
FULL_NAMES = {short: full for full, short in NAMES.items()}
SMALLEST_P = 0.001
"""A smaller p-value is not told from zero by the draws."""
GROWTH_BUDGETS = 3
"""Of `arm`, at which a multiplier has to be measured for its exponent to be told."""
POLICIES = {"llada": "confidence@1", "easy": "confidence@1", "block 4": "random_order@1"}
"""The exact yardstick that is measured of an objective."""


@dataclass(frozen=True)
class Cell:
    """The read-off multiplier of an objective at one of `arm`'s budgets."""

    estimate: Estimate
    draws: np.ndarray


@dataclass
class Study:
    """The tables of the study in a folder, and what the fits say of them."""

    folder: Path

    def has(self, name: str) -> bool:
        """Whether a file is there."""
        return (self.folder / name).exists()

    def table(self, name: str) -> pd.DataFrame:
        return read_results(self.folder / f"{name}.csv")

    def covariance(self, name: str, yardstick: str | None = None) -> pd.DataFrame:
        return read_covariance(covariance_path(self.folder / f"{name}.csv", yardstick))

    @cached_property
    def fits(self) -> StudyFits:
        return fit_table(self.table("results"), covariance=self.covariance("results"))

    @cached_property
    def results(self) -> pd.DataFrame:
        return usable_runs(self.table("results"))

    @cached_property
    def others(self) -> list[str]:
        """The objectives beside `arm`, by the names of the report."""
        return [NAMES[name] for name in self.fits.compared]

    def answer(self) -> str:
        """The first sentence: what the objectives need at the loss that most of them reach, in total FLOPs."""
        cells = self.cells("total")
        flops = max(self.budgets("total"), key=lambda own: (sum(own in found for found in cells.values()), own))
        told = [
            f"`{name}` needs **{estimate_text(cells[name][flops].estimate)}**"
            for name in self.others
            if flops in cells.get(name, {})
        ]
        return (
            f"For the loss that `arm` reaches with {flops_text(flops, '.3g')} FLOPs "
            f"({self.reference_loss(flops):.3f} nats per token), {listed(told)} times as many, read off the measured "
            "losses."
        )

    # --- the compute multiplier ---

    def cells(self, convention: Convention, fits: StudyFits | None = None) -> dict[str, dict[float, Cell]]:
        """The read-off multipliers by the name of the objective and `arm`'s FLOPs, as far as they are shown."""
        found: dict[str, dict[float, Cell]] = {}
        for own in (fits or self.fits).compute_multiplier:
            if own.method == "read-off" and own.convention == convention and own.shown and own.draws is not None:
                cells = found.setdefault(NAMES[own.objective], {})
                cells[own.reference_flops] = Cell(own.estimate, own.draws)
        return found

    def cell(self, name: str, flops: float, convention: Convention = "total") -> Estimate | None:
        """The multiplier of an objective at FLOPs of `arm`."""
        own = self.cells(convention).get(name, {}).get(flops)
        return own and own.estimate

    def nearest(self, name: str, flops: float) -> tuple[float | None, Estimate | None]:
        """`arm`'s FLOPs, and the multiplier there, at which the objective's own FLOPs are nearest to a budget."""
        cells = self.cells("total").get(name, {})
        at = min(cells, key=lambda own: abs(np.log(own * cells[own].estimate.value / flops)), default=None)
        return at, at and cells[at].estimate

    def reference_loss(self, flops: float, convention: Convention = "total") -> float:
        """`arm`'s best loss at FLOPs, read off."""
        return self.fits.reference_loss(self.fits.compared[0], convention, flops)

    def budgets(self, convention: Convention) -> list[float]:
        """`arm`'s FLOPs at which at least one multiplier is measured."""
        return sorted({flops for cells in self.cells(convention).values() for flops in cells})

    def headline(self, name: str, convention: Convention) -> Headline:
        return next(own for own in self.fits.headlines if NAMES[own.objective] == name and own.convention == convention)

    def methods(self, name: str, flops: float) -> dict[str, Multiplier]:
        """The multipliers that have an interval at a budget of `arm` by method, in total FLOPs, rejected ones, too."""
        return {
            own.method: own
            for own in self.fits.compute_multiplier
            if (NAMES[own.objective], own.convention, own.reference_flops) == (name, "total", flops) and own.shown
        }

    def joint(self, name: str, flops: float) -> str:
        """The multiplier by the joint law, and the p-value of the tests of that law."""
        entry = self.methods(name, flops).get("joint")
        if entry is None:
            return "–"
        p = self.fits.joint[entry.objective].rejection
        return f"{estimate_text(entry.estimate)}, {'p < 0.001' if p < SMALLEST_P else f'p {p:.2g}'}"

    def range(self, name: str, flops: float) -> tuple[float, float]:
        """The least and the largest value of all methods."""
        values = [own.multiplier for own in self.methods(name, flops).values()]
        return min(values), max(values)

    def contrast(self, name: str, convention: Convention) -> Contrast | None:
        """An objective and `llada` against each other, read off both without `arm`."""
        pair = {name, "llada"}
        found = (own for own in self.fits.contrasts if {NAMES[own.objective], NAMES[own.better]} == pair)
        return next((own for own in found if own.convention == convention), None)

    def over_llada(self, name: str, convention: Convention) -> tuple[float, Estimate] | None:
        """FLOPs of an objective over those of `llada` at equal loss.

        Returns:
            The FLOPs of the better one at the largest loss for which the quotient is closed, and the quotient; None
            where there is none.
        """
        own = self.contrast(name, convention)
        if own is None or own.factor is None or own.flops is None:
            return None
        inverse = Estimate(1 / own.factor.value, 1 / own.factor.high, 1 / own.factor.low)
        return own.flops, own.factor if NAMES[own.better] == "llada" else inverse

    def loss_over_llada(self, name: str, convention: Convention) -> tuple[float, Estimate] | None:
        """By how much the best loss of an objective exceeds that of `llada` at the largest budget that both have.

        Returns:
            The FLOPs and the difference in nats per token; None where no budget is shared.
        """
        own = self.contrast(name, convention)
        if own is None or not own.higher:
            return None
        flops, found = max(own.higher.items())
        turned = Estimate(-found.value, -found.high, -found.low)
        return flops, found if NAMES[own.better] == "llada" else turned

    def growth(self, name: str, convention: Convention) -> Estimate | None:
        """The exponent of the multiplier in the objective's own FLOPs; None where too few budgets tell it."""
        cells = self.cells(convention).get(name, {})
        return exponent(cells) if len(cells) >= GROWTH_BUDGETS else None

    # --- yardsticks ---

    def exact(self, name: str) -> list[tuple[float, Estimate, Estimate, Estimate]]:
        """What the exact loss makes of the multiplier of an objective, over the results that have one.

        Returns:
            `arm`'s FLOPs, the multiplier by the bound, that by the exact loss, and their quotient, where both are
            closed.
        """
        table, policy = self.results, POLICIES[name]
        if policy not in {own for names in yardstick_names(table).values() for own in names}:
            return []
        pair = table[named_variants(table)["objective"].isin([FULL_NAMES[name], "arm"]).to_numpy(bool)]
        exact, _ = with_yardstick(pair, policy)
        same = pair[pair["run"].isin(exact["run"])]
        covariances = self.covariance("results"), self.covariance("results", policy)
        bound, measured = (
            self.cells("total", fit_table(part, covariance=covariance, conventions=("total",))).get(name, {})
            for part, covariance in zip((same, exact), covariances, strict=True)
        )
        rows = []
        for flops in sorted(set(bound) & set(measured)):
            first, second = bound[flops], measured[flops]
            ratio = Estimate.of(second.estimate.value / first.estimate.value, second.draws / first.draws)
            rows.append((flops, first.estimate, second.estimate, ratio))
        return rows

    # --- tuning ---

    @cached_property
    def rules(self) -> dict[str, ObjectiveRules]:
        """The optima of the tuning studies, by the names of the report."""
        found = fit_rules(self.table("tune"), covariance=self.covariance("tune")).objectives
        return {NAMES[name]: own for name, own in found.items()}

    def tuned_flops(self, name: str) -> float:
        """The largest budget of an objective's tuning study, in total FLOPs."""
        table = usable_runs(self.table("tune"))
        return float(
            table.loc[(named_variants(table)["objective"] == FULL_NAMES[name]).to_numpy(bool), "flops_total"].max()
        )

    def gains(self, name: str) -> list[tuple[float, float, float, Estimate]]:
        """What the tuned rates and batches are worth against the rules that ship with the package.

        Returns:
            By budget the total FLOPs, the mean loss by the package's rules, that of the main grid at the same shape,
            and the difference with Welch's 95 % interval over seeds.
        """
        rules, main = (
            table[(table["objective"] == name) & table["variant"].isna()]
            for table in (self.table("rules"), self.results)
        )
        main = main[main["shape"] == rules["shape"].iloc[0]]
        rows = []
        for _, own in rules.groupby(rules["flops_total"].astype(float).map("{:.0e}".format)):
            near = np.abs(np.log(main["flops_total"].to_numpy(float) / own["flops_total"].mean())) < np.log(
                BUDGET_TOLERANCE
            )
            before, after = (runs["val_nats_per_token"].to_numpy(float) for runs in (own, main[near]))
            ends = stats.ttest_ind(before, after, equal_var=False).confidence_interval(0.95)
            difference = Estimate(float(before.mean() - after.mean()), float(ends.low), float(ends.high))
            rows.append((float(own["flops_total"].mean()), float(before.mean()), float(after.mean()), difference))
        return sorted(rows, key=lambda row: row[0])

    # --- few distinct tokens ---

    def few_tuned(self) -> dict[tuple[int, str], list[Few]]:
        """All recipes at the smallest number of distinct tokens, with the seed that chose among them."""
        table = usable_runs(self.table("few"))
        return few(table[table["seed"] == 0])

    def few(self) -> dict[tuple[int, str], list[Few]]:
        """The chosen recipes at every number of distinct tokens, with seeds that had no part in the choice."""
        table = usable_runs(self.table("few"))
        return few(table[table["seed"] > 0])

    # --- the forecast ---

    @cached_property
    def forecast(self) -> Forecast | None:
        """The forecast that was written before the largest budgets were run; None where it is of other data."""
        path = self.folder / "forecast.json"
        forecast = read_forecast(path) if path.exists() else None
        same = forecast and (self.results["data_fingerprint"] == forecast.data["data_fingerprint"]).all()
        return forecast if same else None

    def scored(self) -> list[Scored]:
        """The predictions of the forecast beside the losses, as far as their budgets are run."""
        assert self.forecast is not None
        return [own for own in score(self.forecast, self.fits, self.results) if own.observed is not None]


def exponent(cells: Mapping[float, Cell]) -> Estimate:
    """The exponent of a multiplier in the objective's own FLOPs.

    The log multiplier has a slope b in `arm`'s log FLOPs, which have no error, by least squares. As the objective's
    FLOPs are the multiplier times those, the exponent in its own FLOPs is b / (1 + b).

    Args:
        cells: The multipliers by `arm`'s FLOPs.
    """
    x = np.log(list(cells))
    values = np.log([cell.estimate.value for cell in cells.values()])
    drawn = np.stack([cell.draws for cell in cells.values()], axis=1)
    closed = ((drawn > 0) & np.isfinite(drawn)).all(axis=1)  # a draw is 0 or infinite where it reaches no such loss
    y = np.vstack([values, np.log(drawn[closed])])
    slopes = y @ (x - x.mean()) / np.sum((x - x.mean()) ** 2)
    exponents = slopes / (1 + slopes)
    return Estimate.of(float(exponents[0]), exponents[1:])


# --- the report -------------------------------------------------------------------------------------------------------


def write(out: Path, folder: Path) -> None:
    """Write the report of the tables in a folder."""
    environment = Environment(
        loader=FileSystemLoader(HERE), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True,
    )  # fmt: skip
    forms = {"loss": ".3f", "gap": "+.3f", "signed": "+.2f", "estimate": ".3g"}
    environment.filters |= {name: partial(cell_text, form=form) for name, form in forms.items()}
    environment.filters |= {"flops": count_of_flops, "span": span_text, "sequences": sequences}
    environment.filters["count"] = format_count
    study = Study(folder)
    text = environment.get_template("study2.md.jinja").render(
        study=study, outcomes=list(outcomes(study)), names=NAMES, policies=POLICIES,
        folder=os.path.relpath(folder, out.parent), design=os.path.relpath(HERE / "README.md", out.parent),
    )  # fmt: skip
    write_figure(picture(study.fits, NAMES, "total"), folder, "study2")
    with written_atomically(out) as temporary:
        temporary.write_text(text)


def cell_text(estimate: Estimate | None, form: str) -> str:
    """A value with its 95 % interval in brackets; a dash where there is none."""
    if estimate is None:
        return "–"
    value, low, high = (f"{number:{form}}" for number in (estimate.value, estimate.low, estimate.high))
    return f"{value} ({low} to {high})".replace("inf", "∞")


def count_of_flops(value: float | None) -> str:
    """FLOPs, such as 3.2e11; a dash where there are none."""
    return "–" if value is None else flops_text(value, ".3g")


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
    write(options.out, options.folder)


if __name__ == "__main__":
    main()
