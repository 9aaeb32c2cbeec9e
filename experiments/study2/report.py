"""The report of the second study, from its tables: `python experiments/study2/report.py [FOLDER --out REPORT.md]`.

The words are in `study2.md.jinja`, and every number with an interval comes from here. FOLDER holds what
`make study2-cpu` collects; a part whose table is not there yet is left out.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from scipy import stats

from llada_lightning.compute.flops import Convention
from llada_lightning.compute.shapes import format_count, get_shape
from llada_lightning.study.fits import (
    BUDGET_TOLERANCE,
    EnvelopePoint,
    Estimate,
    LossLine,
    Method,
    StudyFits,
    compute_multipliers,
    fit_table,
    usable_runs,
)
from llada_lightning.study.fits.contrast import estimate_text
from llada_lightning.study.fits.envelope import ReadOff
from llada_lightning.study.fits.rules import ObjectiveRules, fit_rules
from llada_lightning.study.fits.runs import budget_members, is_budget
from llada_lightning.study.forecast import Forecast, Scored, read_forecast, score
from llada_lightning.study.plots.style import write_figure
from llada_lightning.study.results import covariance_path, read_covariance, read_results
from llada_lightning.study.tables.style import flops_text
from llada_lightning.study.yardstick import with_yardstick, yardstick_names
from llada_lightning.support.files import written_atomically
from llada_lightning.support.printing import listed
from outcomes import Few, few, outcomes, told
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
LEFT_THE_PLATEAU = 2e12
"""The total FLOPs from which on the growth of a multiplier is told."""
POLICIES = {"llada": "confidence@1", "easy": "confidence@1", "block 4": "random_order@1"}
"""The exact yardstick that is measured of an objective."""


@dataclass(frozen=True)
class Cell:
    """FLOPs of an objective over those of another one at equal loss, at a budget of the objective."""

    flops: float
    """The budget."""
    estimate: Estimate
    draws: np.ndarray

    def inverse(self) -> Cell:
        """The same of the other objective over this one."""
        with np.errstate(divide="ignore"):
            drawn = 1 / self.draws
        return Cell(self.flops, Estimate.of(1 / self.estimate.value, drawn), drawn)

    @property
    def other_flops(self) -> float:
        """What the other objective needs for the same loss."""
        return self.flops / self.estimate.value


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
        """What the objectives need at their largest budget, which all but `uniform` share, in total FLOPs."""
        last = {name: own[-1] for name, own in self.total.items()}
        largest = max(cell.flops for cell in last.values())
        factors = [
            f"**{cell.estimate.value:.3g} times** for `{name}` ({cell.estimate.low:.3g} to {cell.estimate.high:.3g})"
            for name, cell in last.items()
            if is_budget([cell.flops, largest])
        ]
        return (
            f"With {flops_text(largest, '.1g')} FLOPs a denoiser reaches a loss for which `arm` needs many times less: "
            f"{listed(factors)}."
        )

    # --- the compute multiplier ---

    def cells(
        self, name: str, convention: Convention, method: Method = "read-off", fits: StudyFits | None = None
    ) -> list[Cell]:
        """The multipliers over `arm` at the budgets of an objective."""
        fits = fits or self.fits
        full = FULL_NAMES[name]
        lines = [fits.line(own, method, convention, full) for own in (full, "arm")]
        return cells(*lines, np.exp(self._joined(full, convention, fits).log_c)) if all(lines) else []

    def _joined(self, full: str, convention: Convention, fits: StudyFits) -> ReadOff:
        joined = fits.objectives[full].envelope[convention].read_off
        assert joined is not None
        return joined

    @cached_property
    def total(self) -> dict[str, list[Cell]]:
        """The multipliers of all objectives in total FLOPs, read off."""
        return {name: self.cells(name, "total") for name in self.others}

    def cell(self, name: str, flops: float) -> Cell | None:
        """The multiplier over `arm` at a budget, in total FLOPs."""
        return next((cell for cell in self.total[name] if is_budget([cell.flops, flops])), None)

    def best(self, name: str) -> EnvelopePoint:
        """The best shape of the largest budget."""
        return self._points(name)[-1]

    def tokens(self, run: str) -> float:
        """The tokens that a run reads."""
        return float(self.results.loc[self.results["run"] == run, "tokens"].iloc[0])

    def loss(self, name: str) -> float:
        """The best loss of the largest budget as it is read off: less the luck of the best."""
        return float(np.exp(self._joined(FULL_NAMES[name], "total", self.fits).log_loss[-1]))

    def joint(self, name: str) -> str:
        """The multiplier by the joint law at the largest budget, and the p-value of the tests of that law."""
        found = self.cells(name, "total", "joint")
        if not found:
            return "–"
        p = self.fits.joint[FULL_NAMES[name]].rejection
        return f"{estimate_text(found[-1].estimate)}, {'p < 0.001' if p < SMALLEST_P else f'p {p:.2g}'}"

    def laws(self, name: str) -> tuple[float, float] | None:
        """The least and the largest multiplier of the other methods at the largest budget."""
        methods: tuple[Method, ...] = ("isoflop", "parametric", "envelope")
        values = [found[-1].estimate.value for own in methods if (found := self.cells(name, "total", own))]
        return (min(values), max(values)) if values else None

    def over_llada(self, name: str, convention: Convention) -> Cell | None:
        """FLOPs of an objective over `llada`'s for the loss that the worse of the two reaches at its last budget."""
        lines = [self.fits.line(full, "read-off", convention, "arm") for full in (FULL_NAMES[name], "llada")]
        ends = [self._joined(full, convention, self.fits) for full in (FULL_NAMES[name], "llada")]
        assert lines[0] is not None and lines[1] is not None
        if ends[0].log_loss[-1] > ends[1].log_loss[-1]:
            return next(iter(cells(*lines, np.exp(ends[0].log_c[-1:]))), None)
        found = cells(*lines[::-1], np.exp(ends[1].log_c[-1:]))
        return found[0].inverse() if found else None

    def loss_over_llada(self, name: str) -> tuple[float, Estimate]:
        """By how much the mean loss exceeds that of `llada` at the largest budget of the objective.

        Of either it is that of the best shape with several seeds.

        Returns:
            The total FLOPs, and the difference in nats per token with Welch's 95 % interval over the seeds.
        """
        flops = self.best(name).flops
        return flops, welch(self.seeds(name, flops), self.seeds("llada", flops))

    def _points(self, name: str) -> list[EnvelopePoint]:
        return self.fits.objectives[FULL_NAMES[name]].envelope["total"].points

    def one_seed(self, name: str, flops: float) -> bool:
        """Whether the best shape of a budget was run once."""
        return any(point.replicates == 1 for point in self._points(name) if is_budget([point.flops, flops]))

    def seeds(self, name: str, flops: float) -> np.ndarray:
        """The losses of the best shape with several seeds at a budget."""
        shapes = of_budget(runs_of(self.results, name), flops).groupby("shape")["val_nats_per_token"]
        several = [own.to_numpy(float) for _, own in shapes if len(own) > 1]
        return min(several, key=np.mean)

    def growth(self, name: str) -> Estimate | None:
        """The exponent of the multiplier in the objective's own total FLOPs, from where it has left the plateau on."""
        kept = [cell for cell in self.total[name] if cell.flops > LEFT_THE_PLATEAU / BUDGET_TOLERANCE]
        return exponent(kept) if len(kept) > 1 else None

    # --- yardsticks ---

    @cached_property
    def exact(self) -> dict[str, list[tuple[float, Estimate, Estimate, Estimate]]]:
        """What the exact loss makes of the multipliers, by the objectives that have one."""
        return {name: self._exact(name) for name in POLICIES}

    def slack(self) -> str:
        """The multipliers by the exact loss over those by the bound, at the largest budgets."""
        return listed([f"{rows[-1][-1].value:.2f} (`{name}`)" for name, rows in self.exact.items() if rows])

    def _exact(self, name: str) -> list[tuple[float, Estimate, Estimate, Estimate]]:
        """Over the results that have an exact loss.

        Returns:
            The budgets of the objective, the multiplier by the bound, that by the exact loss, and their quotient.
        """
        table, policy = self.results, POLICIES[name]
        if policy not in {own for names in yardstick_names(table).values() for own in names}:
            return []
        pair = table[table["objective"].isin([FULL_NAMES[name], "arm"])]
        exact, _ = with_yardstick(pair, policy)
        same = pair[pair["run"].isin(exact["run"])]
        covariances = self.covariance("results"), self.covariance("results", policy)
        bound, measured = (
            self.cells(name, "total", fits=fit_table(part, covariance=covariance, conventions=("total",)))
            for part, covariance in zip((same, exact), covariances, strict=True)
        )
        rows = []
        for first, second in zip(bound, measured, strict=True):
            both = closed(first.draws) & closed(second.draws)
            drawn = second.draws[both] / first.draws[both]
            ratio = Estimate.of(second.estimate.value / first.estimate.value, drawn)
            rows.append((first.flops, first.estimate, second.estimate, ratio))
        return rows

    # --- tuning ---

    @cached_property
    def rules(self) -> dict[str, ObjectiveRules]:
        """The optima of the tuning studies, by the names of the report."""
        found = fit_rules(self.table("tune"), covariance=self.covariance("tune")).objectives
        return {NAMES[name]: own for name, own in found.items()}

    def tuned_flops(self, name: str) -> float:
        """The largest budget of an objective's tuning study, in total FLOPs."""
        return float(runs_of(self.tuned, name)["flops_total"].max())

    @cached_property
    def tuned(self) -> pd.DataFrame:
        """The results of the tuning studies."""
        return usable_runs(self.table("tune"))

    def gains(self, name: str) -> list[tuple[float, float, float, Estimate]]:
        """What the tuned rates and batches are worth against the rules that ship with the package.

        Returns:
            By budget the total FLOPs, the mean loss by the package's rules, that of the main grid at the same shape,
            and the difference with Welch's 95 % interval over seeds.
        """
        rows = []
        for flops, before, after in self._beside_main(usable_runs(self.table("rules")), name):
            rows.append((flops, float(before.mean()), float(after.mean()), welch(before, after)))
        return rows

    def behind_tuning(self, name: str) -> list[tuple[float, float]]:
        """By budget how far the main grid is above the best run of the tuning study, at the shape that was tuned.

        Returns:
            Total FLOPs, and the mean loss in the main grid less the lowest loss of tuning, in nats per token.
        """
        pairs = self._beside_main(self.tuned, name)
        return [(flops, float(after.mean() - before.min())) for flops, before, after in pairs if len(after)]

    def _beside_main(self, table: pd.DataFrame, name: str) -> Iterator[tuple[float, np.ndarray, np.ndarray]]:
        """By budget the total FLOPs, the losses of a table, and those of the main grid at the same shape."""
        runs, main = runs_of(table, name), runs_of(self.results, name)
        main = main[main["shape"] == runs["shape"].iloc[0]]
        for members in budget_members(runs["flops_total"]):
            own = runs.iloc[members]
            flops = float(own["flops_total"].mean())
            losses = (part["val_nats_per_token"].to_numpy(float) for part in (own, of_budget(main, flops)))
            yield flops, *losses

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

    @cached_property
    def scored(self) -> list[Scored]:
        """The predictions of the forecast beside the losses, as far as their budgets are run."""
        assert self.forecast is not None
        return [own for own in score(self.forecast, self.fits, self.results) if own.observed is not None]

    def errors(self, name: str) -> dict[Method, str]:
        """The errors of the forecast by method; marked where the loss is outside, or a test had failed before."""
        return {
            own.prediction.method: f"{own.prediction.loss - own.observed:+.3f}"
            f"{'' if own.inside else ' †'}{' ‡' if own.prediction.passed is False else ''}"
            for own in (self.scored if self.forecast else [])
            if NAMES[own.prediction.objective] == name and own.observed is not None
        }


def cells(own: LossLine, other: LossLine, flops: np.ndarray) -> list[Cell]:
    """FLOPs of an objective over those of another one, at the losses that it reaches at FLOPs of its own."""
    # As multipliers of the other one over this one, since the losses are those of budgets of this one.
    entries = compute_multipliers("", "", "total", "read-off", (other, own), flops)
    return [
        Cell(entry.reference_flops, entry.estimate, entry.draws).inverse()
        for entry in entries
        if not entry.extrapolated and entry.draws is not None
    ]


def exponent(cells: Sequence[Cell]) -> Estimate:
    """The exponent of a multiplier in the objective's own FLOPs, by least squares of the logarithms.

    Args:
        cells: The multipliers at two budgets or more.
    """
    x = np.log([cell.flops for cell in cells])
    values = np.log([cell.estimate.value for cell in cells])
    drawn = np.stack([cell.draws for cell in cells], axis=1)
    y = np.vstack([values, np.log(drawn[closed(drawn).all(axis=1)])])
    slopes = y @ (x - x.mean()) / np.sum((x - x.mean()) ** 2)
    return Estimate.of(float(slopes[0]), slopes[1:])


def runs_of(table: pd.DataFrame, name: str) -> pd.DataFrame:
    """The usable runs of an objective."""
    return table[table["objective"] == FULL_NAMES[name]]


def of_budget(table: pd.DataFrame, flops: float) -> pd.DataFrame:
    """The results of a budget in total FLOPs."""
    return table[np.array([is_budget([own, flops]) for own in table["flops_total"]], bool)]


def welch(first: np.ndarray, second: np.ndarray) -> Estimate:
    """The difference of two means with Welch's 95 % interval."""
    ends = stats.ttest_ind(first, second, equal_var=False).confidence_interval(0.95)
    return Estimate(float(first.mean() - second.mean()), float(ends.low), float(ends.high))


def closed(draws: np.ndarray) -> np.ndarray:
    """Which draws of a multiplier reach the loss: the others are 0 or infinite."""
    return (draws > 0) & np.isfinite(draws)


# --- the report -------------------------------------------------------------------------------------------------------


def write(out: Path, study: Study, figures: Path) -> None:
    """Write the report of a study, and its figure into a folder."""
    environment = Environment(
        loader=FileSystemLoader(HERE), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True,
    )  # fmt: skip
    forms = {"gap": "+.3f", "signed": "+.2f", "estimate": ".3g"}
    environment.filters |= {name: partial(cell_text, form=form) for name, form in forms.items()}
    environment.filters |= {"flops": count_of_flops, "span": span_text, "sequences": sequences}
    environment.filters |= {"count": format_count, "shape": short_shape}
    text = environment.get_template("study2.md.jinja").render(
        study=study, outcomes=list(outcomes(study)), policies=POLICIES,
        folder=os.path.relpath(figures, out.parent), design=os.path.relpath(HERE / "README.md", out.parent),
    )  # fmt: skip
    multipliers = {FULL_NAMES[name]: own for name, own in study.total.items()}
    write_figure(picture(study.fits, NAMES, multipliers, "total"), figures, "study2")
    with written_atomically(out) as temporary:
        temporary.write_text(text)


def cell_text(estimate: Estimate | None, form: str) -> str:
    """A value with its 95 % interval in brackets; a dash where there is none."""
    return "–" if estimate is None else told(estimate, form)


def count_of_flops(value: float | None) -> str:
    """FLOPs, such as 3.2e11; a dash where there are none."""
    return "–" if value is None else flops_text(value, ".3g")


def short_shape(name: str) -> str:
    """Blocks x width."""
    shape = get_shape(name)
    return f"{shape.n_layers}x{shape.d_model}"


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
